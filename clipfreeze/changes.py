"""Applying a plan: the only place where a model changes, all or nothing."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from clipfreeze.anatomy.partition import WRAPPERS
from clipfreeze.errors import ApplyError, PlanError, Problem, RunError
from clipfreeze.inject.dropout import drop_inputs, dropout_problems
from clipfreeze.inject.freeze import set_trainable, stand_still
from clipfreeze.inject.init import init_problems, overwrite, start_anew
from clipfreeze.optim.checks import training_problems
from clipfreeze.optim.groups import param_groups, prove_groups
from clipfreeze.optim.optimizers import build_optimizer
from clipfreeze.optim.schedules import build_scheduler
from clipfreeze.optim.step_hooks import Pull, clamp_after_steps, pull_before_steps
from clipfreeze.plan.value import Plan, PlannedParameter

_MARK = "_clipfreeze_policy"
"""Attribute of an applied model: the policy's name. Being no tensor it is in no state_dict."""

PLAN, WEIGHTS = "plan.json", "weights.safetensors"
_DIGESTS = "sha256 of the base and of these weights"
"""One entry of metadata, since safetensors writes several in any order."""
_START = "start of "
"""Prefix in the weights file of l2sp start values that the base does not have."""


def apply(plan: Plan, model: nn.Module) -> Applied:
    """Do to `model` what `plan` says, in place, or nothing at all.

    What is frozen gets no gradient and stands still: in eval mode also after `model.train()`, and so does every
    BatchNorm. Give the bare model; wrap it (DDP, compile) afterwards. Raises ApplyError when plan and model do not
    fit, PlanError when the optimizer or schedule cannot be made.
    """
    _check(plan, model)
    dims = {len(planned.shape) for planned in plan.trainable}
    wrong = training_problems(plan.optimizer, plan.schedule, any(group.schedule for group in plan.groups), dims)
    if problems := [problem for section in wrong for problem in section]:
        raise PlanError(problems)
    return _changed(plan, model, None)


def load(folder: str | Path, model: nn.Module) -> Applied:
    """Apply the plan that `Applied.save` left in `folder` to a fresh copy of its base model, and put in its weights.

    Raises ApplyError, the model being as it was, when a file is missing or broken, or the model is another one.
    """
    plan = _read_plan(Path(folder) / PLAN)
    _check(plan, model)
    return _changed(plan, model, _read_weights(Path(folder) / WEIGHTS, plan, model))


