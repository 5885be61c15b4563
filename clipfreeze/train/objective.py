"""The losses: contrastive, with all pairs that say the same as each other's positives; cross-entropy over class
prompts; a head's cross-entropy. Each is one over the batches of all ranks, and a rank's gradients are its share.

Labels by position, as in pre-training, push equal captions apart: with class names as captions most batches hold some.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import open_clip
import torch
from open_clip.loss import gather_features
from torch import Tensor, nn

from clipfreeze.changes import Applied
from clipfreeze.errors import DataError
from clipfreeze.inject.head import ClassHead
from clipfreeze.policy.schema import Anchor
from clipfreeze.train.dice import Dice, throw_again
from clipfreeze.train.distributed import gathered, rank, world_size

Objective = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]
ObjectiveName = Literal["auto", "contrastive", "classes"]


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, concepts: Tensor) -> Tensor:
    """Cross-entropy both ways, the target spread evenly over the positives; open_clip's loss when all are distinct.

    image, text: (B, D) normalised; scale: of the logits, not its log; concepts: (B,). The minimum is the mean log of
    the number of positives, 0 when all are distinct. On several ranks: of this rank's rows among all ranks' columns,
    so that the mean over ranks is the loss of the whole batch, and so are gradients averaged over ranks.
    """
    open_clips = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size())
    with _without_notice():
        per_image, per_text = open_clips.get_logits(image, text, scale, bias)
    positives = positives_of(concepts).to(per_image.dtype)
    target = positives / positives.sum(1, keepdim=True)
    return (nn.functional.cross_entropy(per_image, target) + nn.functional.cross_entropy(per_text, target)) / 2


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, concepts: Tensor) -> Tensor:
    """Each image and each text a yes-or-no question: +1 for positives, -1 for the rest. Arguments as for clip_loss."""
    texts = text
    if world_size() > 1:
        with _without_notice():
            _, texts = gather_features(image, text, local_loss=True, gather_with_grad=True)
    logits = open_clip.loss.SigLipLoss().get_logits(image, texts, scale, bias)
    signs = positives_of(concepts).to(logits.dtype) * 2 - 1
    return -nn.functional.logsigmoid(signs * logits).sum() / len(image)


def objective_for(model: Any) -> Objective:
    """SigLIP's loss for a model with a logit bias, else CLIP's."""
    return clip_loss if model.logit_bias is None else siglip_loss


class Given(Protocol):
    """Images or texts that know their way through the encoder (see thrift.py)."""

    def features(self) -> Tensor:
        """(B, D) normalised, fp32."""
        ...

    def __len__(self) -> int: ...

    def tensor_split(self, count: int) -> Sequence[Given]:
        """As of a tensor."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the encoder works."""
        ...


@dataclass
class Chunk:
    """A part of a batch, images or texts, on its way through an encoder twice (see accumulate.py)."""

    given: Tensor | Given  # (B, 3, H, W), or (B, L) ids
    is_text: bool
    dice: Dice | None = None  # where random numbers stood the first time
    gradient: Tensor | None = None  # (B, D), of the loss


class Training(nn.Module):
    """A model with its objective as one module: what an engine wraps, so that the whole step passes through it."""

    reads_texts, reads_labels, reads_classes = True, False, False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Any, chunks: list[Chunk] | None = None, **more: Any) -> Tensor:
        """`step` of a batch, or `pull` of chunks: a wrapper lets `forward` alone through."""
        return self.step(*batch, **more) if chunks is None else self.pull(chunks, **more)

    def step(self, image: Tensor | Given, text: Tensor | Given | None = None, **targets: Tensor) -> Tensor:
        """image: (B, 3, H, W), text: (T, L) ids, targets as `loss` wants them -> loss."""
        texts = None if text is None else Chunk(text, True)
        return self.loss(self.encode(Chunk(image, False)), None if texts is None else self.encode(texts), **targets)

    def encode(self, chunk: Chunk) -> Tensor:
        """(B, D) fp32 normalised, by the encoders: CoCa's forward decodes too."""
        if not isinstance(chunk.given, Tensor):
            return chunk.given.features()
        encoder = self.model.encode_text if chunk.is_text else self.model.encode_image
        features: Tensor = encoder(chunk.given, normalize=True)
        return features.float()

    def pull(self, chunks: list[Chunk], then: dict[str, Any] | None = None) -> Tensor:
        """A scalar of which the gradient is the loss's, by way of these chunks' features. `then` adds the loss of
        features that have no gradient, for that of what the loss reads beside them.
        """
        total = self.loss(**then) if then is not None else torch.zeros(())
        for chunk in chunks:
            assert chunk.dice is not None
            assert chunk.gradient is not None
            throw_again(chunk.dice, chunk.given.device)
            total = total.to(chunk.gradient) + (self.encode(chunk) * chunk.gradient).sum()
        return total

    def loss(self, image: Tensor, text: Tensor | None, **targets: Tensor) -> Tensor:
        """image: (B, D), text: (T, D) or None where the objective reads none -> loss, a scalar."""
        raise NotImplementedError

    def by_guessing(self, batch_size: int) -> float | None:
        """The loss of features that say nothing; None where there is no such number."""
        raise NotImplementedError


