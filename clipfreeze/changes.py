"""Applying a plan: the only place where a model changes, all or nothing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipfreeze.anatomy.partition import WRAPPERS
from clipfreeze.errors import ApplyError, PlanError, Problem, did_you_mean
from clipfreeze.foreign.reading import is_foreign, read_foreign
from clipfreeze.inject.added import Added, add_sites
from clipfreeze.inject.addition import Addition
from clipfreeze.inject.dropout import drop_inputs, dropout_problems
from clipfreeze.inject.freeze import set_trainable, stand_still
from clipfreeze.inject.init import init_problems, overwrite, start_anew
from clipfreeze.inject.modes import evaluating
from clipfreeze.inject.registry import Tokenizer
from clipfreeze.optim.checks import training_problems
from clipfreeze.optim.groups import param_groups, prove_groups
from clipfreeze.optim.optimizers import build_optimizer
from clipfreeze.optim.phases import PHASE, phase_starts, plan_scheduler, set_groups
from clipfreeze.optim.policy_scheduler import PolicyScheduler
from clipfreeze.optim.state import OptimizerState, load_optimizer_state, optimizer_state
from clipfreeze.optim.step_hooks import Pull, clamp_after_steps, pull_before_steps
from clipfreeze.pieces import cut_like, in_pieces, on_cpu, writes
from clipfreeze.plan.sites import Site, renamed
from clipfreeze.plan.value import Plan, PlannedParameter
from clipfreeze.stored import PLAN, WEIGHTS, digest_of, kind_of, read_plan, read_weights, write_policy

_MARK = "_clipfreeze_policy"
"""Attribute of an applied model: the policy's name. Being no tensor it is in no state_dict."""

_START = "start of "
"""Prefix in the weights file of l2sp start values that the base does not have."""


def apply(plan: Plan, model: nn.Module, *, tokenizer: Tokenizer | None = None) -> Applied:
    """Do to `model` what `plan` says, in place, or nothing at all.

    What is frozen gets no gradient and stands still: in eval mode also after `model.train()`, and so does every
    BatchNorm. With phases the model is in the first one afterwards. Give the bare model; wrap it (DDP, compile) then.
    `tokenizer` is the model's, where words or class names start a prompt or head and its vocabulary is not CLIP's.
    Raises ApplyError when plan and model do not fit, PlanError when the optimizer or a schedule cannot be made.
    """
    _check(plan, model)
    if problems := training_problems(plan):
        raise PlanError(problems)
    return _changed(plan, model, tokenizer, None)


def load(folder: str | Path, model: nn.Module) -> Applied:
    """Apply the plan that `Applied.save` left in `folder` to a fresh copy of its base model, and put in its weights.

    `folder` may also be a LoRA folder of PEFT's or a file of CLIP-LoRA's, which say nothing of their base's weights.
    Raises ApplyError, the model being as it was, when a file is missing or broken, or the model is another one.
    """
    path = Path(folder)
    _refuse_unfit(model)
    if is_foreign(path):
        plan, tensors = read_foreign(path, model)
        saved = _Saved(path, tensors, None, True)
    else:
        plan, saved = read_plan(path / PLAN), _Saved.read(path / WEIGHTS)
    _check(plan, model)
    return _changed(plan, model, None, saved)


