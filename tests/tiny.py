"""Tiny models of every family open_clip builds, made in milliseconds and without a download.

`FAMILIES` maps a name to a function that builds the model: CPU, float32, in train mode, random weights from the
global generator (seed it first). Every model takes `images(model)` and `tokens(model)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from timm.models import register_model
from timm.models.convnext import convnext_tiny
from timm.models.eva import eva02_base_patch16_clip_224, vit_pe_core_tiny_patch16_384
from timm.models.fastvit import fastvit_mci0
from timm.models.swin_transformer import swin_tiny_patch4_window7_224
from timm.models.vision_transformer import vit_base_patch16_siglip_224
from timm.models.vision_transformer_hybrid import ConvStem, _create_vision_transformer_hybrid
from timm.models.vision_transformer_relpos import vit_relpos_medium_patch16_cls_224
from timm.models.vitamin import VitCfg, VitConvCfg, vitamin_small_224
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    M2M100Config,
    MT5Config,
    PretrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

EMBED_DIM = 16
VOCABULARY = 64
CONTEXT = 16

VISION: dict[str, Any] = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64}
TEXT: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 3}
SIGLIP_TEXT: dict[str, Any] = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}


@register_model
def tiny_convnext(**kwargs: Any) -> nn.Module:
    return convnext_tiny(**{"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), **kwargs})


@register_model
def tiny_swin(**kwargs: Any) -> nn.Module:
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 2), "num_heads": (1, 2, 2)}
    return swin_tiny_patch4_window7_224(**{**sizes, **kwargs})


@register_model
def tiny_siglip(**kwargs: Any) -> nn.Module:
    return vit_base_patch16_siglip_224(**{"img_size": 32, "embed_dim": EMBED_DIM, "depth": 3, "num_heads": 2, **kwargs})


@register_model
def tiny_eva(**kwargs: Any) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "ref_feat_shape": (2, 2)}
    return eva02_base_patch16_clip_224(**{**sizes, **kwargs})


@register_model
def tiny_pe(**kwargs: Any) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "ref_feat_shape": (2, 2)}
    return vit_pe_core_tiny_patch16_384(**{**sizes, "attn_pool_num_heads": 2, **kwargs})


@register_model
def tiny_fastvit(**kwargs: Any) -> nn.Module:
    return fastvit_mci0(**{"layers": (1, 2, 1, 1), "embed_dims": (8, 16, 32, 64), **kwargs})


@register_model
def tiny_vitamin(**kwargs: Any) -> nn.Module:
    convolutions = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stem = VitCfg(embed_dim=(8, 16, 32), depths=(1, 2, 1), stem_width=8, conv_cfg=convolutions, head_type="1d")
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "embed_cfg": stem}
    return vitamin_small_224(**{**sizes, **kwargs})


@register_model
def tiny_mci(**kwargs: Any) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "no_embed_class": True}
    stem = ConvStem(channels=(8, 8, 32), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU)
    model: nn.Module = _create_vision_transformer_hybrid(
        "vit_base_mci_224", backbone=stem, embed_args={"proj": False}, **{**sizes, **kwargs}
    )
    return model


@register_model
def tiny_relpos(**kwargs: Any) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "rel_pos_dim": 16}
    return vit_relpos_medium_patch16_cls_224(**{**sizes, **kwargs})


def timm(name: str, image_size: int = 32, **settings: Any) -> dict[str, Any]:
    """A vision config for one of the timm models above."""
    return {"timm_model_name": name, "image_size": image_size, **settings}


def lively(model: nn.Module) -> nn.Module:
    """Redraw weights at a scale that suits tiny widths: 0.02, or 1e-6 in layer scales, leaves features constant."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif 0 < parameter.abs().max() < 0.01:
            nn.init.constant_(parameter, 0.1)
    return model


def clip_vit(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **settings: Any) -> nn.Module:
    """`open_clip.CLIP` of an open_clip ViT and a text transformer of three blocks each; arguments override."""
    model: nn.Module = open_clip.CLIP(EMBED_DIM, {**VISION, **(vision or {})}, {**TEXT, **(text or {})}, **settings)
    return model


def clip_resnet() -> nn.Module:
    """`open_clip.CLIP` with a ModifiedResNet of one Bottleneck a stage, on images of 64 pixels."""
    model: nn.Module = open_clip.CLIP(EMBED_DIM, RESNET, TEXT)
    return model


def clip_timm(name: str, image_size: int = 32, **settings: Any) -> nn.Module:
    """`open_clip.CLIP` with a tiny timm trunk."""
    return lively(open_clip.CLIP(EMBED_DIM, timm(name, image_size, **settings), TEXT))


def custom_timm(name: str, **settings: Any) -> nn.Module:
    """`open_clip.CustomTextCLIP` with a tiny timm trunk, as EVA, MobileCLIP, ViTamin and PE are."""
    return lively(open_clip.CustomTextCLIP(EMBED_DIM, timm(name, **settings), TEXT))


def siglip() -> nn.Module:
    """`open_clip.CustomTextCLIP` with attention pooling, no vision projection, bidirectional text and a logit bias."""
    vision = timm("tiny_siglip", timm_pool="map", timm_proj="none")
    scales = {"init_logit_scale": 2.3026, "init_logit_bias": -10.0}
    return lively(open_clip.CustomTextCLIP(EMBED_DIM, vision, SIGLIP_TEXT, **scales))