class Anchored(Training):
    """An objective, and the squared distance of features from those of the start: see `Anchor`."""

    def __init__(self, of: Training, anchor: Anchor) -> None:
        super().__init__(of.model)
        self.of, self.anchor = of, anchor
        self.reads_texts, self.reads_labels = of.reads_texts, of.reads_labels
        self.reads_classes = of.reads_classes

    def loss(
        self,
        image: Tensor,
        text: Tensor | None,
        *,
        image_start: Tensor | None = None,
        text_start: Tensor | None = None,
        **targets: Tensor,
    ) -> Tensor:
        """As the objective's, with start features of image (B, D) and text (T, D) where they are anchored."""
        loss = self.of.loss(image, text, **targets)
        for features, start, strength in (
            (image, image_start, self.anchor.vision),
            (text, text_start, self.anchor.text),
        ):
            if features is not None and start is not None:
                loss = loss + strength * (features - start).square().sum(-1).mean()
        return loss

    @torch.no_grad()
    def start_features(self, applied: Applied, batch: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """What `loss` wants of a batch, at most `size` inputs at once."""
        wanted = {"image": self.anchor.vision, "text": self.anchor.text}
        with applied.started():
            return {
                f"{name}_start": torch.cat([self.encode(Chunk(part, name == "text")) for part in parts])
                for name, strength in wanted.items()
                if strength and name in batch
                for parts in [batch[name].tensor_split(math.ceil(len(batch[name]) / size))]
            }

    def by_guessing(self, batch_size: int) -> float | None:
        return None


class Contrastive(Training):
    """Each pair against all others in the batch, by the model's own kind of loss."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.objective = objective_for(model)

    def loss(self, image: Tensor, text: Tensor | None, *, concepts: Tensor) -> Tensor:  # type: ignore[override]
        """image, text: (B, D), concepts: (B,) -> loss."""
        assert text is not None
        with torch.autocast(image.device.type, enabled=False):  # bf16 logits of size 100 are off by 0.25
            return self.objective(image, text, self.model.logit_scale.exp(), self.model.logit_bias, concepts)

    def by_guessing(self, batch_size: int) -> float | None:
        return math.log(batch_size) if self.objective is clip_loss else None


class ClassPrompts(Training):
    """Each image against a prompt for every class, as in zero-shot classification (CoOp, arXiv 2109.01134)."""

    reads_labels, reads_classes = True, True

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__(model)
        self.classes = classes

    def loss(self, image: Tensor, text: Tensor | None, *, label: Tensor) -> Tensor:  # type: ignore[override]
        """image: (B, D), text: (classes, D), label: (B,) -> loss. A logit bias shifts all alike and plays no part."""
        assert text is not None
        with torch.autocast(image.device.type, enabled=False):
            return nn.functional.cross_entropy(self.model.logit_scale.exp() * image @ text.T, label)

    def by_guessing(self, batch_size: int) -> float | None:
        return math.log(self.classes)


class Classification(Training):
    """A model with its head; `contrast` adds the contrastive loss, for what the head does not reach."""

    reads_labels = True

    def __init__(self, model: Any, head: ClassHead, contrast: Contrastive | None) -> None:
        super().__init__(model)
        self.head, self.contrast = head, contrast

    @property
    def reads_texts(self) -> bool:  # type: ignore[override]
        """Whether a batch needs text and concepts."""
        return self.contrast is not None

    def loss(  # type: ignore[override]
        self, image: Tensor, text: Tensor | None, *, label: Tensor, concepts: Tensor | None = None
    ) -> Tensor:
        """image: (B, D), label: (B,) of the head's classes, text and concepts as for Contrastive -> loss."""
        loss = nn.functional.cross_entropy(self.head(image), label)
        if self.contrast is None:
            return loss
        assert concepts is not None
        return loss + self.contrast.loss(image, text, concepts=concepts)

    def by_guessing(self, batch_size: int) -> float | None:
        classes = math.log(len(self.head.weight))
        if self.contrast is None:
            return classes
        pairs = self.contrast.by_guessing(batch_size)
        return None if pairs is None else classes + pairs


def training_module(applied: Applied, objective: ObjectiveName = "auto", classes: int = 0) -> Training:
    """What trains the plan. "auto": its head's cross-entropy where it adds one, else the contrastive loss. Beside a
    head, texts are encoded and the contrastive loss is added only if something trains that the head does not reach:
    text tower, text prompt, logit bias. "classes": cross-entropy over prompts of the data's `classes`, which must be 2
    or more. DataError where the objective does not go with the plan or data.
    """
    found = _objective(applied, objective, classes)
    anchor = applied.plan.anchor
    if anchor.text and not (found.reads_texts or found.reads_classes):
        raise DataError("the policy anchors text features, and its head reads no texts", "anchor.text = 0")
    return Anchored(found, anchor) if anchor.vision or anchor.text else found


def _objective(applied: Applied, objective: ObjectiveName, classes: int) -> Training:
    contrast = Contrastive(applied.model)
    head = next((addition for _, addition in applied.additions if isinstance(addition, ClassHead)), None)
    if objective == "classes":
        if head is not None:
            raise DataError("the objective classes trains class prompts, and this policy adds a head", "objective auto")
        if classes < 2:
            raise DataError("the objective classes needs data with classes", "class folders, or objective contrastive")
        return ClassPrompts(applied.model, classes)
    if head is not None and objective == "contrastive" and all(p.origin == "head" for p in applied.plan.trainable):
        raise DataError("the contrastive loss does not reach the head, and nothing else trains", "objective auto")
    if head is not None and objective == "auto":
        return Classification(applied.model, head, contrast if _texts_train(applied) else None)
    return contrast


def _texts_train(applied: Applied) -> bool:
    names = {name for site, _ in applied.additions if site.tower == "text" for name in site.names}
    return any(
        planned.name in names or planned.role.startswith("text.") or planned.role == "logit_bias"
        for planned in applied.plan.trainable
    )


@contextmanager
def _without_notice() -> Iterator[None]:
    """open_clip gathers by a function that newer torch calls deprecated, at every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed.nn", FutureWarning)
        yield


def positives_of(concepts: Tensor) -> Tensor:
    """(B,) of this rank -> (B, all ranks' B) bool: who says the same."""
    return concepts[:, None] == gathered(concepts)[None]