class Applied:
    """A plan at work on a model. Made by `apply` and `load`."""

    def __init__(
        self, plan: Plan, model: nn.Module, start: Mapping[str, Tensor], added: Added, held: _Held, undo: ExitStack
    ) -> None:
        self.plan, self.model = plan, model
        self._held, self._undo = held, undo
        self._start = dict(start)
        self._sets = {plan.policy.name: added}
        self._scale = 1.0
        self._removed = False
        self._base: str | None = None

    def __deepcopy__(self, memo: object) -> Applied:
        raise ApplyError(
            "what applies a policy to one model cannot be copied", "copy the model: the copy keeps the policy"
        )

    @property
    def additions(self) -> list[tuple[Site, Addition]]:
        """What the plan added to the model, each with its site."""
        return [(part.site, part.addition) for part in self._own.parts]

    @property
    def sites(self) -> list[Site]:
        """Of all that policies added to the model, this one's and those beside it."""
        return [part.site for added in self._sets.values() for part in added.parts]

    @property
    def _own(self) -> Added:
        return next(iter(self._sets.values()))

    @property
    def phase(self) -> int | None:
        """The phase that the model is in, from 0; None in a run without phases."""
        return self._held.phase

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, in whichever phase, by name, in the plan's order."""
        self._refuse_idle()
        parameters = dict(self.model.named_parameters())
        return {planned.name: parameters[planned.name] for planned in self.plan.trainable}

    def training(self) -> dict[str, nn.Parameter]:
        """Those that train in the phase that the model is in."""
        names = self.plan.trains_in(self.phase)
        return {name: parameter for name, parameter in self.trainable().items() if name in names}

    def optimizer(self) -> torch.optim.Optimizer:
        """The policy's optimizer over the plan's groups, each with its "name", lr and weight decay.

        Its steps keep `clamp`, and add the gradient of `l2sp` first (hence after unscaling and clipping). With phases
        it and the model are in the first, and its groups are those of all phases: what is frozen has lr 0 and no state.
        """
        self._refuse_idle()
        parameters = dict(self.model.named_parameters())
        first = 0 if self.plan.phases else None
        if self.phase != first:
            self._held.move(first)
        optimizer = build_optimizer(self.plan.optimizer, param_groups(self.plan, parameters))
        prove_groups(optimizer, self.plan, parameters, first)
        if first is not None:
            set_groups(optimizer, self.plan, first)
        if pulls := self._pulls():
            self._undo.callback(pull_before_steps(optimizer, pulls).remove)
        bounds = [(parameters[planned.name], planned.clamp) for planned in self.plan.trainable if planned.clamp]
        if bounds:
            self._undo.callback(clamp_after_steps(optimizer, bounds).remove)
        return optimizer

    def phase_starts(self, total_steps: int, steps_per_epoch: int | None = None) -> list[int]:
        """The first step of each phase in a run of `total_steps`; [0] without phases.

        Raises PlanError when a phase would have no steps, or epochs are said and their length is not given.
        """
        return phase_starts(self.plan.phases, total_steps, steps_per_epoch)

    def enter_phase(self, optimizer: torch.optim.Optimizer, index: int) -> None:
        """Go on with a phase, from 0: gradients, modes, lr and weight decay as it has them.

        What is frozen in it has no gradient, no decay and no momentum from now on, and starts afresh should it train
        again. The scheduler of `scheduler()` does this by itself; in the phase already, nothing happens. Between two
        steps only; a DDP wrapper has to be made anew, since it looked at what trains when it was made.
        """
        self._refuse_idle()
        if not 0 <= index < len(self.plan.phases):
            raise ApplyError(f"there is no phase {index}", f"this policy has {len(self.plan.phases)}, from 0")
        if self.phase != index:
            self._held.move(index)
        if any(group.get(PHASE, index) != index for group in optimizer.param_groups):
            set_groups(optimizer, self.plan, index)

    def scheduler(
        self, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: int | None = None
    ) -> PolicyScheduler:
        """The policy's schedules for a run of `total_steps`; step it once after each optimizer step.

        It enters the phases as they begin. `steps_per_epoch` is needed where the policy counts in epochs.
        """

        def enter(phase: int) -> None:
            if self.plan.phases:
                self.enter_phase(optimizer, phase)

        return plan_scheduler(self.plan, optimizer, total_steps, steps_per_epoch, enter)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """All that the optimizer and the run's phase come to, by parameter name; between two steps.

        Its tensors fit a safetensors file, the rest JSON. An OptimizerState of what was read back fits the next method.
        """
        self._refuse_idle()
        tensors, plain = optimizer_state(optimizer, self.trainable())
        return OptimizerState(tensors, plain | {"optimizer": self.plan.optimizer.name, "phase": self.phase})

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
        """Go on where another run of this policy was: in its phase, with its moments and rates, bit for bit.

        Raises ApplyError, nothing being changed, where names or shapes differ.
        """
        self._refuse_idle()
        phase, name = state.plain["phase"], state.plain["optimizer"]
        fix = "resume with the policy and the model it was saved with"
        if name != self.plan.optimizer.name:
            raise ApplyError(f"the state is of the optimizer {name}, and this is {self.plan.optimizer.name}", fix)
        if (phase is None) != (self.phase is None) or (phase or 0) >= max(1, len(self.plan.phases)):
            raise ApplyError("the optimizer's state is of a run with other phases", fix)
        load_optimizer_state(optimizer, self.trainable(), state)
        if phase is not None:
            self.enter_phase(optimizer, phase)

    def penalty(self) -> Tensor:
        """The value of the `l2sp` terms of what trains now, for the log alone: `optimizer()` adds their gradient."""
        device = next(self.model.parameters()).device
        training = (pull.penalty() for pull in self._pulls() if pull.parameter.requires_grad)
        return sum(training, start=torch.zeros((), device=device))

    def _pulls(self) -> tuple[Pull, ...]:
        parameters = dict(self.model.named_parameters())
        return tuple(
            Pull(planned.name, parameters[planned.name], self._start[planned.name], planned.l2sp)
            for planned in self.plan.trainable
            if planned.l2sp
        )

    @contextmanager
    def started(self) -> Iterator[None]:
        """The model in eval mode as it was at the start, for features to anchor to: its own weights have their start
        values, what was added is off. Before a forward, not within one. ApplyError unless the plan has an anchor.
        """
        if not any(self.plan.anchor.model_dump().values()):
            raise ApplyError("start values are kept for an anchor alone", "[anchor] in the policy: vision = 1.0")
        parameters = dict(self.model.named_parameters())
        own = [planned.name for planned in _looked_back_to(self.plan) if planned.origin == "model"]

        def swap() -> None:
            for name in own:
                now = parameters[name].data
                parameters[name].data, self._start[name] = self._start[name].to(now.device), now

        with self.disabled(), evaluating(self.model):
            swap()
            try:
                yield
            finally:
                swap()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without what policies added to it; what they trained of its own stays trained."""
        self._refuse_idle()
        try:
            for added in self._sets.values():
                for part in added.parts:
                    part.addition.set_strength(0.0)
            yield
        finally:
            self._set_strengths()

    @property
    def scale(self) -> float:
        """What `set_scale` said last; 1 before."""
        return self._scale

    def set_scale(self, scale: float) -> None:
        """How much of LoRA and adapters takes effect, 0 (none) to 1; prompts and heads have no scale."""
        if not 0 <= scale <= 1:
            raise ApplyError(f"a scale of {scale:g}", "0 (off) to 1 (in full)")
        self._refuse_idle()
        parts = [part for added in self._sets.values() for part in added.parts]
        if not any(part.addition.scalable for part in parts):
            raise ApplyError("this policy adds nothing that has a scale", "LoRA and adapters have one")
        self._scale = scale
        self._set_strengths()

    def add(self, folder: str | Path, name: str) -> None:
        """Put what another saved policy adds beside what is there, under a name for `activate`; it does not train.

        Both must leave the same base as it is. It starts inactive. Raises ApplyError, the model being as it was.
        """
        self._refuse_idle()
        self._refuse_pieces()
        if not name.isidentifier() or name in self._sets:
            what = f"{name!r} is taken" if name in self._sets else f"{name!r} is no name: letters, digits and _"
            raise ApplyError(what, "give another name")
        if is_foreign(Path(folder)):
            what = f"{folder} is no folder of save()"
            raise ApplyError(what, "clipfreeze.load() it onto a fresh model, and save() it from there")
        plan, saved = read_plan(Path(folder) / PLAN), _Saved.read(Path(folder) / WEIGHTS)
        if own := [planned.name for planned in _changing(plan) if planned.origin == "model"]:
            what = f"the policy in {folder} changes the model's own parameters: {_few(own)}"
            raise ApplyError(what, "only what adds and changes nothing else can stand beside another policy")
        sites = tuple(renamed(site, name) for site in plan.sites)
        with ExitStack() as failed:
            undo = failed.enter_context(ExitStack())
            added = add_sites(sites, self.model, undo, None, fresh=False)
            paths = {new.path: old.path for new, old in zip(sites, plan.sites, strict=True)}
            state = {f"{paths[part.site.path]}.{of}": t for part in added.parts for of, t in _state(part.addition)}
            saved.check(state, plan, self.model)
            _overwrite(state, saved.tensors)
            for part in added.parts:
                part.addition.requires_grad_(False)
                part.addition.train(self.model.training)
            added.weight = 0.0
            self._sets[name] = added
            self._set_strengths()
            self._undo.enter_context(undo.pop_all())
            failed.pop_all()

    def activate(self, *names: str, **weights: float) -> None:
        """Of the policies at work, let these take effect, in full or with a weight of 0 to 1, and no others.

        The first bears its policy's name, others the one given to `add`. Raises ApplyError for an unknown name, and for
        two prompts for one tower.
        """
        self._refuse_idle()
        wanted = dict.fromkeys(names, 1.0) | weights
        for name, weight in wanted.items():
            if name not in self._sets:
                raise ApplyError(f"nothing named {name!r} is at work here", did_you_mean(name, list(self._sets)))
            if not 0 <= weight <= 1:
                raise ApplyError(f"a weight of {weight:g} for {name!r}", "0 (off) to 1 (in full)")
            if 0 < weight < 1 and any(not part.addition.scalable for part in self._sets[name].parts):
                raise ApplyError(f"{name!r} has prompts or a head, which cannot be weighted", "0 or 1")
        on = [part.site for name, weight in wanted.items() if weight for part in self._sets[name].parts]
        prompted = [site.tower for site in on if site.kind == "prompt"]
        if len(prompted) > len(set(prompted)):
            raise ApplyError(f"two prompts for the {prompted[0]} tower", "activate one of them")
        for name, added in self._sets.items():
            added.weight = wanted.get(name, 0.0)
        self._set_strengths()

    def merge(self) -> float:
        """Put LoRA into the weights it stands beside: the model has its first classes and keys again.

        Returns the largest change of a feature on a probe batch, relative to the largest feature: rounding alone.
        Raises ApplyError, nothing being merged, for what cannot be merged (adapters, prompts, heads), and where the
        weights' own type is too coarse. The optimizer waits until `unmerge`, which restores every bit.
        """
        self._refuse_idle()
        self._refuse_pieces()
        if len(self._sets) > 1:
            raise ApplyError(f"several policies are at work: {', '.join(self._sets)}", "merge with one on the model")
        if not self._own.parts:
            raise ApplyError("this policy adds nothing to merge", "remove() takes it off, what it trained stays")
        before = _probe(self.plan, self.model)
        self._own.merge(self.model)
        with ExitStack() as failed:
            failed.callback(self._own.unmerge, self.model)
            change = _change(before, _probe(self.plan, self.model))
            bound = max(torch.finfo(value.dtype).eps for value in self._own.merged.values()) ** 0.5
            if not change <= bound:  # nan is in no order
                what = f"merging changes features by {change:.2g} of the largest, above {bound:.2g}"
                raise ApplyError(what, "load the model in fp32: its weights' type is too coarse for what was learned")
            failed.pop_all()
        return change

    def unmerge(self) -> None:
        """Undo `merge`: the weights as they were, bit for bit, LoRA beside them. Raises ApplyError if not merged."""
        self._refuse_removed()
        if not self._own.merged:
            raise ApplyError("nothing is merged", "merge() first")
        self._own.unmerge(self.model)

    def _refuse_removed(self) -> None:
        if self._removed:
            raise ApplyError("the policy was removed from this model", "apply it again")

    def _refuse_idle(self) -> None:
        """ApplyError unless what was added stands in the model."""
        self._refuse_removed()
        if self._own.merged:
            raise ApplyError("the policy is merged into the weights", "unmerge() first")

    def _set_strengths(self) -> None:
        for added in self._sets.values():
            added.set_strengths(self._scale)

    def _refuse_pieces(self) -> None:
        """ApplyError where the ranks hold a piece of each weight."""
        if any(map(in_pieces, self.model.parameters())):
            fix = "save() it on all ranks, and clipfreeze.load() that onto a whole model"
            raise ApplyError("the model is split over the ranks", fix)

    def remove(self) -> None:
        """Take the policy off: what it added, flags, modes, hooks, attributes. Weights stay as trained, or merged."""
        self._refuse_pieces()
        self._undo.close()
        self._removed = True

    def save(self, folder: str | Path) -> None:
        """Write the plan and the tensors that it changes and adds, for `load`; a file appears whole or not at all.

        Of a model in pieces all ranks call this, and rank 0 writes. Raises RunError in the system's words where it
        cannot be written.
        """
        self._refuse_idle()
        parameters = dict(self.model.named_parameters())
        tensors = {planned.name: parameters[planned.name].detach() for planned in _changing(self.plan)}
        tensors |= {name: tensor.detach() for name, tensor in self._own.state().items()}
        tensors |= {_START + name: self._start[name] for name in _restarted(self.plan)}
        self._base = self._base or _fingerprint(self.plan, self.model)  # what it is of never changes
        copies = on_cpu(tensors)
        if writes(parameters.values()):
            write_policy(Path(folder), self.plan, copies, self._base)

    def cut_start_values(self) -> None:
        """To be called when the model's parameters were cut in pieces: what `l2sp` pulls to is cut likewise."""
        parameters = dict(self.model.named_parameters())
        self._start = {name: cut_like(start, parameters[name]) for name, start in self._start.items()}


