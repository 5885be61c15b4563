"""A LoRA folder of PEFT's, read without PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipfreeze.anatomy.parts import Anatomy, Parameter
from clipfreeze.errors import ApplyError, Problem, did_you_mean
from clipfreeze.foreign.factors import Factors, reason
from clipfreeze.foreign.pickled import read_pickle
from clipfreeze.plan.lora_sites import matrix_shape
from clipfreeze.policy.actions import Lora

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, OUT = "base_model.model.", ".base_layer.out_proj"

OUT_COUNTS = 2
"""PEFT adds the product of an attention's out_proj factors this often (huggingface/peft#3774), in training as well."""

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<leaf>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!weight$)[^.]+)??(?P<weight>\.weight)?"
)
"""Between leaf and weight there may be the adapter's name."""

_WITHOUT_EFFECT = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r"),
        *("lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out"),
        *("bias", "init_lora_weights", "eva_config", "runtime_config", "megatron_core", "qalora_group_size"),
        "ensure_weight_tying",
    )
)
"""Keys that are read, or say nothing of what the saved tensors do. Any other that is set means what we do not know."""

_GIVE = "give a folder that PEFT saved"

_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Those that leave the base weights as they are."""


@dataclass(frozen=True)
class _Module:
    """What a file says of one module: its path in the base model, and tensors by leaf."""

    name: str
    out: bool
    tensors: dict[str, Tensor]

    def tensor(self, which: str) -> Tensor | None:
        """`A`, `B`; of embeddings they have names of their own."""
        return self.tensors.get(f"lora_{which}", self.tensors.get(f"lora_embedding_{which}"))


def read_peft_folder(folder: Path, anatomy: Anatomy) -> list[Factors]:
    """The factors of each product. Raises ApplyError for what is no LoRA, has more than LoRA, or fits another model.

    One pair for a fused attention becomes a pair for each of q, k and v, which begin with the same A; what is zero
    throughout is left out.
    """
    config = _config(folder / CONFIG)
    path = next((folder / name for name in (WEIGHTS, OLD_WEIGHTS) if (folder / name).is_file()), folder / WEIGHTS)
    modules = list(_modules(path))
    parameters = {parameter.name: parameter for parameter in anatomy.parameters}
    found = [(module, _parameter(module, parameters)) for module in modules]
    if problems := list(_problems(path, found, config, parameters)):
        raise ApplyError(problems)
    factors = [each for module, parameter in found if parameter for each in _factors(module, parameter, config)]
    if not factors:
        raise ApplyError(Problem("all factors are zero: there is nothing to add", None, str(path)))
    return factors


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ApplyError(Problem(f"cannot be read: {error}", _GIVE, str(path))) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ApplyError(Problem(f"peft_type is {kind!r}: LORA alone can be read", None, str(path)))
    problems = [
        Problem(
            f"{key} = {value!r}: more than LoRA, which cannot be read",
            "merge it with PEFT, and load the model",
            str(path),
        )
        for key, value in {**config, "bias": config.get("bias", "none")}.items()
        if (value if key != "bias" else value != "none") and (key == "bias" or key not in _WITHOUT_EFFECT)
    ]
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        what = f"init_lora_weights = {init!r} changed the base weights"
        fix = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA"
        problems.append(Problem(what, fix, str(path)))
    if not problems:
        try:
            _check_values(config)
        except (TypeError, ValueError, re.error) as error:
            problems.append(Problem(f"says no LoRA: {reason(error)}", None, str(path)))
    if problems:
        raise ApplyError(problems)
    return config


def _check_values(config: Mapping[str, Any]) -> None:
    """ValueError, TypeError or re.error for what PEFT could not work with either."""
    ranks, alphas = (dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
    for pattern in (*ranks, *alphas):
        re.compile(pattern)
    for alpha in (config.get("lora_alpha", 8), *alphas.values()):
        _spec({**config, "lora_alpha": alpha, "alpha_pattern": None}, "", 1)


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        saved = read_pickle(path, _GIVE)
        if isinstance(saved, dict) and all(isinstance(tensor, Tensor) for tensor in saved.values()):
            return saved
        raise ApplyError(Problem("holds more than tensors by their names", _GIVE, str(path)))
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ApplyError(Problem(f"cannot be read: {error}", _GIVE, str(path))) from error


def _modules(path: Path) -> Iterator[_Module]:
    tensors = _tensors(path)
    by_module: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        parts = _KEY.fullmatch(key.removeprefix(PREFIX))
        leaves = by_module.setdefault(parts["module"], {}) if parts else {}
        if parts is None or parts["leaf"] in leaves:
            unknown.append(key)
        else:
            leaves[parts["leaf"]] = tensor.float()
    if unknown:
        raise ApplyError(Problem(f"{_few(unknown)}: no factors of one LoRA", "save one adapter by itself", str(path)))
    for name, leaves in by_module.items():
        attention = name.removesuffix(OUT)
        plain = ".".join(step for step in attention.split(".") if step != "base_layer")
        yield _Module(plain, attention != name, leaves)


def _parameter(module: _Module, parameters: Mapping[str, Parameter]) -> Parameter | None:
    leaves = ("out_proj.weight",) if module.out else ("weight", "in_proj_weight")
    names = (f"{module.name}.{leaf}" for leaf in leaves)
    return next((p for name in names if (p := parameters.get(name)) and p.product), None)


def _problems(
    path: Path,
    found: Sequence[tuple[_Module, Parameter | None]],
    config: Mapping[str, Any],
    parameters: Mapping[str, Parameter],
) -> Iterator[Problem]:
    if missing := [module.name for module, parameter in found if parameter is None]:
        products = [name for name, parameter in parameters.items() if parameter.product]
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in products if "." in name))
        what = f"not in this model, or nothing that it multiplies by: {_few(missing)}"
        yield Problem(what, did_you_mean(missing[0], owners), str(path))
    for module, parameter in found:
        if parameter and (misfit := _misfit(module, parameter, config)):
            yield Problem(f"{module.name}: {misfit}", "it was made for another model", str(path))


def _misfit(module: _Module, parameter: Parameter, config: Mapping[str, Any]) -> str | None:
    a, b, magnitude = module.tensor("A"), module.tensor("B"), module.tensors.get("lora_magnitude_vector")
    if a is None or b is None or (magnitude is not None) != bool(config.get("use_dora")):
        return f"has {', '.join(module.tensors)} alone"
    outputs, inputs = matrix_shape(parameter.product, parameter.shape)
    rank = _matching(config.get("rank_pattern"), module.name, config.get("r", 8))
    wanted = [(rank, inputs), (outputs, rank)]
    shapes = [(len(factor), math.prod(factor.shape[1:])) for factor in (a, b)]
    if shapes != wanted or (magnitude is not None and magnitude.numel() != outputs):
        return (
            f"factors of {shapes[0]} and {shapes[1]}, {parameter.name} at rank {rank} has {wanted[0]} and {wanted[1]}"
        )
    return None


def _factors(module: _Module, parameter: Parameter, config: Mapping[str, Any]) -> Iterator[Factors]:
    a, b, magnitude = module.tensor("A"), module.tensor("B"), module.tensors.get("lora_magnitude_vector")
    assert a is not None
    assert b is not None
    a, b = a.flatten(1), b.flatten(1) * (OUT_COUNTS if module.out else 1)
    spec = _spec(config, module.name, len(a))
    if parameter.product == "embedding":
        spec = spec.model_copy(update={"dropout": 0.0})
    slots = parameter.slots if len(parameter.slots) > 1 else (None,)
    rows = b.chunk(len(slots))
    sizes = [None] * len(slots) if magnitude is None else magnitude.flatten().chunk(len(slots))
    anywhere = b.any(0)
    for slot, own, size in zip(slots, rows, sizes, strict=True):
        columns = own.any(0) | (~anywhere & a.any(1))  # not yet trained: B is zero, and anybody's
        if size is not None:
            columns = torch.ones_like(columns)
        if columns.any():
            yield Factors.scaled(parameter.name, slot, (a[columns], own[:, columns]), spec, size)


def _spec(config: Mapping[str, Any], module: str, rank: int) -> Lora:
    variant = "dora" if config.get("use_dora") else "lora"
    alpha = float(_matching(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    if config.get("use_rslora"):
        variant, alpha = ("rslora", alpha) if variant == "lora" else (variant, alpha * rank**0.5)
    dropout = float(config.get("lora_dropout", 0.0))
    return Lora.model_validate({"rank": rank, "alpha": alpha, "dropout": dropout, "variant": variant})


def _matching(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """As PEFT reads rank_pattern and alpha_pattern: the first whose pattern is the end of the name."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, default)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