def custom_text(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> nn.Module:
    """`open_clip.CustomTextCLIP` of the same two towers as `clip_vit`."""
    model: nn.Module = open_clip.CustomTextCLIP(EMBED_DIM, {**VISION, **(vision or {})}, {**TEXT, **(text or {})})
    return model


def coca() -> nn.Module:
    """CoCa: attentional pooling, a class token at the end of the text, and a captioning decoder of two blocks."""
    vision = {**VISION, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    decoder = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": EMBED_DIM, "heads": 2, "layers": 2}
    model: nn.Module = open_clip.CoCa(
        EMBED_DIM,
        multimodal_cfg=decoder,
        vision_cfg={**vision, "output_tokens": True},
        text_cfg={**TEXT, "width": EMBED_DIM, "embed_cls": True, "output_tokens": True},
    )
    nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves it as it found the memory
    return model


_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT + 2,
}

HF_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "roberta": partial(RobertaConfig, **_BERT, type_vocab_size=1),
    "xlm_roberta": partial(XLMRobertaConfig, **_BERT, type_vocab_size=1),
    "bert": partial(BertConfig, **_BERT),
    "mt5": partial(MT5Config, vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2),
    "m2m_100": partial(
        M2M100Config,
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_position_embeddings=CONTEXT + 2,
    ),
}
"""Hugging Face text towers open_clip knows, by their config, in tiny."""


def hf_text(architecture: str = "roberta", pooler: str = "mean_pooler", proj: str | None = "mlp") -> nn.Module:
    """`open_clip.CustomTextCLIP` whose text tower is a Hugging Face encoder, wired as open_clip wires it."""
    config = HF_CONFIGS[architecture]()
    model: nn.Module = open_clip.CustomTextCLIP(EMBED_DIM, VISION, TEXT)
    text = HFTextEncoder("", EMBED_DIM, config=config, pooler_type=pooler, proj_type=proj)
    if config.is_encoder_decoder:
        text.transformer = text.transformer.encoder
    else:
        text.transformer = AutoModel.from_config(config, add_pooling_layer=pooler == "cls_pooler")
    model.text, model.context_length, model.vocab_size = lively(text), CONTEXT, VOCABULARY
    return model


KNOBS: dict[str, dict[str, Any]] = {
    "adapter": {"dim": 8},
    "prompt": {"init": "random", "length": 2},
    "lora_prompt": {"init": "random", "length": 2},
    "head": {"init": "random"},
}
"""What built-in policies need on models as narrow as these, and with a vocabulary that is not CLIP's."""

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "clip_vit": clip_vit,
    "clip_resnet": clip_resnet,
    "clip_convnext": partial(clip_timm, "tiny_convnext", timm_pool="", timm_proj="linear"),
    "clip_swin": partial(clip_timm, "tiny_swin", timm_pool="", timm_proj="linear"),
    "custom_text": custom_text,
    "siglip": siglip,
    "eva": partial(custom_timm, "tiny_eva", timm_pool="token", timm_proj=None),
    "pe": partial(custom_timm, "tiny_pe", timm_pool="map", timm_proj=None),
    "fastvit": partial(custom_timm, "tiny_fastvit", timm_pool="avg", timm_proj=None),
    "vitamin": partial(custom_timm, "tiny_vitamin", timm_pool="", timm_proj="linear"),
    "mci": partial(custom_timm, "tiny_mci", timm_pool="token", timm_proj=None),
    "relpos": partial(clip_timm, "tiny_relpos", timm_pool="", timm_proj="linear"),
    "coca": coca,
    "hf_text": hf_text,
}

CORE = ("clip_vit", "clip_resnet", "clip_convnext", "siglip", "eva", "coca", "custom_text", "hf_text")
"""The families that differ most; for tests too slow to run over all."""

VIT_LIKE = ("clip_vit", "custom_text", "siglip", "eva", "pe", "vitamin", "mci", "relpos", "coca", "hf_text")
"""Families whose vision tower is a stack of equal blocks over tokens."""

HIERARCHICAL = ("clip_resnet", "clip_convnext", "clip_swin", "fastvit")
"""Families whose vision tower has stages."""

OPEN_CLIP_TEXT = tuple(name for name in FAMILIES if name != "hf_text")
"""Families whose text tower is open_clip's own; all causal but siglip's."""

BATCH_NORM = ("clip_resnet", "fastvit", "mci")
"""Families with batch statistics in the vision tower."""


def images(model: nn.Module, batch: int = 4) -> Tensor:
    """Random images of the size the model takes, (batch, 3, H, W), always the same ones."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator).to(model.logit_scale.device)


def tokens(model: nn.Module, batch: int = 4, length: int | None = None) -> Tensor:
    """Distinct captions, (batch, length): start, words, end, padding; `length` defaults to the model's context.

    The end token has the largest id, or the id the model pools at; captions have unlike lengths.
    """
    length = length or model.context_length
    text = getattr(model, "text", None)
    config = getattr(text, "config", None)
    pad = config.pad_token_id if config else 0
    end = text.eos_id if getattr(text, "pool_type", None) == "eos" else VOCABULARY - 1
    ids = torch.full((batch, length), pad, dtype=torch.long)
    for row in range(batch):
        words = 1 + row % (length - 2)
        ids[row, 0] = VOCABULARY - 2
        ids[row, 1 : 1 + words] = 5 + (row * 7 + torch.arange(words) * 3) % (VOCABULARY - 8)
        ids[row, 1 + words] = end
    return ids.to(model.logit_scale.device)
