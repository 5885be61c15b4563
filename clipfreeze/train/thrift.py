"""A run's towers, doing only what the policy needs: what is frozen runs once, texts are as long as they are.

A sample's frozen prefix is worked out in batches of one size, filled up where samples are missing: then its numbers do
not depend on which others it came with, and a run that is resumed has those it would have had.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from clipfreeze.anatomy.pooled import Pooled, pooled_token
from clipfreeze.changes import Applied
from clipfreeze.plan.sites import AdapterSite, PromptSite
from clipfreeze.train.batches import Batch, Draw, Loaded, TrainingSamples
from clipfreeze.train.dice import dice_on, undrawn
from clipfreeze.train.distributed import world_size
from clipfreeze.train.given import Images, Texts
from clipfreeze.train.identity import picture_name, prefix_name, short_digest, transform_name
from clipfreeze.train.kept import Budget, Kept, Memory
from clipfreeze.train.last_block import at_token
from clipfreeze.train.objective import Training
from clipfreeze.train.prefix import FEATURES, Encode, NoCutError, Prefix, find_prefix, recomputes
from clipfreeze.train.settings import TrainingSettings, bytes_of
from clipfreeze.train.store import Store
from clipfreeze.train.texts import TextTower, length_groups, unique

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

IMAGES_AT_ONCE, TEXTS_AT_ONCE = 32, 16
"""Through a prefix on a CPU, which is no faster with more and needs the memory; elsewhere four times as many."""

_TOLERANCE = {"no": 1e-4, "fp16": 5e-3, "bf16": 5e-2}
"""Of a normalised feature's largest difference, between a tower in one piece and in two."""


