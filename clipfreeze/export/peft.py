"""A PEFT LoRA folder, which `peft.PeftModel.from_pretrained` puts on the same open_clip model."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.changes import Applied
from clipfreeze.errors import ExportError, Problem, RunError
from clipfreeze.export.files import whole_folder, write_json, write_tensors
from clipfreeze.export.plain import added_problems
from clipfreeze.export.proof import probe_outputs, probe_pictures, proved
from clipfreeze.foreign.peft_folder import CONFIG, OUT, OUT_COUNTS, PREFIX, WEIGHTS
from clipfreeze.inject.addition import Addition
from clipfreeze.inject.factor import parameter_of, wide
from clipfreeze.inject.lora import Lora
from clipfreeze.models import Loaded
from clipfreeze.plan.sites import LoraSite, Site

_MERGE = "--to open_clip merges it into the weights"

Part = tuple[LoraSite, Lora]


@dataclass
class _Held:
    """One module as PEFT holds it: the LoRA of each of its weights, by what the key has between module and factor.

    An attention has two: a pair of factors for in_proj and one for out_proj, of the same rank and scale.
    """

    kind: type[nn.Module]
    weights: dict[str, list[Part]] = field(default_factory=dict)

    @property
    def parts(self) -> list[Part]:
        return [part for parts in self.weights.values() for part in parts]

    @property
    def rank(self) -> int:
        return max(sum(len(_factors(lora)[0]) for _, lora in parts) for parts in self.weights.values())

    @property
    def scaling(self) -> float:
        """What all parts are scaled by; where they differ each has its own in its B."""
        scalings = {site.spec.scaling for site, _ in self.parts}
        return scalings.pop() if len(scalings) == 1 else 1.0


def write_peft(applied: Applied, loaded: Loaded, folder: Path) -> float:
    """Write the LoRA that `applied` has at work, at its present strength, and take the policy off.

    Returns the largest difference on a probe batch between the model and a copy of its base with the folder on it.
    Raises ExportError, naming all that PEFT cannot hold, before anything is written or taken off.
    """
    peft = _installed()
    applied.trainable()  # refuses what is merged
    problems = [*added_problems(applied, "PEFT"), *_base_problems(applied), *_other_problems(applied)]
    modules, unfit = _modules(applied)
    with applied.disabled():  # a prompt refuses texts that are too long, or none of its classes
        idle = list(_idle_problems(loaded, modules))
    if problems := [*problems, *unfit, *idle]:
        raise ExportError(problems)
    dora = any(site.spec.variant == "dora" for held in modules.values() for site, _ in held.parts)
    ours = probe_outputs(loaded, probe_pictures(80, 60))
    with whole_folder(folder) as part:
        write_json(part / CONFIG, _config(loaded, modules, dora))
        write_tensors(part / WEIGHTS, _tensors(loaded.model, modules, dora))
        applied.remove()
        return _loaded_back(peft, loaded, part, ours)


def reload_line(loaded: Loaded, folder: Path) -> str:
    """The expression that puts the adapter on a fresh base."""
    weights = f", pretrained={loaded.pretrained!r}" if loaded.pretrained else ""
    return f"peft.PeftModel.from_pretrained(open_clip.create_model({loaded.name!r}{weights}), {str(folder)!r})"


def peft_notes(sites: Sequence[Site], loaded: Loaded) -> Iterator[str]:
    """What is to be known of the folder beside its difference on a probe batch."""
    loras = [site for site in sites if isinstance(site, LoraSite)]
    dropouts = {site.spec.dropout for site in loras if site.product != "embedding"}
    owners = [_owner(loaded.model, site.parameter) for site in loras]
    if len(dropouts) > 1:
        yield f"PEFT has one dropout for all modules: {max(dropouts):g}, the largest here"
    if any(dropouts) and any(isinstance(module, nn.MultiheadAttention) for _, _, module, _ in owners):
        yield "PEFT's attention applies no dropout: to train on with it is not the same"
    if any(between for _, between, _, _ in owners):
        version = _installed().__version__
        yield f"PEFT {version} adds the factors of an out_proj {OUT_COUNTS} times: they are stored smaller"
    if loaded.random:
        yield f"the base {loaded.name} has random weights, which the line below draws anew: the run's are of its seed"


def _installed() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ExportError("this format is proved with PEFT", "pip install peft") from error
    return peft


def _base_problems(applied: Applied) -> Iterator[Problem]:
    changed = [p.name for p in applied.plan.parameters if p.origin == "model" and (p.trainable or p.init is not None)]
    if changed:
        yield Problem(f"PEFT cannot hold what this policy changes of the model itself: {_few(changed)}", _MERGE)


def _other_problems(applied: Applied) -> Iterator[Problem]:
    """Of other policies at work beside this one."""
    own = {id(addition) for _, addition in applied.additions}
    others = (module for module in applied.model.modules() if isinstance(module, Addition) and id(module) not in own)
    if any(other.strength for other in others):
        yield Problem("several policies are at work", "activate one of them alone")


def _modules(applied: Applied) -> tuple[dict[str, _Held], list[Problem]]:
    """The modules of the model that PEFT can adapt as the policy does, and what it cannot adapt, grouped by reason."""
    parts = [(site, addition) for site, addition in applied.additions if isinstance(addition, Lora)]
    dora = any(isinstance(site, LoraSite) and site.spec.variant == "dora" for site, _ in parts)
    modules: dict[str, _Held] = {}
    unfit: dict[str, list[str]] = {}
    for site, lora in parts:
        assert isinstance(site, LoraSite)
        name, between, module, leaf = _owner(applied.model, site.parameter)
        if reason := _reason(module, leaf, dora):
            unfit.setdefault(reason, []).append(site.of)
        else:
            modules.setdefault(name, _Held(type(module))).weights.setdefault(between, []).append((site, lora))
    return modules, [Problem(f"{reason}: {_few(names)}", _MERGE) for reason, names in unfit.items()]


def _owner(model: nn.Module, parameter: str) -> tuple[str, str, nn.Module, str]:
    """Module that PEFT would wrap for a parameter: name, what its keys have behind that, itself, the last name."""
    path, _, leaf = parameter.rpartition(".")
    outer = path.removesuffix(".out_proj")
    if outer != path and isinstance(attention := model.get_submodule(outer), nn.MultiheadAttention):
        return outer, OUT, attention, "in_proj_weight" if attention._qkv_same_embed_dim else leaf
    return path, "", model.get_submodule(path), leaf


def _reason(module: nn.Module, leaf: str, dora: bool) -> str | None:
    """Why PEFT cannot adapt this parameter of the module."""
    if isinstance(module, nn.MultiheadAttention):
        if leaf != "in_proj_weight":
            return "PEFT's attention takes no separate weights of q, k and v"
        return "PEFT's attention takes no DoRA, nor anything beside DoRA elsewhere" if dora else None
    if leaf != "weight":
        return "PEFT adapts modules, and would wrap a whole tower for a bare parameter"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "PEFT's LoRA of a grouped convolution is another than ours"
        return "PEFT's LoRA of a dilated convolution is not dilated" if module.dilation != (1, 1) else None
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return f"PEFT has no LoRA for a {type(module).__name__}"
    return None


class _Wrapped(nn.Module):
    """As PEFT wraps a module: of another class, with the same weights."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.ran = base, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module does."""
        self.ran = True
        return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)


