"""Freezing: no gradients, and modules that stand still."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from clipfreeze.inject.addition import Addition


def set_trainable(model: nn.Module, trainable: Collection[str], undo: ExitStack) -> None:
    """Gradients for the parameters named in `trainable`, for no others."""
    parameters = dict(model.named_parameters())
    undo.callback(_set_flags, model, {name: parameter.requires_grad for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)


def _set_flags(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """By name: what holds a parameter itself keeps its memory, also where it was replaced by a piece of it."""
    for name, parameter in model.named_parameters():
        if name in flags:
            parameter.requires_grad_(flags[name])


def stand_still(model: nn.Module, undo: ExitStack) -> None:
    """Put frozen modules in eval mode, where they stay when somebody calls `model.train()`.

    A module is frozen if it has parameters and none requires a gradient: its dropout, drop-path and buffers rest. What
    a policy added is no part of that: it follows `model.train()` also within a frozen module.
    Batch statistics rest in any case, also where scale and shift of the norm train: fine-tuning batches are small and
    unlike those of pretraining. The undo restores the mode of every module.
    """
    for module in model.modules():
        undo.callback(setattr, module, "training", module.training)
    for addition in _additions(model):
        addition.train(model.training)
    for module in dict.fromkeys(_frozen_modules(model)):
        former = vars(module).get("train")
        if former is None:
            undo.callback(delattr, module, "train")
        else:
            undo.callback(setattr, module, "train", former)
        module.train = partial(_stay_in_eval, module)  # type: ignore[method-assign]
        module.training = False


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    type(module).train(module, False)
    for addition in _additions(module):
        addition.train(mode)
    return module


def _additions(module: nn.Module) -> list[Addition]:
    return [inner for inner in module.modules() if isinstance(inner, Addition)]


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules within a `module` that is not frozen itself."""
    for child in module.children():
        if isinstance(child, Addition):
            continue
        if isinstance(child, _NormBase) or not _follows_training(child, module):
            yield from _own_modules(child)
        else:
            yield from _frozen_modules(child)


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """As `modules()`, without what a policy added."""
    if not isinstance(module, Addition):
        yield module
        for child in module.children():
            yield from _own_modules(child)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for inner in _own_modules(module) for parameter in inner.parameters(recurse=False))


def _follows_training(child: nn.Module, parent: nn.Module) -> bool:
    """Does anything in the child train? One without parameters (dropout, drop-path) goes with what it works on:
    the sibling before it, else its parent's own parameters, else the sibling after it.
    """
    if _has_parameters(child):
        return _trains(child)
    siblings = list(parent.children())
    place = next(index for index, sibling in enumerate(siblings) if sibling is child)
    before = [sibling for sibling in siblings[:place] if _has_parameters(sibling)]
    after = [sibling for sibling in siblings[place:] if _has_parameters(sibling)]
    if before:
        return _trains(before[-1])
    if own := list(parent.parameters(recurse=False)):
        return any(parameter.requires_grad for parameter in own)
    return not after or _trains(after[0])


def _has_parameters(module: nn.Module) -> bool:
    return next(_own_parameters(module), None) is not None


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in _own_parameters(module))
