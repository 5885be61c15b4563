"""What tests of applied models share: policies from text, features, a few steps, and all that must come back."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.changes import Applied
from clipfreeze.plan.build import resolve
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import load_policy

import tiny

SGD = '[optimizer]\nname = "sgd"\nlr = 0.01\n'


def made(family: str = "clip_vit", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tiny.FAMILIES[family]()


def planned(model: nn.Module, folder: Path, text: str) -> Plan:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return resolve(load_policy(path), model)


def features(model: nn.Module) -> tuple[Tensor, Tensor]:
    return model.encode_image(tiny.images(model)), model.encode_text(tiny.tokens(model))


def loss_of(model: nn.Module) -> Tensor:
    image, text = (functional.normalize(feature, dim=-1) for feature in features(model))
    logits = model.logit_scale.exp() * image @ text.T
    loss = functional.cross_entropy(logits, torch.arange(len(logits)))
    return loss + model.head(image).square().mean() if "head" in dict(model.named_children()) else loss


def train(applied: Applied, steps: int = 2) -> None:
    optimizer = applied.optimizer()
    applied.model.train()
    for _ in range(steps):
        loss_of(applied.model).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def picture(model: nn.Module) -> list[tuple]:
    """All that applying may touch besides weights: flags, modes, attributes and hooks of every module."""
    found: list[tuple] = [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        attributes = {key: str(value) for key, value in vars(module).items() if key not in ("_parameters", "_modules")}
        found.append((name, type(module), module.training, attributes))
    return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert not moved