class Applied:
    """A plan at work on a model. Made by `apply` and `load`."""

    def __init__(self, plan: Plan, model: nn.Module, start: Mapping[str, Tensor], undo: ExitStack) -> None:
        self.plan, self.model = plan, model
        self._undo = undo
        self._start = dict(start)

    def __deepcopy__(self, memo: object) -> Applied:
        raise ApplyError(
            "what applies a policy to one model cannot be copied", "copy the model: the copy keeps the policy"
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name, in the model's order."""
        parameters = dict(self.model.named_parameters())
        return {planned.name: parameters[planned.name] for planned in self.plan.trainable}

    def optimizer(self) -> torch.optim.Optimizer:
        """The policy's optimizer over the plan's groups, each with its "name", lr and weight decay.

        Its steps keep `clamp`, and add the gradient of `l2sp` first (hence after unscaling and clipping).
        """
        if _MARK not in vars(self.model):
            raise ApplyError("the policy was removed from this model", "apply it again")
        parameters = dict(self.model.named_parameters())
        optimizer = build_optimizer(self.plan.optimizer, param_groups(self.plan, parameters))
        prove_groups(optimizer, self.plan, parameters)
        if pulls := self._pulls():
            self._undo.callback(pull_before_steps(optimizer, pulls).remove)
        bounds = [(parameters[planned.name], planned.clamp) for planned in self.plan.trainable if planned.clamp]
        if bounds:
            self._undo.callback(clamp_after_steps(optimizer, bounds).remove)
        return optimizer

    def scheduler(
        self, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: int | None = None
    ) -> LRScheduler:
        """The policy's schedule for a run of `total_steps`; step it once after each optimizer step.

        `steps_per_epoch` is needed where the policy counts its warmup in epochs.
        """
        by_group = {group.name: group.schedule for group in self.plan.groups if group.schedule}
        return build_scheduler(self.plan.schedule, optimizer, total_steps, steps_per_epoch, by_group)

    def penalty(self) -> Tensor:
        """The value of all `l2sp` terms, for the log: `optimizer()` adds their gradient, so keep it out of the loss."""
        device = next(self.model.parameters()).device
        return sum((pull.penalty() for pull in self._pulls()), start=torch.zeros((), device=device))

    def _pulls(self) -> tuple[Pull, ...]:
        parameters = dict(self.model.named_parameters())
        return tuple(
            Pull(planned.name, parameters[planned.name], self._start[planned.name], planned.l2sp)
            for planned in self.plan.trainable
            if planned.l2sp
        )

    def remove(self) -> None:
        """Take the policy off: flags, modes, hooks and attributes as before it. Weights stay as trained."""
        self._undo.close()

    def save(self, folder: str | Path) -> None:
        """Write the plan and the weights that it changes, for `load`; each file appears whole or not at all.

        Raises RunError in the system's words where it cannot be written.
        """
        folder = Path(folder)
        parameters = dict(self.model.named_parameters())
        tensors = {planned.name: parameters[planned.name].detach() for planned in _changing(self.plan)}
        tensors |= {_START + name: self._start[name] for name in _restarted(self.plan)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with _saving(folder / WEIGHTS) as unfinished:
            digests = f"{_fingerprint(self.plan, self.model)} {_digest(tensors)}"
            save_file(tensors, unfinished, {_DIGESTS: digests})
        with _saving(folder / PLAN) as unfinished:
            unfinished.write_text(self.plan.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _changed(plan: Plan, model: nn.Module, weights: Mapping[str, Tensor] | None) -> Applied:
    """The transaction. `weights` are a saved policy's; without them the parameters start as the plan says."""
    with ExitStack() as failed:
        if weights is None:
            start_anew(plan.parameters, model, failed)
            start = _copies(plan, model)
        else:
            start = _copies(plan, model) | {
                name.removeprefix(_START): value for name, value in weights.items() if name.startswith(_START)
            }
            overwrite(model, {name: value for name, value in weights.items() if not name.startswith(_START)}, failed)
        undo = failed.enter_context(ExitStack())
        vars(model)[_MARK] = plan.policy.name
        undo.callback(vars(model).pop, _MARK)
        set_trainable(model, {planned.name for planned in plan.trainable}, undo)
        stand_still(model, undo)
        drop_inputs(plan.parameters, model, undo)
        applied = Applied(plan, model, start, undo)
        _warn_of_clamps(plan, model)
        failed.pop_all()
    return applied


def _copies(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """The values that l2sp pulls to."""
    parameters = dict(model.named_parameters())
    return {planned.name: parameters[planned.name].detach().clone() for planned in plan.trainable if planned.l2sp}


def _changing(plan: Plan) -> list[PlannedParameter]:
    """What the plan changes: what trains, and what starts anew."""
    return [planned for planned in plan.parameters if planned.trainable or planned.init is not None]


def _restarted(plan: Plan) -> set[str]:
    """What l2sp pulls to values that are not the base's."""
    return {planned.name for planned in plan.trainable if planned.l2sp and planned.init is not None}


def _warn_of_clamps(plan: Plan, model: nn.Module) -> None:
    """A clamp moves nothing before the first step: applying changes no output."""
    parameters = dict(model.named_parameters())
    outside = [
        f"{planned.name} to {list(planned.clamp)}"
        for planned in plan.trainable
        if planned.clamp and not _within(parameters[planned.name], *planned.clamp)
    ]
    if outside:
        warnings.warn(f"the first step will clamp {', '.join(outside)}: it starts outside", stacklevel=4)


def _within(tensor: Tensor, low: float, high: float) -> bool:
    return bool(((tensor >= low) & (tensor <= high)).all())


def _check(plan: Plan, model: nn.Module) -> None:
    """ApplyError unless the plan can be applied to this model."""
    for path, module in model.named_modules(prefix="model"):
        if [name for name, _ in module.named_children()] in [[wrapper] for wrapper in WRAPPERS]:
            raise ApplyError(f"{path} is wrapped in {type(module).__name__}", "apply to the bare model, then wrap it")
    if (name := vars(model).get(_MARK)) is not None:
        raise ApplyError(
            f"the policy {name!r} is applied to this model already",
            "call remove() on what apply returned (applied.remove()); a copy of an applied model keeps the policy",
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    planned = {parameter.name: parameter.shape for parameter in plan.parameters}
    if shapes != planned:
        raise ApplyError(
            f"the plan is for another model ({plan.model.name}): {'; '.join(_differences(planned, shapes))}",
            "resolve the policy against this model",
        )
    problems = [
        *_dtype_problems(plan, model),
        *init_problems(plan.parameters),
        *dropout_problems(plan.parameters, model),
    ]
    if problems:
        raise ApplyError(problems)


def _differences(planned: Mapping[str, object], found: Mapping[str, object]) -> Iterator[str]:
    if missing := [name for name in planned if name not in found]:
        yield f"missing {_few(missing)}"
    if extra := [name for name in found if name not in planned]:
        yield f"unknown {_few(extra)}"
    if other := [
        f"{name} is {found[name]}, not {planned[name]}"
        for name in planned
        if planned[name] != found.get(name, planned[name])
    ]:
        yield _few(other)


def _dtype_problems(plan: Plan, model: nn.Module) -> Iterator[Problem]:
    parameters = dict(model.named_parameters())
    if meta := [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]:
        yield Problem(f"the model has no weights: {_few(meta)} on the meta device", "load it on a real device")
    half = [p.name for p in plan.trainable if parameters[p.name].dtype in (torch.float16, torch.bfloat16)]
    if half:
        what = f"{_few(half)} would train in {str(parameters[half[0]].dtype).removeprefix('torch.')}"
        fix = "load the model in fp32 and let autocast do the rest"
        yield Problem(f"{what}: small steps round to nothing, and Adam turns them to nan", fix)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ApplyError(f"cannot read {path}: {error.strerror}", "give a folder that save() wrote") from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
        raise ApplyError(f"{path} is no plan of this version: {first}", "save it again") from error


def _read_weights(path: Path, plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """The saved tensors, once they are known to fit the model."""
    try:
        with safe_open(path, "pt") as file:
            base, _, whole = (file.metadata() or {}).get(_DIGESTS, "").partition(" ")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as error:
        raise ApplyError(f"cannot read {path}: {error}", "give a folder that save() wrote whole") from error
    parameters = dict(model.named_parameters())
    expected = {planned.name: parameters[planned.name] for planned in _changing(plan)}
    expected |= {_START + name: parameters[name] for name in _restarted(plan)}
    wanted, found = ({name: _kind(t) for name, t in group.items()} for group in (expected, tensors))
    if wanted != found:
        raise ApplyError(f"{path} does not fit its plan: {'; '.join(_differences(wanted, found))}", "save it again")
    if whole != _digest(tensors):
        raise ApplyError(f"{path} is damaged: its weights are not those that were saved", "save it again")
    if base != _fingerprint(plan, model):
        what = "the weights that do not train are not those that this policy was trained on"
        fix = "load the same pretrained weights first; make random ones after the same torch.manual_seed"
        raise ApplyError(f"{path} belongs to another base model: {what}", fix)
    return tensors


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _fingerprint(plan: Plan, model: nn.Module) -> str:
    """Of all that the plan leaves as it is, buffers too."""
    parameters = dict(model.named_parameters())
    changing = {id(parameters[planned.name]) for planned in _changing(plan)}
    state = model.state_dict(keep_vars=True)
    return _digest({name: tensor for name, tensor in state.items() if id(tensor) not in changing})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {_kind(tensor)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once it is whole."""
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors lets only the owner read
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def _saving(path: Path) -> Iterator[Path]:
    """A whole file in a folder that may have to be made; a failure is a RunError in the system's words."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            yield unfinished
    except (OSError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(f"cannot write {path}: {what}", "make room, or give another folder") from error
