"""The anatomy of a model as plain data: which part of which tower every parameter is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

TOWERS = ("vision", "text")
TOWER_PARTS = ("embed", "blocks", "norm", "pool", "proj")
ROLES = (
    *(f"{tower}.{part}" for tower in TOWERS for part in TOWER_PARTS),
    "decoder",
    "logit_scale",
    "logit_bias",
)
"""Primary roles: every parameter has exactly one."""

TAGS = ("projections", "norms", "biases", "embeddings", "scales", "attn", "mlp")
"""What may be said of a parameter besides its role: any number of these."""

SLOTS = ("q", "k", "v", "out", "fc1", "fc2")
"""Products inside a block (or attention pool) that a parameter carries; a fused qkv carries three."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the model and its place in it.

    `name` and `shape` are as `named_parameters()` gives them. `block` and `stage` count from 0 within the tower and
    are None outside `blocks`. `slots` is ("q", "k", "v") for a fused weight or bias, ("q",) for one that stands alone.
    `product` is how the model multiplies by it, or None: the weight (out, in) of a linear map, of a convolution, a bare
    factor (in, out), a table of embeddings.
    `fixed` says that the model itself never trains it (sin-cos position embeddings). `aliases` are the other names of a
    tied tensor.

    What a policy adds has the action as its role, `beside` the role of what it works on, and `lr_ratio`, by which its
    learning rate is multiplied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    block: int | None = None
    stage: int | None = None
    tags: frozenset[str] = frozenset()
    slots: tuple[str, ...] = ()
    fixed: bool = False
    aliases: tuple[str, ...] = ()
    product: Literal["linear", "conv", "factor", "embedding"] | None = None
    beside: str | None = None
    lr_ratio: float = 1.0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def tower(self) -> str | None:
        """ "vision", "text", or None for the decoder and the root scalars."""
        tower, dot, _ = self.place.partition(".")
        return tower if dot else None

    @property
    def place(self) -> str:
        """Its role; of what a policy added, the role of what it works on."""
        return self.role if self.beside is None else self.beside


@dataclass(frozen=True, slots=True)
class Tokens:
    """The row of tokens that the blocks of a tower work on: (B, N, width), or (N, B, width) if not `batch_first`.

    The `first` ones are no words or patches: start, class and register tokens.
    Of a text, `table` is the parameter that ids are looked up in, `context` the most ids that it takes (None: any
    number), and `end` says which of a row is its last: the largest id; the first `end_id`, else the last but `pad`; the
    last but `pad`; the `pad` behind that. `whole` says in a few words why what stands behind the end of a text still
    reaches its feature; where it is empty nothing does, and texts may be cut there.
    """

    width: int
    first: int
    batch_first: bool = True
    table: str = ""
    context: int | None = None
    end: Literal["largest", "id", "last", "pad"] = "last"
    end_id: int = 0
    pad: int = 0
    whole: str = ""


@dataclass(frozen=True, slots=True)
class Tower:
    """`blocks` are module names in depth order; `stages` gives the stage of each block, or is empty.

    `tokens` is what the blocks work on, or in a few words why nothing can be put among it.
    """

    name: str
    blocks: tuple[str, ...]
    stages: tuple[int, ...] = ()
    tokens: Tokens | str = "has no tokens"


@dataclass(frozen=True, slots=True)
class Anatomy:
    """All parameters of a model in `named_parameters()` order, its towers, and remarks for the user.

    `notes` are facts that `clipfreeze roles` prints, such as which part stands in for a missing projection.
    """

    model: str
    family: str
    parameters: tuple[Parameter, ...]
    towers: tuple[Tower, ...]
    notes: tuple[str, ...] = ()

    def tower(self, name: str) -> Tower:
        """The tower of that name; raises KeyError when the model has none."""
        for tower in self.towers:
            if tower.name == name:
                return tower
        raise KeyError(name)
