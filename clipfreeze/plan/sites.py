"""Where a plan adds something to the model, and the parameters that come with it; plain data, like the plan."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from clipfreeze.policy.actions import Adapter, Head, Lora, Prompt


class AddedParameter(BaseModel):
    """A parameter below the site's path: `A`, `down.weight`. `lr_scale` multiplies the action's own lr."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    bias: bool = False
    lr_scale: float = 1.0


class _Site(BaseModel):
    """`path` is the module that is added; its parameters follow, fp32. `of` is what it works on, for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    of: str
    tower: str | None = None
    block: int | None = None
    added: tuple[AddedParameter, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the added parameters."""
        return tuple(f"{self.path}.{parameter.name}" for parameter in self.added)


class LoraSite(_Site):
    """Factors beside the product of one parameter, or of the rows [start, stop) of a fused one.

    `product` says what the parameter is in it: the weight of a linear map (out, in), of a convolution, a bare factor
    (in, out), an embedding (in, out).
    """

    kind: Literal["lora"] = "lora"
    parameter: str
    product: Literal["linear", "conv", "factor", "embedding"]
    rows: tuple[int, int] | None = None
    spec: Lora


class AdapterSite(_Site):
    """A bottleneck that reads what module `source` is given (parallel) or `target` gives, and adds to what that gives.

    `conv`: 1x1 convolutions over (B, C, H, W), else linear maps of the last dimension. `factor`: `target` is a bare
    parameter (the text projection of `CLIP`), and what its product gives is meant.
    """

    kind: Literal["adapter"] = "adapter"
    source: str
    target: str
    conv: bool = False
    factor: bool = False
    width_in: int
    width_out: int
    dim: int
    spec: Adapter


class PromptSite(_Site):
    """Vectors among the tokens of one tower, (depth, length, width); (classes, length, width) if class-specific."""

    kind: Literal["prompt"] = "prompt"
    width: int
    classes: tuple[str, ...] = ()
    spec: Prompt


class HeadSite(_Site):
    """A classifier on the vision tower's features of `width`."""

    kind: Literal["head"] = "head"
    width: int
    classes: tuple[str, ...]
    spec: Head


Site = Annotated[LoraSite | AdapterSite | PromptSite | HeadSite, Field(discriminator="kind")]


def renamed(site: Site, name: str) -> Site:
    """The same under a name of its own, beside another policy's: `lora` becomes `lora_NAME` on its path."""
    steps = site.path.split(".")
    own = max(at for at, step in enumerate(steps) if step.endswith(site.kind))
    steps[own] += f"_{name}"
    return site.model_copy(update={"path": ".".join(steps)})


class SiteError(ValueError):
    """An action does not fit what its rule matched; `fix` says what would."""

    def __init__(self, what: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.fix = fix