def _idle_problems(loaded: Loaded, modules: Mapping[str, _Held]) -> Iterator[Problem]:
    names = list(modules)
    runs = _running(loaded, names) if names else set()
    idle = [site.of for name in names if name not in runs for site, _ in modules[name].parts]
    if idle:
        why = "the model reads their weights without calling them, or asks for their class"
        yield Problem(f"PEFT's wrappers would not run around {_few(idle)}: {why}", _MERGE)


def _running(loaded: Loaded, names: Sequence[str]) -> set[str]:
    """Those of the modules that still run with a wrapper around each; found by trying, ever fewer where one breaks."""
    wrapped = {}
    with ExitStack() as undo:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            children = loaded.model.get_submodule(parent)._modules
            undo.callback(children.__setitem__, leaf, children[leaf])
            children[leaf] = wrapped[name] = _Wrapped(loaded.model.get_submodule(name))
        try:
            probe_outputs(loaded, probe_pictures(80, 60))
            return {name for name, module in wrapped.items() if module.ran}
        except (TypeError, AttributeError, RuntimeError, ValueError):  # of the model, where it takes no such module
            if len(names) == 1:
                return set()
    half = len(names) // 2
    return _running(loaded, names[:half]) | _running(loaded, names[half:])


def _config(loaded: Loaded, modules: Mapping[str, _Held], dora: bool) -> dict[str, Any]:
    """Names are patterns that match from the start: in CLIP a text block's name is the end of a vision block's."""
    ranks = {name: held.rank for name, held in modules.items()}
    alphas = {name: _number(held.scaling * held.rank) for name, held in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    parts = [site for held in modules.values() for site, _ in held.parts]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": loaded.name,
        "task_type": None,
        "inference_mode": True,
        "target_modules": "|".join(re.escape(name) for name in modules),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(name)}": own for name, own in alphas.items() if own != alpha},
        "lora_dropout": max(site.spec.dropout for site in parts),
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _number(value: float) -> int | float:
    """Whole as far as floats go: PEFT's alpha is a whole number by its type."""
    return round(value) if abs(value - round(value)) < 1e-9 * abs(value) else value