class Thrift:
    """What a run's batches become before they go to the training module.

    `pictures` gives one that the loader left out; None for a stream, of which nobody knows what comes again.
    `normalise` makes of pictures what the towers take.
    """

    def __init__(
        self,
        applied: Applied,
        module: Training,
        accelerator: Any,
        settings: TrainingSettings,
        pictures: TrainingSamples | None,
        normalise: Callable[[Tensor], Tensor],
    ) -> None:
        self.pictures, self.normalise = pictures, normalise
        self.applied, self.module, self.accelerator, self.settings = applied, module, accelerator, settings
        self.text = TextTower(applied.model)
        self.prefixes: dict[str, Prefix] = {}
        self.kept: dict[str, Kept] = {}
        self.names: dict[str, str] = {}  # of what is kept
        self.pooled: Pooled | None = None  # of the vision tower's last block
        self.once = True
        self.notes: list[str] = []
        self.budget = Budget(memory_budget(settings.cache_ram))
        self._picture_names: dict[int, bytes] = {}
        self._prompts: tuple[Tensor, Texts] | None = None

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        device: torch.device = self.accelerator.device
        return device

    def enter(self, loaded: Loaded) -> None:
        """A phase begins: find what is frozen now, by the first two samples of a batch."""
        self._uncut()
        self._prompts = self.pooled = self.text.pooled = None
        examples = {"vision": self._pixels(loaded, range(min(2, loaded.size)))}
        if "text" in loaded.batch:
            examples["text"] = loaded.batch["text"][:2].to(self.device)
        for tower, example in examples.items():
            encode = self.text.encode if tower == "text" else self._encode_image
            if len(example) == 1:
                example = torch.cat([example, example])
            features, draws = self._tried(encode, example)
            if tower == "text":
                self.once = not draws
            if not draws and not recomputes(self.applied.model):
                self._shorten(tower, encode, example, features)
            try:
                with self.accelerator.autocast():
                    tolerance = _TOLERANCE[self.accelerator.mixed_precision]
                    self.prefixes[tower] = find_prefix(self.applied, tower, encode, example, tolerance)
            except NoCutError as reason:
                self.notes.append(f"{tower} tower: all of it runs in each step: {reason}")
                self._drop(tower)
                continue
            self._keep(tower)
        if "text" in examples and self.text.whole:
            self.notes.append(f"texts run at their full length: {self.text.whole}")

    def close(self) -> None:
        """Leave the model as it was, and what is on disk to others."""
        self._uncut()
        for tower in list(self.kept):
            self._drop(tower)

    def refresh(self) -> None:
        """An epoch begins: see what other processes have kept."""
        for kept in self.kept.values():
            if kept.store is not None:
                kept.store.refresh()

    def _uncut(self) -> None:
        for prefix in self.prefixes.values():
            prefix.close()
        self.prefixes = {}

    def knows(self, draw: Draw) -> bool:
        """Whether the picture need not be loaded."""
        return "vision" in self.prefixes and "vision" in self.kept and self._image_key(draw) in self.kept["vision"]

    def prepare(self, loaded: Loaded) -> Batch:
        """The batch as the training module takes it."""
        batch: dict[str, Any] = {**loaded.batch, "image": self._images(loaded)}
        if "text" in batch:
            batch["text"] = self._texts(batch["text"])
        return batch

    def take_notes(self) -> list[str]:
        """What the run does once and what in each step, as far as it was not told."""
        notes, self.notes = self.notes, []
        return notes

    def take_warnings(self) -> list[str]:
        """What the user should know of what is kept."""
        return [note for kept in self.kept.values() for note in kept.take_notes()]

    def _shorten(self, tower: str, encode: Encode, example: Tensor, features: Tensor) -> None:
        """Work out the last block at the pooled token alone, where that changes no features: there is no adapter, which
        may read other tokens.
        """
        side: Any = self.text if tower == "text" else self
        prompted = tower == "vision" and any(isinstance(site, PromptSite) for site in self.applied.sites)
        if prompted or any(isinstance(site, AdapterSite) for site in self.applied.sites):
            return
        pooled = pooled_token(self.applied.model, tower)
        if pooled is None:
            return
        side.pooled = pooled
        apart = (self._tried(encode, example)[0] - features).abs().max()
        if apart > _TOLERANCE[self.accelerator.mixed_precision]:
            side.pooled = None

    def _keep(self, tower: str) -> None:
        """Where what the prefix makes is kept, if it comes again."""
        prefix = self.prefixes[tower]
        done = "its features" if prefix.part == FEATURES else f"all before {prefix.part}"
        if tower == "vision" and (reason := self._passing()):
            self.notes.append(f"vision tower: {done} without gradient in each step: {reason}")
            return
        dtype = self._dtype(prefix)
        name = self._name(tower, prefix, dtype)
        if self.names.get(tower) != name:  # else what was kept in the phase before still holds
            self._drop(tower)
            self.names[tower] = name
            address = self._picture_name if tower == "vision" else _as_it_is
            self.kept[tower] = Kept(Memory(self.budget), dtype, self._store(tower, name), address)
        apart = " and rank (--cache-dir shares it)" if world_size() > 1 and self.settings.cache_dir is None else ""
        self.notes.append(f"{tower} tower: {done} once a {'picture' if tower == 'vision' else 'caption'}{apart}")

    def _passing(self) -> str:
        """Why pictures do not come again as they were, if so."""
        if self.pictures is None:
            return "a stream is not remembered"
        if self.pictures.random and self.settings.views is None:
            return "augmentation makes each view a new one (--views K keeps K of each)"
        views = self.settings.views or 1 if self.pictures.random else 1
        if self.settings.epochs <= views and self.settings.cache_dir is None:
            return "each view is seen once"
        return ""

    def _dtype(self, prefix: Prefix) -> torch.dtype | None:
        """Features, and what is projected to them, are few numbers, of which each counts."""
        whole = prefix.part == FEATURES or prefix.at_projection
        return None if whole or self.settings.cache_dtype == "auto" else _DTYPES[self.settings.cache_dtype]

    def _name(self, tower: str, prefix: Prefix, dtype: torch.dtype | None) -> str:
        """Of all that the rows depend on beside the sample. Weights are read for it only if somebody will ask."""
        if self.settings.cache_dir is None and not self.applied.plan.phases:
            return tower
        how = (tower, prefix.part, str(dtype), self.accelerator.mixed_precision, self.device.type)
        return prefix_name(self.applied.model, prefix.before, *how, self._transform if tower == "vision" else None)

    def _store(self, tower: str, name: str) -> Store | None:
        if self.settings.cache_dir is None:
            return None
        if tower == "vision" and self._transform is None:
            self.notes.append("pictures are kept in memory alone: their transform does not say what it does")
            return None
        return Store(Path(self.settings.cache_dir), name, bytes_of(self.settings.cache_disk))

    def _drop(self, tower: str) -> None:
        self.names.pop(tower, None)
        if (kept := self.kept.pop(tower, None)) is not None:
            kept.close()

    @cached_property
    def _transform(self) -> str | None:
        assert self.pictures is not None
        return transform_name(self.pictures.pictures.transform)

    def _picture_name(self, key: Hashable) -> bytes:
        """Of a view, in every run: the picture's own, and where views differ the dice."""
        assert self.pictures is not None
        assert isinstance(key, int)
        if key not in self._picture_names:
            view, position = divmod(key, len(self.pictures))
            name = picture_name(self.pictures.pictures.pairs[position].image)
            if self.pictures.random:
                dice = f"{self.settings.seed}/{view}/{position}".encode()
                name = short_digest(name + dice)
            self._picture_names[key] = name
        return self._picture_names[key]

    def _encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        model: Any = self.applied.model
        with ExitStack() as stack:
            if self.pooled is not None:
                stack.enter_context(at_token(model.get_submodule(self.pooled.block), self.pooled.place(pixels)))
            features: Tensor = model.encode_image(pixels, normalize=normalize)
        return features.float()

    def _tried(self, encode: Encode, example: Tensor) -> tuple[Tensor, bool]:
        """The features, and whether the tower draws random numbers; none are missing afterwards."""
        with undrawn(self.device), torch.no_grad(), self.accelerator.autocast():
            before = dice_on(self.device)
            features = encode(example)
            after = dice_on(self.device)
        pairs = zip(before, after, strict=True)
        return features, any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)

    def _image_key(self, draw: Draw) -> int:
        assert self.pictures is not None
        return self.pictures.view(draw) * len(self.pictures) + draw.position

    def _images(self, loaded: Loaded) -> Images:
        prefix, kept = self.prefixes.get("vision"), self.kept.get("vision")
        if prefix is None:
            return Images(self._pixels(loaded, range(loaded.size)), self._encode_image)
        keys = [None if draw is None else self._image_key(draw) for draw in loaded.draws] if kept else []
        rows = self._rows(kept, keys or [None] * loaded.size, partial(self._through_vision, prefix, loaded))
        return Images(torch.stack(rows).to(self.device, non_blocking=True), prefix.go_on)

    def _through_vision(self, prefix: Prefix, loaded: Loaded, missing: Sequence[int]) -> list[Tensor]:
        whole = loaded.size
        most = min(IMAGES_AT_ONCE * self._wide, self.settings.micro_batch or whole)
        at_once = math.ceil(whole / math.ceil(whole / most))  # of equal parts
        return self._through(prefix, self._pixels(loaded, missing), at_once)

    @property
    def _wide(self) -> int:
        return 1 if self.device.type == "cpu" else 4

    def _pixels(self, loaded: Loaded, rows: Sequence[int]) -> Tensor:
        """(rows, 3, H, W) normalised, on the device, of those that the loader left out too."""
        place = {row: at for at, row in enumerate(loaded.seen)}
        if all(row in place for row in rows):
            pixels = loaded.batch["image"]
            if len(rows) < len(pixels):
                pixels = pixels[[place[row] for row in rows]]
        else:
            pixels = torch.stack([self._picture(loaded, row, place) for row in rows])
        return self.normalise(pixels.to(self.device, non_blocking=True))

    def _picture(self, loaded: Loaded, row: int, place: Mapping[int, int]) -> Tensor:
        if row in place:
            return loaded.batch["image"][place[row]]
        draw = loaded.draws[row]
        assert draw is not None
        assert self.pictures is not None
        return self.pictures.picture(draw)

    def _texts(self, ids: Tensor) -> Texts:
        """Prompts of all classes come again as the same tensor."""
        if self._prompts is not None and self._prompts[0] is ids:
            return self._prompts[1]
        prefix = self.prefixes.get("text")
        texts = Texts(ids, self.text, self.device, self.once, prefix)
        if prefix is not None:
            lengths = self.text.lengths(ids)
            first, places = unique(ids)
            keys = [short_digest(ids[row, : lengths[row]].numpy().tobytes()) for row in first]
            through = partial(self._through_text, prefix, ids[first], [lengths[row] for row in first])
            rows = self._rows(self.kept["text"], keys, through)
            texts.states = [rows[place] for place in places]
        if self.module.reads_classes:
            self._prompts = ids, texts
        return texts

    def _through_text(self, prefix: Prefix, ids: Tensor, lengths: list[int], missing: Sequence[int]) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        for length, group in length_groups([lengths[row] for row in missing], ids.shape[1], fewest=1):
            rows = [missing[place] for place in group]
            states = self._through(prefix, ids[rows, :length].to(self.device), TEXTS_AT_ONCE * self._wide)
            for row, state in zip(rows, states, strict=True):
                of_tokens = state.ndim > 1 and len(state) == length
                made[row] = state[: lengths[row]] if of_tokens else state
        return [made[row] for row in missing]

    def _rows(
        self,
        kept: Kept | None,
        keys: Sequence[Hashable | None],
        make: Callable[[Sequence[int]], list[Tensor]],
    ) -> list[Tensor]:
        """What is kept of each, the rest made by `make` and kept."""
        rows: list[Tensor | None] = kept.fetch(keys) if kept is not None else [None] * len(keys)
        if missing := [place for place, row in enumerate(rows) if row is None]:
            made = make(missing)
            if kept is not None:
                made = kept.put([keys[place] for place in missing], made)
            for place, row in zip(missing, made, strict=True):
                rows[place] = row
        return [row for row in rows if row is not None]

    def _through(self, prefix: Prefix, given: Tensor, at_once: int) -> list[Tensor]:
        """What the prefix makes of each, so many at once, the last ones filled up."""
        count = len(given)
        if rest := -count % at_once:
            given = torch.cat([given, given[:1].expand(rest, *given.shape[1:])])
        with torch.no_grad(), self.accelerator.autocast():
            made = [row for part in torch.split(given, at_once) for row in prefix.reach(part).unbind()]
        return made[:count]


def _as_it_is(key: Hashable) -> bytes:
    assert isinstance(key, bytes)
    return key


def memory_budget(said: str | None) -> int:
    """Bytes; half of what is free unless said, the ranks of a machine together."""
    if said is not None:
        return bytes_of(said)
    return int(psutil.virtual_memory().available // 2 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
