"""The parts of vision towers: open_clip's own ViT and ResNet, and timm trunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from clipfreeze.anatomy.layout import Block, Layout, has_parameters, is_norm, numbered, own_parameters
from clipfreeze.errors import ModelError

STAGES = ("layer1", "layer2", "layer3", "layer4")
BLOCK_CONTAINERS = ("blocks", "stages", "layers", *STAGES)
"""Children of a trunk that hold blocks, or stages of them."""

CLASSIFIERS = ("head", "fc", "classifier")
"""Last children of a timm trunk: its own classifier, which open_clip uses as projection where it asks for no other."""


def vision_transformer(tower: nn.Module) -> Layout:
    """open_clip's ViT, CoCa's attentional poolers included."""
    return Layout(
        embed=("conv1", "class_embedding", "positional_embedding", "ln_pre"),
        blocks=numbered(tower.get_submodule("transformer.resblocks"), "transformer.resblocks"),
        norm=("ln_post",),
        pool=("attn_pool", "attn_pool_contrastive"),
        proj=("proj",),
    )


def modified_resnet(tower: nn.Module) -> Layout:
    """OpenAI's ResNet: three stem convolutions, four stages, attention pooling that ends in the projection."""
    stages = [(name, tower.get_submodule(name)) for name in STAGES]
    return Layout(
        embed=("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"),
        blocks=tuple(_staged_blocks(stages)),
        pool=("attnpool",),
        proj=("attnpool.c_proj",),
    )


def timm_model(tower: nn.Module) -> Layout:
    """Any timm trunk whose blocks lie in one container, and open_clip's head on it.

    timm registers children in the order they run: what comes before the blocks is input, what comes after them is
    normalisation, classifier or pooling. Parameters of the trunk itself are tokens and position embeddings.
    """
    trunk = tower.get_submodule("trunk")
    children = [(name, child) for name, child in trunk.named_children() if has_parameters(child)]
    names = [name for name, _ in children]
    containers = [name for name in names if name in BLOCK_CONTAINERS]
    if not containers:
        raise ModelError(
            f"the blocks of timm's {type(trunk).__name__} lie in none of {', '.join(BLOCK_CONTAINERS)}",
            "use a trunk with such a child: ViT, EVA, ConvNeXt, Swin, FastViT, ViTamin, ResNet, ...",
        )
    start, end = names.index(containers[0]), names.index(containers[-1]) + 1
    norm: list[str] = []
    pool: list[str] = []
    proj: list[str] = []
    for name, child in children[end:]:
        if is_norm(child):
            norm.append(name)
        elif name in CLASSIFIERS:
            proj.append(name)
            norm.extend(f"{name}.{part}" for part, module in child.named_children() if is_norm(module))
        else:
            pool.append(name)
    return _with_head(
        Layout(
            embed=own_parameters(trunk) + tuple(names[:start]),
            blocks=tuple(_trunk_blocks(children[start:end])),
            norm=tuple(norm),
            pool=tuple(pool),
            proj=tuple(proj),
        ).within("trunk."),
        tower.get_submodule("head"),
    )


VISION_LAYOUTS: dict[type[nn.Module], Callable[[nn.Module], Layout]] = {
    VisionTransformer: vision_transformer,
    ModifiedResNet: modified_resnet,
    TimmModel: timm_model,
}


def vision_name(tower: nn.Module) -> str:
    """What people call it."""
    if isinstance(tower, TimmModel):
        return f"timm {tower.trunk.default_cfg['architecture']}"
    return type(tower).__name__


def _with_head(trunk: Layout, head: nn.Module) -> Layout:
    """Add what open_clip puts on a timm trunk: an attention pool, a projection; the pool alone ends in a projection."""
    parts = [name for name, child in head.named_children() if has_parameters(child)]
    proj = tuple(f"head.{name}" for name in parts if name != "pool")
    pool = ("head.pool",) if "pool" in parts else ()
    if pool and not proj:
        proj = ("head.pool.proj",)
    return Layout(trunk.blocks, trunk.embed, trunk.norm, trunk.pool + pool, trunk.proj + proj)


def _trunk_blocks(containers: list[tuple[str, nn.Module]]) -> Iterator[Block]:
    if len(containers) > 1:
        yield from _staged_blocks(containers)
        return
    [(name, container)] = containers
    children = [(f"{name}.{child}", module) for child, module in container.named_children()]
    if any(_blocks_of(module) for _, module in children):
        yield from _staged_blocks(children)
    else:
        yield from (Block(child) for child, _ in children)


def _staged_blocks(stages: list[tuple[str, nn.Module]]) -> Iterator[Block]:
    for stage, (name, module) in enumerate(stages):
        prefix = name if isinstance(module, nn.Sequential) else f"{name}.blocks"
        also = tuple(f"{name}.{child}" for child, _ in module.named_children()) if prefix != name else ()
        for child, _ in _blocks_of(module):
            yield Block(f"{prefix}.{child}", stage, tuple(part for part in also if part != prefix))
            also = ()


def _blocks_of(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a stage, which is a plain sequence of them or has them under `blocks`; of a block, none."""
    children = dict(stage.named_children())
    holder = stage if isinstance(stage, nn.Sequential) else children.get("blocks")
    return list(holder.named_children()) if holder is not None else []