def _tensors(model: nn.Module, modules: Mapping[str, _Held], dora: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, held in modules.items():
        weights = held.weights
        if held.kind is nn.MultiheadAttention:
            weights = {"": [], OUT: []} | weights
        for between, parts in weights.items():
            leaf = "weight" if between or held.kind is not nn.MultiheadAttention else "in_proj_weight"
            weight = parameter_of(model, f"{name}{between.removeprefix('.base_layer') or ''}.{leaf}")
            a, b, magnitude = _joined(parts, held, weight)
            b = b / OUT_COUNTS if between else b
            found = _by_key(held.kind, weight, a, b, magnitude if dora else None)
            tensors |= {f"{PREFIX}{name}{between}.{key}": tensor.contiguous() for key, tensor in found.items()}
    return tensors


def _by_key(kind: type[nn.Module], weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None) -> dict[str, Tensor]:
    if issubclass(kind, nn.Embedding):
        found = {"lora_embedding_A": a, "lora_embedding_B": b}
    elif issubclass(kind, nn.Conv2d):
        found = {"lora_A.weight": a.view(len(a), *weight.shape[1:]), "lora_B.weight": b[:, :, None, None]}
    else:
        found = {"lora_A.weight": a, "lora_B.weight": b}
    if magnitude is not None:
        found["lora_magnitude_vector"] = magnitude.view(1, -1, 1, 1) if issubclass(kind, nn.Conv2d) else magnitude
    return found


@torch.no_grad()
def _joined(parts: Sequence[Part], held: _Held, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (rank, in), B (out, rank) and DoRA's magnitude (out,) of one weight whose rows have LoRA of their own, or none.

    A row of DoRA with gain g (magnitude over length) at strength s is (1 - s) W + s g (W + D): DoRA again, of gain
    1 - s + s g. One without DoRA has gain 1.
    """
    matrix = wide(weight)
    matrix = matrix.T if issubclass(held.kind, nn.Embedding) else matrix.flatten(1)
    a_parts, b_parts = [matrix.new_zeros(0, matrix.shape[1])], [matrix.new_zeros(len(matrix), 0)]
    gains = matrix.new_ones(len(matrix))
    for site, lora in parts:
        start, stop = site.rows or (0, len(matrix))
        a, b = _factors(lora)
        share: Tensor | float = lora.strength
        if site.spec.variant == "dora":
            gain = lora.magnitude / (matrix[start:stop] + b @ a * site.spec.scaling).norm(dim=1)
            gains[start:stop] = 1 - lora.strength + lora.strength * gain
            share = (lora.strength * gain / gains[start:stop])[:, None]
        a_parts.append(a)
        b = b * share * (site.spec.scaling / held.scaling)
        b_parts.append(functional.pad(b, (0, 0, start, len(matrix) - stop)))
    missing = held.rank - sum(map(len, a_parts))
    a = functional.pad(torch.cat(a_parts), (0, 0, 0, missing))
    b = functional.pad(torch.cat(b_parts, 1), (0, missing))
    return a, b, gains * (matrix + held.scaling * (b @ a)).norm(dim=1)


def _factors(lora: Lora) -> tuple[Tensor, Tensor]:
    """A and B, in PiSSA with what it started from taken off."""
    if lora.spec.init != "pissa":
        return lora.A.detach(), lora.B.detach()
    return torch.cat([lora.A.detach(), lora.A_start]), torch.cat([lora.B.detach(), -lora.B_start], 1)


def _loaded_back(peft: Any, loaded: Loaded, part: Path, ours: Mapping[str, Tensor]) -> float:
    base = copy.deepcopy(loaded.model)
    try:
        peft.PeftModel.from_pretrained(base, str(part))  # which puts its layers into `base`
        theirs = probe_outputs(replace(loaded, model=base), probe_pictures(80, 60))
    except (TypeError, AttributeError, RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"the export cannot be loaded back: {error}") from error
    return proved(loaded.model, ours, theirs)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
