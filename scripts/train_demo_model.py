"""Train the packaged demo model, a tiny CLIP, on the train split of the pretraining styles.

    OMP_WAIT_POLICY=PASSIVE python scripts/train_demo_model.py

Measured with the defaults: 22 minutes on two CPU cores shared with other work. Zero-shot top-1 of the packaged model on
the test splits: noto 61.9 % of 168 classes, twemoji 61.5 % of 156, fluent 58.3 % of 156; of the styles it never saw,
openmoji 16.6 % and openmoji_black 3.3 %, each of 307.
"""

import argparse
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from clipfreeze import demo

OUT = Path(demo.__file__).parent / "model"
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 6, "width": 192, "head_width": 32},
        # The whole vocabulary of CLIP, so that open_clip's own tokenizer serves; words never seen stay zero.
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}

NOTICE = (
    "The model in this folder was trained from scratch by scripts/train_demo_model.py, on the train split of these\n"
    f"pictures, whose makers and licences are in ../pictures/*.LICENSE.txt: {', '.join(demo.PRETRAIN_STYLES)}.\n"
)


@dataclass(frozen=True)
class Pool:
    images: Tensor  # (N, 3, 64, 64) uint8
    concepts: Tensor  # (N,) equal where two pictures show the same concept
    pictures: list[demo.Picture]


def load_pool(styles: tuple[str, ...], split: str) -> Pool:
    pictures = [picture for style in styles for picture in demo.load_pictures(style, split)]
    arrays = [np.asarray(Image.open(io.BytesIO(picture.image)).convert("RGB")) for picture in pictures]
    codes = {code: number for number, code in enumerate(dict.fromkeys(picture.code for picture in pictures))}
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Pool(images, torch.tensor([codes[picture.code] for picture in pictures]), pictures)


def normalise(images: Tensor) -> Tensor:
    """uint8 -> what open_clip's transform makes of it, -1 to 1."""
    return images.float() / 127.5 - 1


def augment(images: Tensor) -> Tensor:
    """(B, 3, 64, 64) -1 to 1 -> turned, moved, scaled, mirrored and recoloured, each picture by its own dice."""
    batch = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch).uniform_(low, high)

    angle, zoom, stretch = uniform(-0.35, 0.35), uniform(0.85, 1.35), uniform(0.85, 1.18)
    mirror = torch.where(torch.rand(batch) < 0.25, -1.0, 1.0)
    turn = torch.stack([angle.cos() * mirror * stretch, -angle.sin(), angle.sin() * mirror, angle.cos() / stretch], 1)
    shift = torch.stack([uniform(-0.15, 0.15), uniform(-0.15, 0.15)], 1)
    affine = torch.cat([turn.view(-1, 2, 2) * zoom.view(-1, 1, 1), shift.unsqueeze(2)], 2)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    ink = functional.grid_sample(
        1 - images, grid, align_corners=False
    )  # of the distance to white, so that outside is white
    contrast, grey = uniform(0.75, 1.3).view(-1, 1, 1, 1), ink.mean(1, keepdim=True)
    washed = torch.where(torch.rand(batch, 1, 1, 1) < 0.15, torch.ones(()), uniform(0, 0.4).view(-1, 1, 1, 1))
    tint = torch.empty(batch, 3, 1, 1).uniform_(0.8, 1.2)
    return (1 - (ink.lerp(grey, washed) * contrast * tint)).clamp(-1, 1)


def draw_caption(picture: demo.Picture, rng: np.random.Generator) -> str:
    caption = picture.captions[rng.integers(len(picture.captions))] if rng.random() < 0.5 else picture.name
    if caption != picture.name and rng.random() < 0.3:
        caption = caption.removeprefix(f"{picture.name}, ")
    return demo.TEMPLATES[rng.integers(len(demo.TEMPLATES))].format(caption)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, concepts: Tensor) -> Tensor:
    """CLIP's loss where all pictures of a concept are positives. image, text: (B, D) normalised; concepts: (B,)."""
    logits = scale * image @ text.T
    same = (concepts[:, None] == concepts[None]).float()
    target = same / same.sum(1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def zero_shot(model: open_clip.CLIP, style: str, split: str) -> tuple[float, float, int]:
    """Top-1 and top-5 of a style's split over the names in it, and how many they are."""
    model.eval()
    pool = load_pool((style,), split)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    names = [picture.name for picture in pool.pictures]
    prompts = [
        model.encode_text(tokenizer([template.format(name) for name in names]), normalize=True)
        for template in demo.TEMPLATES
    ]
    classes = functional.normalize(torch.stack(prompts).mean(0), dim=-1)
    logits = model.encode_image(normalise(pool.images), normalize=True) @ classes.T
    rank = (logits > logits.diagonal().unsqueeze(1)).sum(1)
    return (rank < 1).float().mean().item(), (rank < 5).float().mean().item(), len(names)


def make_model(train_captions: list[str]) -> open_clip.CLIP:
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    seen = open_clip.get_tokenizer("ViT-B-32", context_length=16)(train_captions).unique()
    unseen = torch.ones(model.vocab_size, dtype=torch.bool).index_fill_(0, seen, False)
    model.token_embedding.weight.data[unseen] = 0
    return model


def train(args: argparse.Namespace) -> open_clip.CLIP:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pool = load_pool(demo.PRETRAIN_STYLES, "train")
    every = [template.format(caption) for p in pool.pictures for caption in p.captions for template in demo.TEMPLATES]
    model = make_model(every)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05, cycle_momentum=False)

    started = time.monotonic()
    for step in range(1, args.steps + 1):
        model.train()
        chosen = torch.from_numpy(rng.choice(len(pool.pictures), args.batch_size, replace=False))
        tokens = tokenizer([draw_caption(pool.pictures[i], rng) for i in chosen])
        image, text, scale = model(augment(normalise(pool.images[chosen])), tokens)
        loss = contrastive_loss(image, text, scale, pool.concepts[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % args.log_every == 0 or step == args.steps:
            seconds = time.monotonic() - started
            val = ", ".join(f"{s} {zero_shot(model, s, 'val')[0]:.3f}" for s in demo.STYLES)
            print(f"step {step} loss {loss.item():.3f} {seconds:.0f} s; val top-1: {val}", flush=True)
            save(model, args.out)  # a run cut short leaves its last look
    return model


def save(model: open_clip.CLIP, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (folder / "NOTICE.txt").write_text(NOTICE, encoding="utf-8")
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    unfinished = folder / "open_clip_model.safetensors.part"
    save_file(weights, unfinished)
    unfinished.chmod(0o644)  # safetensors writes for the owner alone
    unfinished.replace(folder / "open_clip_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the packaged demo model on the packaged demo pictures.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (default: the package's own)")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--log-every", type=int, default=300, help="steps between two looks at the val split")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = train(args)
    for style in demo.STYLES:
        top1, top5, classes = zero_shot(model, style, "test")
        print(f"test {style}: top-1 {top1:.3f}, top-5 {top5:.3f} of {classes} classes")


if __name__ == "__main__":
    main()
