"""The parts of text towers: open_clip's own transformer, and Hugging Face encoders."""

from __future__ import annotations

from collections.abc import Callable

from open_clip import CLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import nn

from clipfreeze.anatomy.layout import Layout, has_parameters, is_norm, numbered, own_parameters
from clipfreeze.errors import ModelError


def text_transformer(tower: nn.Module) -> Layout:
    """open_clip's text transformer; in the class `CLIP` its parts lie at the top level of the model itself."""
    return Layout(
        embed=("token_embedding", "positional_embedding", "cls_emb"),
        blocks=numbered(tower.get_submodule("transformer.resblocks"), "transformer.resblocks"),
        norm=("ln_final",),
        proj=("text_projection",),
    )


def hugging_face(tower: nn.Module) -> Layout:
    """Any Hugging Face encoder (BERT, RoBERTa, T5, M2M100, ...) with open_clip's projection of one or two layers.

    Its blocks are the outermost list of modules. Children are registered in the order they run, at each level on the
    way there: before the list is input, after it normalisation or pooling. Embeddings are input wherever they stand.
    """
    encoder = tower.get_submodule("transformer")
    stack = _outermost_list(encoder)
    embed: list[str] = []
    norm: list[str] = []
    pool: list[str] = []
    path, level = "", encoder
    for step in stack.split("."):
        embed += [path + name for name in own_parameters(level)]
        before = True
        for name, child in level.named_children():
            if name == step:
                before = False
            elif has_parameters(child):
                part = embed if before or isinstance(child, nn.Embedding) else norm if is_norm(child) else pool
                part.append(path + name)
        path, level = f"{path}{step}.", level.get_submodule(step)
    encoder_layout = Layout(numbered(level, stack), tuple(embed), tuple(norm), tuple(pool)).within("transformer.")
    return Layout(encoder_layout.blocks, encoder_layout.embed, encoder_layout.norm, encoder_layout.pool, ("proj",))


TEXT_LAYOUTS: dict[type[nn.Module], Callable[[nn.Module], Layout]] = {
    CLIP: text_transformer,
    TextTransformer: text_transformer,
    HFTextEncoder: hugging_face,
}


def text_name(tower: nn.Module) -> str:
    """What people call it; nothing for open_clip's own."""
    return f"Hugging Face {type(tower.transformer).__name__}" if isinstance(tower, HFTextEncoder) else ""


def _outermost_list(encoder: nn.Module) -> str:
    lists: list[str] = [
        name for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise ModelError(f"the Hugging Face encoder {type(encoder).__name__} has no list of blocks")
    return min(lists, key=_depth)


def _depth(name: str) -> int:
    return name.count(".")
