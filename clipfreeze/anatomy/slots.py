"""Which products of a block or attention pool a parameter carries, read off names alone.

Names, not classes: open_clip has two attention classes of the same parameter names, timm and transformers their own.
"""

from __future__ import annotations

QKV = ("q", "k", "v")

ATTENTIONS = ("attn", "self_attn", "attention.self", "layer.0.SelfAttention")
"""Modules of a block that are its attention."""

MLPS = ("mlp", "layer.1.DenseReluDense")
"""Modules of a block that are its MLP."""

ATTENTION_PRODUCTS = {
    **dict.fromkeys(("in_proj", "in_proj_weight", "in_proj_bias", "qkv"), QKV),
    **dict.fromkeys(("q", "q_proj", "q_proj_weight", "q_bias", "query"), ("q",)),
    **dict.fromkeys(("k", "k_proj", "k_proj_weight", "k_bias", "key"), ("k",)),
    **dict.fromkeys(("v", "v_proj", "v_proj_weight", "v_bias", "value"), ("v",)),
    "kv": ("k", "v"),
    **dict.fromkeys(("out_proj", "proj", "o"), ("out",)),
}
MLP_PRODUCTS = {
    **dict.fromkeys(("c_fc", "fc1", "fc1_g", "fc1_x", "w0", "w1", "wi", "wi_0", "wi_1"), ("fc1",)),
    **dict.fromkeys(("c_proj", "fc2", "w2", "wo"), ("fc2",)),
}
"""Gated MLPs (SwiGLU, GeGLU) have two first layers: gate and value are both fc1."""

SCATTERED: dict[str, tuple[str, tuple[str, ...]]] = {
    "token_mixer.qkv": ("attn", QKV),  # FastViT: in its other blocks the token mixer is a convolution
    "token_mixer.proj": ("attn", ("out",)),
    "attention.output.dense": ("attn", ("out",)),  # BERT
    "intermediate.dense": ("mlp", ("fc1",)),
    "output.dense": ("mlp", ("fc2",)),
    "fc1": ("mlp", ("fc1",)),  # M2M100
    "fc2": ("mlp", ("fc2",)),
}
"""Products that do not lie in a module of their own, by name within the block."""


def block_slots(name: str) -> tuple[str | None, tuple[str, ...]]:
    """ "attn", "mlp" or None, and the slots, of a parameter by its name within its block."""
    product = _product(name)
    for kind, modules, products in (("attn", ATTENTIONS, ATTENTION_PRODUCTS), ("mlp", MLPS, MLP_PRODUCTS)):
        for module in modules:
            if name.startswith(module + "."):
                return kind, products.get(product[len(module) + 1 :], ())
    return SCATTERED.get(product, (None, ()))


def pool_slots(name: str) -> tuple[str, ...]:
    """The slots of a parameter by its name within its attention pool."""
    return ATTENTION_PRODUCTS.get(_product(name)) or block_slots(name)[1]


def _product(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")
