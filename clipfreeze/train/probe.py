"""Apply a plan for real and prove it with one forward and backward, so that a folder can be handed to any trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from clipfreeze import changes, models
from clipfreeze.plan.value import Plan
from clipfreeze.train.batches import Tokenizer
from clipfreeze.train.classes import text_prompt_in
from clipfreeze.train.engine import gradient_notes
from clipfreeze.train.folder import empty_folder
from clipfreeze.train.objective import Training, training_module

_CAPTION = "a photo of thing number"


def build_and_prove(plan: Plan, model: str, pretrained: str | None, out: Path) -> Iterator[str]:
    """Load the model, apply, build the optimizer, run one forward and backward, leave `out` for `clipfreeze.load`.

    Yields a line for each thing proved. No weight changes: the step is not taken.
    """
    with empty_folder(out) as folder:
        torch.manual_seed(0)
        loaded = models.load(model, pretrained)
        yield from loaded.notes
        applied = changes.apply(plan, loaded.model, tokenizer=loaded.tokenizer)
        optimizer = applied.optimizer()
        yield f"{len(optimizer.param_groups)} param groups hold each of {len(plan.trainable)} tensors once"
        module = training_module(applied).train()
        loss = module(**noise_batch(loaded, module, plan, 2))
        loss.backward()
        yield f"one forward and backward: loss {loss.item():.4f} on two random images"
        yield from gradient_notes(applied)
        optimizer.zero_grad()
        applied.save(folder)
        yield f"wrote {folder}: clipfreeze.load({str(folder)!r}, model) applies it to the same model"
        if loaded.random:
            yield "which has the same random weights if it is made right after torch.manual_seed(0)"


def noise_batch(loaded: models.Loaded, module: Training, plan: Plan, size: int) -> dict[str, torch.Tensor]:
    """Images (size, 3, H, W) of noise through the model's own transform, with what the module reads beside them: texts
    that differ where the plan knows no classes.
    """
    from PIL import Image

    noise = torch.randint(0, 256, (size, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"image": torch.stack([loaded.transform(Image.fromarray(picture.numpy())) for picture in noise])}
    if module.reads_labels:
        batch["label"] = torch.arange(size) % 2
    if module.reads_texts:
        prompt = text_prompt_in(plan.sites)
        known = prompt.classes if prompt and prompt.classes else [f"{_CAPTION} {number}" for number in range(size)]
        captions = [known[number % len(known)] for number in range(size)]
        batch["text"] = Tokenizer(loaded.tokenizer, loaded.model)(captions)
        batch["concepts"] = torch.arange(size) % len(known)
    return batch
