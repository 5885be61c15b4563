"""A tower cut where the first part at work begins: what stands before runs by itself, the rest goes on from there.

No architecture's forward pass is written down here. The tower's own one runs both times: the first is left when it
reaches the cut; in the second one, parts before the cut hand on what they are given, of a single empty picture, and the
cut puts in its place what the first has made. A projection that is a bare factor, or that is read without being called,
is given what the tower makes with an identity in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipfreeze.anatomy.course import Entry, course_of
from clipfreeze.anatomy.layout import base_in
from clipfreeze.changes import Applied
from clipfreeze.inject.columns import replace_first
from clipfreeze.inject.factor import parameter_of
from clipfreeze.plan.sites import AdapterSite, HeadSite, LoraSite, PromptSite, Site
from clipfreeze.train.blocks import shadowed
from clipfreeze.train.dice import dice_on, throw_again, undrawn

FEATURES = "features"
"""The part that nothing at work precedes: all of the tower is frozen."""


class Encode(Protocol):
    """A tower's (B, D) fp32 features of pictures or ids."""

    def __call__(self, given: Tensor, /, normalize: bool = True) -> Tensor: ...


class GoOn(Protocol):
    """From what the beginning gave, of texts from their ids too, to (B, D) normalised fp32 features."""

    def __call__(self, state: Tensor, ids: Tensor | None = None) -> Tensor: ...


class NoCutError(Exception):
    """The tower has no frozen beginning that runs by itself; why."""


@dataclass
class Prefix:
    """The frozen beginning of a tower, up to `part`, and the rest.

    `reach` gives (B, ...) of what the rest goes on from, and `go_on` the features, normalised, fp32.
    """

    part: str
    reach: Callable[[Tensor], Tensor]
    go_on: GoOn
    before: tuple[str, ...] = ()  # names in the model of what it goes through
    close: Callable[[], None] = lambda: None
    at_projection: bool = False  # what reach gives is pooled


def recomputes(model: nn.Module) -> bool:
    """Whether the model's own gradient checkpointing is on: backward then runs blocks as they are at that time."""
    return any(getattr(module, "grad_checkpointing", False) for module in model.modules())


def tower_input(applied: Applied, tower: str) -> Entry | None:
    """Where in the tower the plan is at work now; None where all of it is frozen. NoCutError where at its input."""
    at_work = applied.plan.trains_in(applied.phase)
    names = [p.name for p in applied.plan.parameters if p.name in at_work or p.dropout is not None]
    way = course_of(applied.model, tower)
    for site in applied.sites:
        names += _places_of(site, tower, way.groups)
    try:
        return way.entry(names)
    except ValueError as error:
        raise NoCutError(f"{error} is at work") from None


def _places_of(site: Site, tower: str, groups: Sequence[tuple[str, ...]]) -> list[str]:
    """Names of what the site works on. A prompt is put in before the first block of vision, into the input of text."""
    if site.tower != tower or isinstance(site, HeadSite):
        return []
    if isinstance(site, LoraSite):
        return [site.parameter]
    if isinstance(site, AdapterSite):
        known = {name for group in groups for name in group}
        last = (groups[-2] or groups[-3])[-1]  # of one behind the tower as a whole, the rest must be called
        return [last if base_in(name, known) is None else name for name in (site.source, site.target)]
    assert isinstance(site, PromptSite)
    return [groups[1 if tower == "vision" else 0][0]]


def find_prefix(applied: Applied, tower: str, encode: Encode, example: Tensor, tolerance: float) -> Prefix:
    """The tower's frozen beginning as it is now, proved on `example`: two pictures, or the ids of two texts.

    `encode` gives normalised fp32 features. NoCutError where there is none.
    """
    entry, model = tower_input(applied, tower), applied.model
    if entry is None:
        names = tuple(name for group in course_of(model, tower).groups for name in group)
        return Prefix(FEATURES, encode, lambda state, ids=None: state, names)
    if recomputes(model):
        raise NoCutError("the model's own gradient checkpointing runs it again in backward")
    device = example.device
    with undrawn(device), torch.no_grad():
        called = _called(model, course_of(model, tower).modules, partial(encode, example))
        begins = next((name for name in called if name in entry.modules), None)
        if begins is None:
            ways = [partial(_at_projection, model, entry, encode)]
        else:
            before = called[: called.index(begins)]
            skipped = [name for name in before if not f"{begins}.".startswith(f"{name}.")]
            ways = [partial(_at_module, model, entry, begins, names, encode, example) for names in (skipped, [])]
        for way in ways:
            prefix = way()
            if _proved(prefix, encode, example, tolerance):
                return prefix
            prefix.close()
    raise NoCutError(f"the forward pass cannot be left at {entry.part}")


