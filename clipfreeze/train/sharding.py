"""A model split over the ranks (FSDP2): each holds a piece of every weight, gradient and moment.

A block is put together for as long as it works. What is read outside the encoders, and what cannot be cut, stays whole
on each rank: logit scale and bias, a head. Autocast makes its half copies of what trains until backward, as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import distributed, nn

from clipfreeze.anatomy.partition import find_tower
from clipfreeze.anatomy.parts import TOWERS
from clipfreeze.changes import Applied
from clipfreeze.errors import DataError, Problem
from clipfreeze.inject.factor import stand_ins_aside
from clipfreeze.inject.head import ClassHead
from clipfreeze.pieces import in_pieces, piece
from clipfreeze.policy.schema import Optimizer
from clipfreeze.train.distributed import summed, world_size
from clipfreeze.train.settings import TrainingSettings

ELEMENTWISE = ("adadelta", "adagrad", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop", "sgd")
"""Optimizers of torch of which a step looks at each weight alone, by means that pieces have."""


def check_sharding(settings: TrainingSettings, optimizer: Optimizer, accelerator: Any) -> None:
    """DataError for what does not go with a split model."""
    if problems := list(_problems(settings, optimizer, accelerator)):
        raise DataError(problems)


def _problems(settings: TrainingSettings, optimizer: Optimizer, accelerator: Any) -> Iterator[Problem]:
    if world_size() == 1:
        fix = "torchrun --nproc-per-node 2 -m clipfreeze train ..., or leave out shard (--no-shard)"
        yield Problem("shard splits the model over several ranks, and this is the only one", fix)
    elif not _is_new_enough():
        yield Problem(f"shard needs torch 2.7, and this is {torch.__version__}", "install a newer torch")
    if settings.batch_size == "auto":
        yield Problem("batch_size auto does not go with shard: it measures a whole model", "give a number")
    if settings.compile:
        yield Problem("compile does not go with shard", "leave out one of them")
    if accelerator.scaler is not None:
        yield Problem(
            "fp16 does not go with shard: its loss scaling looks at whole gradients", "precision bf16 or fp32"
        )
    if optimizer.name.lower() not in ELEMENTWISE:
        what = f"the optimizer {optimizer.name} does not go with shard: its step may look at whole weights"
        yield Problem(what, f"one of {', '.join(ELEMENTWISE)}")
    if said := [option for option in ("foreach", "fused") if optimizer.options.get(option)]:
        yield Problem(f"the option {said[0]} of {optimizer.name} does not go with shard", "leave it out")


def _is_new_enough() -> bool:
    from torch.distributed import fsdp

    made = vars(fsdp).get("fully_shard")
    return made is not None and "ignored_params" in inspect.signature(made).parameters


def split_model(applied: Applied, device: torch.device) -> None:
    """Cut the model's parameters, wherever they are, in pieces on `device`: block by block, for good.

    To be called by all ranks, with the same values, before there is an optimizer. Parameters keep their names.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = applied.model
    mesh = init_device_mesh(device.type, (world_size(),))
    aside = set(_kept_whole(applied))
    for parameter in aside:
        parameter.data = parameter.data.to(device)
    modules: list[Any] = [*_units(model), model]
    for module in modules:  # the model too is cut again after each forward: others read and write its parameters then
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=aside)
    with stand_ins_aside(model):  # the first gathering reads parameters as attributes
        for module in modules:
            module.unshard()
            module.reshard()
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)
    applied.cut_start_values()


def _units(model: nn.Module) -> list[nn.Module]:
    """What is put together at a time; the rest of the model is as long as one of its encoders works."""
    blocks = [model.get_submodule(block) for tower in TOWERS for block in find_tower(model, tower).blocks]
    decoder = dict(model.named_children()).get("text_decoder")  # never called
    return blocks if decoder is None else [*blocks, decoder]


def _kept_whole(applied: Applied) -> Iterator[nn.Parameter]:
    for name, parameter in applied.model.named_parameters():
        if parameter.ndim == 0 or name in ("logit_scale", "logit_bias"):
            yield parameter
    for _, addition in applied.additions:
        if isinstance(addition, ClassHead):
            yield from addition.parameters()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Over the ranks, of what is whole on each; pieces are averaged in backward."""
    for parameter in parameters:
        if parameter.grad is not None and not in_pieces(parameter):
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> None:
    """As torch's clip_grad_norm_, of all pieces together."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    device = gradients[0].device
    squares = {cut: torch.zeros((), device=device) for cut in (True, False)}
    for gradient in gradients:
        squares[in_pieces(gradient)] += piece(gradient).float().square().sum()
    [cut] = summed([squares[True].item()], device)
    scale = min(1.0, most / ((cut + squares[False].item()) ** 0.5 + 1e-6))
    for gradient in gradients:
        piece(gradient).mul_(scale)