@dataclass(frozen=True)
class _Saved:
    """A file of weights; one of other tools does not say of which base."""

    path: Path
    tensors: dict[str, Tensor]
    base: str | None
    whole: bool

    @classmethod
    def read(cls, path: Path) -> _Saved:
        return cls(path, *read_weights(path))

    def check(self, wanted: Mapping[str, Tensor], plan: Plan, model: nn.Module) -> None:
        """ApplyError unless these are the tensors wanted, whole, and of this model, which is still as it was."""
        kinds, found = ({name: kind_of(tensor) for name, tensor in group.items()} for group in (wanted, self.tensors))
        if kinds != found:
            what = f"{self.path} does not fit its plan: {'; '.join(_differences(kinds, found))}"
            raise ApplyError(what, "save it again")
        if not self.whole:
            raise ApplyError(f"{self.path} is damaged: its weights are not those that were saved", "save it again")
        if self.base is not None and self.base != _fingerprint(plan, model):
            what = "the weights that do not train are not those that this policy was trained on"
            fix = "load the same pretrained weights first; make random ones after the same torch.manual_seed"
            raise ApplyError(f"{self.path} belongs to another base model: {what}", fix)


@dataclass
class _Held:
    """Gradients and modes as a phase has them; `undo` takes them back."""

    plan: Plan
    model: nn.Module
    undo: ExitStack
    phase: int | None = None

    def hold(self, phase: int | None) -> None:
        """For the first time; None holds for all phases."""
        set_trainable(self.model, self.plan.trains_in(phase), self.undo)
        stand_still(self.model, self.undo)
        self.phase = phase

    def move(self, phase: int | None) -> None:
        """On to another phase, in the mode that the model is in."""
        mode = self.model.training
        self.undo.close()
        self.hold(phase)
        self.model.train(mode)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
        _forget_compiled()


