"""Anatomies and policies made by hand, so that the plan is tested without torch."""

from pathlib import Path

from clipfreeze.anatomy.parts import Anatomy, Parameter, Tower
from clipfreeze.policy.loading import Policy, load_policy


def anatomy(vision: int = 12, text: int = 3, fused: bool = True) -> Anatomy:
    """A ViT-like CLIP: `vision` blocks in two stages, `text` blocks, projections, logit scale."""
    parameters = [
        Parameter("visual.class_embedding", (8,), "float32", "vision.embed", tags=frozenset({"embeddings"})),
        *_blocks("visual.transformer.resblocks", "vision.blocks", vision, fused),
        Parameter("visual.ln_post.weight", (8,), "float32", "vision.norm", tags=frozenset({"norms"})),
        Parameter("visual.proj", (8, 4), "float32", "vision.proj", tags=frozenset({"projections"})),
        Parameter("positional_embedding", (5, 8), "float32", "text.embed", tags=frozenset({"embeddings"}), fixed=True),
        Parameter("token_embedding.weight", (9, 8), "float32", "text.embed", aliases=("head.weight",)),
        *_blocks("transformer.resblocks", "text.blocks", text, fused),
        Parameter("text_projection", (8, 4), "float32", "text.proj", tags=frozenset({"projections"})),
        Parameter("logit_scale", (), "float32", "logit_scale"),
    ]
    towers = (
        Tower(
            "vision", tuple(f"visual.transformer.resblocks.{i}" for i in range(vision)), (0,) * 4 + (1,) * (vision - 4)
        ),
        Tower("text", tuple(f"transformer.resblocks.{i}" for i in range(text))),
    )
    return Anatomy("made", "CLIP", tuple(parameters), towers)


def _blocks(path: str, role: str, count: int, fused: bool) -> list[Parameter]:
    slots = [("qkv", ("q", "k", "v"))] if fused else [("q", ("q",)), ("k", ("k",)), ("v", ("v",))]
    found = []
    for i in range(count):
        stage = None if role.startswith("text") else int(i >= 4)
        for name, slot in slots:
            found.append(
                Parameter(
                    f"{path}.{i}.attn.{name}.weight", (8, 8), "float32", role, i, stage, frozenset({"attn"}), slot
                )
            )
        found.append(
            Parameter(
                f"{path}.{i}.mlp.fc1.bias", (8,), "float32", role, i, stage, frozenset({"mlp", "biases"}), ("fc1",)
            )
        )
    return found


def policy(folder: Path, text: str, name: str = "mine", **knobs: object) -> Policy:
    """A policy from its text."""
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return load_policy(path, **knobs)  # type: ignore[arg-type]
