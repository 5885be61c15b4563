"""What one policy added to a model, and its life: switched, scaled, merged into the weights, taken out again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clipfreeze.errors import ApplyError
from clipfreeze.inject.addition import Addition
from clipfreeze.inject.factor import Factor, parameter_of, summed
from clipfreeze.inject.lora import Lora, connect
from clipfreeze.inject.registry import INJECTORS, Tokenizer
from clipfreeze.plan.sites import LoraSite, Site


@dataclass
class Part:
    """One addition where it is; `undo` takes it out."""

    site: Site
    addition: Addition
    undo: ExitStack


@dataclass
class Added:
    """All that one policy added. `weight` is its share when several are active, 0 when it is not."""

    parts: list[Part]
    weight: float = 1.0
    merged: dict[str, Tensor] = field(default_factory=dict)
    """Weights as they were before merging."""

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of what was added, by their names in the model."""
        return {
            f"{part.site.path}.{name}": tensor
            for part in self.parts
            for name, tensor in part.addition.state_dict(keep_vars=True).items()
        }

    def set_strengths(self, scale: float) -> None:
        """In full, in part or not at all; what cannot be scaled is on unless the policy is off."""
        for part in self.parts:
            strength = self.weight * scale if part.addition.scalable else float(self.weight > 0)
            part.addition.set_strength(strength)

    def merge(self, model: nn.Module) -> None:
        """Put what LoRA adds into the weights and take the factors out. Raises ApplyError for what cannot be put in."""
        if stuck := [part for part in self.parts if not isinstance(part.addition, Lora)]:
            kinds = " and ".join(dict.fromkeys(part.site.kind for part in stuck))
            what = f"{len(stuck)} additions cannot be merged into weights: {kinds} ({stuck[0].site.path}, ...)"
            raise ApplyError(what, "merge LoRA alone; clipfreeze.load puts the rest on a model again")
        names = dict.fromkeys(part.site.parameter for part in self.parts if isinstance(part.site, LoraSite))
        sums = {name: summed(_factor(model, name)) for name in names}
        self.merged = {name: parameter_of(model, name).detach().clone() for name in sums}
        for part in reversed(self.parts):
            part.undo.close()
        _write(model, sums)

    def unmerge(self, model: nn.Module) -> None:
        """The weights as they were, bit for bit, and the same factors beside them."""
        _write(model, self.merged)
        self.merged = {}
        for part in self.parts:
            assert isinstance(part.site, LoraSite)
            assert isinstance(part.addition, Lora)
            connect(part.addition, part.site, model, part.undo)
            part.addition.train(model.training)  # it did not hear of what was said in the meantime


def _factor(model: nn.Module, name: str) -> Factor:
    path, _, leaf = name.rpartition(".")
    factor = vars(model.get_submodule(path))[leaf]
    assert isinstance(factor, Factor)
    return factor


def _write(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            parameter_of(model, name).copy_(value)


def add_sites(
    sites: Sequence[Site], model: nn.Module, undo: ExitStack, tokenizer: Tokenizer | None, *, fresh: bool
) -> Added:
    """Add everything; `fresh` draws start values, else saved ones are to be put in."""
    order = list(INJECTORS)
    added = Added([])
    for site in sorted(sites, key=lambda site: (order.index(site.kind), site.tower == "vision")):
        own = undo.enter_context(ExitStack())  # text first: vision prompts may be a map of its prompt
        added.parts.append(Part(site, INJECTORS[site.kind](site, model, own, tokenizer, fresh), own))
    return added