def _changed(plan: Plan, model: nn.Module, tokenizer: Tokenizer | None, saved: _Saved | None) -> Applied:
    """The transaction. Without a saved policy's weights the parameters start as the plan says."""
    own = [planned for planned in plan.parameters if planned.origin == "model"]
    new = [planned for planned in plan.parameters if planned.origin != "model"]
    with ExitStack() as failed:
        if saved is None:
            start_anew(own, model, failed)
        undo = failed.enter_context(ExitStack())
        vars(model)[_MARK] = plan.policy.name
        undo.callback(vars(model).pop, _MARK)
        added = add_sites(plan.sites, model, undo, tokenizer, fresh=saved is None)
        if saved is None:
            start_anew(new, model, failed)
        start = _copies(plan, model)
        if saved is not None:
            parameters = dict(model.named_parameters())
            changing = {planned.name: parameters[planned.name] for planned in _changing(plan)} | added.state()
            saved.check(changing | {_START + name: start[name] for name in _restarted(plan)}, plan, model)
            start |= {name: saved.tensors[_START + name] for name in _restarted(plan)}
            overwrite(model, {planned.name: saved.tensors[planned.name] for planned in _changing(plan)}, failed)
            _overwrite(added.state(), saved.tensors)
        held = _Held(plan, model, undo.enter_context(ExitStack()))
        held.hold(0 if plan.phases else None)
        drop_inputs(plan.parameters, model, undo)
        _forget_compiled()
        undo.callback(_forget_compiled)
        applied = Applied(plan, model, start, added, held, undo)
        _warn_of_clamps(plan, model)
        failed.pop_all()
    return applied