def _called(model: nn.Module, names: Iterable[str], run: Callable[[], Any]) -> list[str]:
    """Of the modules of these names those that a forward pass calls, in that order."""
    called: list[str] = []
    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name in names:
            if name in modules:
                add = partial(_note, called, name)
                hooks.callback(modules[name].register_forward_pre_hook(add, with_kwargs=True).remove)
        run()
    return list(dict.fromkeys(called))


def _note(called: list[str], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    called.append(name)


def _proved(prefix: Prefix, encode: Encode, example: Tensor, tolerance: float) -> bool:
    """Whether both halves do what the whole does, dropout included: the beginning draws no random numbers."""
    dice = dice_on(example.device)
    whole = encode(example)
    throw_again(dice, example.device)
    try:
        halves = prefix.go_on(prefix.reach(example), example if example.ndim == 2 else None)
    except (RuntimeError, IndexError, ValueError, AssertionError):  # shapes that do not go on from one empty picture
        return False
    return halves.shape == whole.shape and bool((halves - whole).abs().max() <= tolerance)


@dataclass
class _Cut:
    """The hook before the module at which a tower is cut."""

    batch_axis: int = 0
    stopping: bool = False
    state: Tensor | None = None
    reached: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.stopping:
            self.reached = args[0] if args else next(iter(kwargs.values()))
            raise _ReachedError
        if self.state is None:
            return None
        state = self.state.movedim(0, self.batch_axis)
        return replace_first(args, kwargs, lambda given: state.to(given.dtype))


class _ReachedError(Exception):
    """The forward pass has come to the cut."""


def _at_module(
    model: nn.Module, entry: Entry, begins: str, skipped: Sequence[str], encode: Encode, example: Tensor
) -> Prefix:
    """Cut before the module `begins` is called; `skipped` are those before it that need not run again."""
    cut, empty = _Cut(), torch.zeros_like(example[:1])
    modules = [model.get_submodule(name) for name in skipped]

    def reach(given: Tensor) -> Tensor:
        cut.stopping = True
        try:
            encode(given)
        except _ReachedError:
            pass
        finally:
            cut.stopping = False
        state, cut.reached = cut.reached, None
        assert state is not None
        return state.movedim(cut.batch_axis, 0)

    def go_on(state: Tensor, ids: Tensor | None = None) -> Tensor:
        cut.state = state
        try:
            with _handing_on(modules):
                return encode(empty if ids is None else ids)
        finally:
            cut.state = None

    handle = model.get_submodule(begins).register_forward_pre_hook(cut, with_kwargs=True, prepend=True)
    one, two = reach(example[:1]).shape, reach(example[:2]).shape
    cut.batch_axis = next((axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), 0)
    return Prefix(entry.part, reach, go_on, entry.before, handle.remove)


@contextmanager
def _handing_on(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules give what they are given."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(shadowed(module, {"forward": _first}))
        yield


def _first(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return given


def _at_projection(model: nn.Module, entry: Entry, encode: Encode) -> Prefix:
    """Cut before the product with the tower's last map: a bare factor (in, out), or a Linear that is not called."""
    name, modules = entry.modules[0], dict(model.named_modules())
    if name in modules and not isinstance(modules[name], nn.Linear):
        raise NoCutError(f"{name} is not called as a module")
    path, _, leaf = name.rpartition(".")
    owner = modules[name] if name in modules else model.get_submodule(path)
    weight = parameter_of(model, f"{name}.weight" if name in modules else name)
    size = weight.shape[1 if name in modules else 0]
    identity = torch.eye(size, dtype=weight.dtype, device=weight.device)
    stand_ins: dict[str, Tensor | None] = {"weight": identity, "bias": None} if name in modules else {leaf: identity}

    def reach(given: Tensor) -> Tensor:
        with shadowed(owner, stand_ins):
            return encode(given, normalize=False)

    def go_on(state: Tensor, ids: Tensor | None = None) -> Tensor:
        features = owner(state) if name in modules else state @ getattr(owner, leaf)
        return nn.functional.normalize(features, dim=-1).float()

    return Prefix(name, reach, go_on, entry.before, at_projection=True)