def _forget_compiled() -> None:
    """torch.compile keeps code by class and does not look at hooks: without this, code of another model would serve."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _state(addition: Addition) -> Iterator[tuple[str, Tensor]]:
    yield from addition.state_dict(keep_vars=True).items()


def _overwrite(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(values[name])


def _fingerprint(plan: Plan, model: nn.Module) -> str:
    """Of all that the plan leaves as it is, buffers too, and without what policies added."""
    parameters = dict(model.named_parameters())
    leave_out = {id(parameters[planned.name]) for planned in _changing(plan) if planned.name in parameters}
    for module in model.modules():
        if isinstance(module, Addition):
            leave_out |= {id(tensor) for _, tensor in _state(module)}
    state = model.state_dict(keep_vars=True)
    return digest_of({name: tensor for name, tensor in state.items() if id(tensor) not in leave_out})


@torch.no_grad()
def _probe(plan: Plan, model: Any) -> list[Tensor]:
    """Features of two images of noise and two made-up texts, in eval mode; modes are left as they were."""
    size, length = model.visual.image_size, model.context_length or 8
    height, width = (size, size) if isinstance(size, int) else size
    at = model.logit_scale.device
    weight = next(tensor for tensor in model.visual.parameters() if tensor.ndim > 1)
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(at, weight.dtype)
    vocabulary = max(planned.shape[0] for planned in plan.parameters if planned.role == "text.embed")
    texts = torch.zeros(2, length, dtype=torch.long, device=at)
    texts[0, :4] = torch.tensor([vocabulary - 2, 5, 6, vocabulary - 1])
    texts[1, :3] = torch.tensor([vocabulary - 2, 7, vocabulary - 1])
    with evaluating(model):
        return [model.encode_image(images).float(), model.encode_text(texts).float()]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value."""
    shares = [(a - b).abs().max() / b.abs().max() for b, a in zip(before, after, strict=True)]
    return torch.stack(shares).max().item()  # nan if one is


def _copies(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """The start values that training looks back to."""
    parameters = dict(model.named_parameters())
    return {planned.name: parameters[planned.name].detach().clone() for planned in _looked_back_to(plan)}


def _looked_back_to(plan: Plan) -> list[PlannedParameter]:
    """What l2sp pulls; with an anchor all that trains of the model's own."""
    anchored = any(plan.anchor.model_dump().values())
    return [planned for planned in plan.trainable if planned.l2sp or (anchored and planned.origin == "model")]


def _changing(plan: Plan) -> list[PlannedParameter]:
    """What the plan changes: what trains, and what starts anew."""
    return [planned for planned in plan.parameters if planned.trainable or planned.init is not None]


def _restarted(plan: Plan) -> set[str]:
    """Start values that are not the base's."""
    back = _looked_back_to(plan)
    return {planned.name for planned in back if planned.init is not None or planned.origin != "model"}


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


def _refuse_unfit(model: nn.Module) -> None:
    """ApplyError for a model in a wrapper, or with a policy on it."""
    for path, module in model.named_modules(prefix="model"):
        if [name for name, _ in module.named_children()] in [[wrapper] for wrapper in WRAPPERS]:
            raise ApplyError(f"{path} is wrapped in {type(module).__name__}", "apply to the bare model, then wrap it")
    if (name := vars(model).get(_MARK)) is not None:
        raise ApplyError(
            f"the policy {name!r} is applied to this model already",
            "call remove() on what apply returned (applied.remove()); a copy of an applied model keeps the policy",
        )


def _check(plan: Plan, model: nn.Module) -> None:
    """ApplyError unless the plan can be applied to this model."""
    _refuse_unfit(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    planned = {parameter.name: parameter.shape for parameter in plan.parameters if parameter.origin == "model"}
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
    own = [planned.name for planned in plan.trainable if planned.origin == "model"]
    half = [name for name in own if parameters[name].dtype in (torch.float16, torch.bfloat16)]
    if half:
        what = f"{_few(half)} would train in {str(parameters[half[0]].dtype).removeprefix('torch.')}"
        fix = "load the model in fp32 and let autocast do the rest"
        yield Problem(f"{what}: small steps round to nothing, and Adam turns them to nan", fix)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
