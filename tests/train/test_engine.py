"""Steps that go wrong say so; precision, clipping, the largest batch and trackers do what they say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import clipfreeze
from clipfreeze.errors import DataError, RunError
from clipfreeze.train import auto_batch
from clipfreeze.train.engine import choose_tf32, make_accelerator
from clipfreeze.train.loop import Callback, Result, Run, fit
from clipfreeze.train.pairs import Pair, PairSet

import tiny
from hand import COLOURS, ByHand, Words, colour_pairs, transform


def model() -> Any:
    torch.manual_seed(0)
    return tiny.clip_vit()


def planned(policy: str, **knobs: Any) -> Any:
    module = model()
    return clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy(policy, **knobs), module), module)


def run(applied: Any, **settings: Any) -> Result:
    values: dict[str, Any] = {"epochs": 2, "batch_size": 4, "tokenizer": Words(), "transform": transform()} | settings
    return fit(applied, colour_pairs(), **values)


class Spoil(Callback):
    """A weight becomes nan after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Run, record: Any) -> None:
        if record["step"] == self.step:
            run.applied.trainable()["logit_scale"].data.fill_(float("nan"))


def test_a_loss_that_is_no_number_names_step_rates_gradient_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        run(planned("projections"), folder=tmp_path, callbacks=[Spoil(2)], save_every="1 steps")
    said = str(caught.value)
    assert "the loss is nan at step 3 (lr: " in said
    assert "largest gradient: nan of " in said
    assert "the last good checkpoint is" in said
    assert "step-00000002" in said
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_clipped_step_is_no_longer_than_asked() -> None:
    seen: list[float] = []

    class Measured(ByHand):
        def optimizer(self) -> torch.optim.Optimizer:
            made = torch.optim.SGD([{"params": list(self.trainable().values()), "name": "all"}], lr=1.0)
            made.register_step_pre_hook(self.note)
            return made

        def note(self, *_: Any) -> None:
            norms = [p.grad.norm() for p in self.trainable().values() if p.grad is not None]
            seen.append(float(torch.stack(norms).norm()))

    run(Measured(model()), clip_grad=1e-3, epochs=1)
    assert seen
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in seen)


def test_bf16_trains_in_fp32_weights_near_what_fp32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        applied = planned("full")
        losses[precision] = run(applied, precision=precision).loss
        assert {p.dtype for p in applied.trainable().values()} == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_fp16_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match="fp16 needs a CUDA device"):
        make_accelerator("fp16")


def test_the_largest_batch_grows_with_memory_and_ends_at_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for free in (10e6, 20e6, 40e6, 1e12):
        monkeypatch.setattr(auto_batch, "_free_bytes", lambda device, free=free: int(free))
        run_ = Run(planned("full"), colour_pairs(32), {}, Words(), transform(), None, _settings())
        sizes.append(run_.batch_size)
    assert sizes == sorted(sizes)
    assert sizes[-1] == 256
    assert all(size % 8 == 0 for size in sizes)
    assert sizes[2] > 1.5 * sizes[1] > sizes[0]


def _settings() -> Any:
    from clipfreeze.train.settings import training_settings

    return training_settings(batch_size="auto", epochs=1)


def test_what_is_kept_for_backward_is_bounded_by_what_the_estimate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipfreeze.train.objective import Contrastive

    module = Contrastive(model())
    batch = {"image": tiny.images(module.model), "text": tiny.tokens(module.model), "concepts": torch.arange(4)}
    engine = make_accelerator()
    sizes = [auto_batch._kept_bytes(module, auto_batch._repeated(batch, module, size), engine) for size in (2, 4, 8)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.02)


def test_too_little_memory_for_two_pairs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "_free_bytes", lambda device: 1000)
    with pytest.raises(RunError, match="not even two pairs fit"):
        run(planned("full"), batch_size="auto")


def test_a_tracker_gets_every_step(tmp_path: Path) -> None:
    run(planned("projections"), folder=tmp_path, trackers=("tensorboard",))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents.*.0")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "words"), [("weights", "there is no tracker 'weights'"), ("mlflow", "pip install mlflow")]
)
def test_a_tracker_that_is_not_there_is_an_input_error(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipfreeze.train.journal.filter_trackers", lambda names, logging_dir: [])
    with pytest.raises(DataError, match=words):
        run(planned("projections"), trackers=(name,))


def test_too_many_broken_pictures_end_the_run_with_their_list(caplog: pytest.LogCaptureFixture) -> None:
    from dataclasses import replace

    pairs = colour_pairs(2)
    broken = replace(pairs, pairs=tuple(replace(p, image=b"") if i % 5 == 0 else p for i, p in enumerate(pairs)))
    values: dict[str, Any] = {"epochs": 2, "batch_size": 4, "tokenizer": Words(), "transform": transform()}
    with pytest.raises(RunError, match=r"of 16 pictures are broken") as caught:
        fit(planned("projections"), broken, **values)
    assert "red 0: the file is empty" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        result = fit(planned("projections"), broken, max_bad=0.5, **values)
    assert len(result.broken) == 4
    assert "left out: red 0: the file is empty" in caplog.text


def test_class_prompts_train_by_cross_entropy_over_all_classes() -> None:
    applied = ByHand(model())
    pairs = colour_pairs(2, labelled=True)
    result = fit(
        applied, pairs, {"target": pairs}, tokenizer=Words(), transform=transform(), objective="classes", epochs=30,
        batch_size=8,
    )  # fmt: skip
    assert result.loss < 0.8 * torch.tensor(float(len(COLOURS))).log().item()
    assert result.after["target"].scores["nll"].value < result.before["target"].scores["nll"].value
    with pytest.raises(DataError, match="8 captions of 8 pictures are no class names"):
        run(planned("full"), objective="classes")


def test_captions_that_are_class_names_are_classes() -> None:
    named = colour_pairs(2, labelled=True)
    table = PairSet("table", tuple(Pair(p.image, p.captions, p.place) for p in named))
    losses = []
    for pairs in (named, table):
        result = fit(
            ByHand(model()),
            pairs,
            tokenizer=Words(),
            transform=transform(),
            objective="classes",
            batch_size=8,
            epochs=1,
        )  # type: ignore[arg-type]
        losses.append(result.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_scaled_step_that_overflows_is_left_out_and_too_many_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(precision: str) -> Any:
        accelerator: Any = make_accelerator()
        monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
        return accelerator

    monkeypatch.setattr("clipfreeze.train.loop.make_accelerator", scaled)

    class Overflows(Callback):
        """The loss after the second step is no number, once or for ever."""

        def __init__(self, once: bool) -> None:
            self.once = once
            self.scales: dict[int, float] = {}

        def on_step(self, run: Run, record: Any) -> None:
            module: Any = run.engine.module
            self.scales[record["step"]] = run.applied.trainable()["logit_scale"].item()
            if record["step"] == 2:
                self.objective = module.objective
                module.objective = lambda *given: self.objective(*given) * float("nan")
            if record["step"] == 3 and self.once:
                module.objective = self.objective

    once = Overflows(True)
    assert run(planned("logit_scale"), callbacks=[once], epochs=4).steps == 8
    assert once.scales[2] == once.scales[3] != once.scales[4]  # the third step was left out
    with pytest.raises(RunError, match="the loss is nan at step 22"):
        run(planned("logit_scale"), callbacks=[Overflows(False)], epochs=20)


def test_weights_that_are_no_numbers_are_in_no_checkpoint(tmp_path: Path) -> None:
    class Hooked(Callback):
        def on_step(self, run: Run, record: Any) -> None:
            if record["step"] == 2:
                run.applied.trainable()["logit_scale"].register_hook(lambda grad: grad * float("nan"))

    with pytest.raises(RunError, match="weights are not finite numbers after step 3: logit_scale"):
        run(planned("projections"), folder=tmp_path, callbacks=[Hooked()], save_every="1 steps")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_another_precision_than_the_process_has_is_refused() -> None:
    make_accelerator("fp32")
    with pytest.raises(DataError, match="already"):
        run(planned("full"), precision="bf16")


def test_an_objective_that_does_not_reach_the_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(COLOURS))
    applied = planned("head", classes=str(tmp_path / "classes.txt"), init="zeros")
    values: dict[str, Any] = {"tokenizer": Words(), "transform": transform(), "batch_size": 4}
    with pytest.raises(DataError, match="the contrastive loss does not reach the head"):
        fit(applied, colour_pairs(labelled=True), objective="contrastive", **values)


def test_measuring_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to measure"):
        run(planned("full"), evaluate_every="2 steps")


def test_a_path_gives_the_part_it_names_for_training(tmp_path: Path) -> None:
    rows = ["image,caption,split"]
    for number, pair in enumerate(colour_pairs(2)):
        assert isinstance(pair.image, bytes)
        (tmp_path / f"{number}.png").write_bytes(pair.image)
        rows.append(f"{number}.png,{pair.captions[0]},{'train' if number < 10 else 'val'}")
    (tmp_path / "all.csv").write_text("\n".join(rows))
    values: dict[str, Any] = {"tokenizer": Words(), "transform": transform(), "epochs": 1, "batch_size": 2}
    result = fit(planned("projections"), tmp_path / "all.csv", {"target": tmp_path / "all.csv"}, **values)
    assert (result.steps, result.after["target"].images) == (5, 6)


def test_tf32_is_for_all_but_who_asks_for_fp32() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for precision, rounded in (("fp32", False), ("auto", True), ("bf16", True)):
            choose_tf32(precision)
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == rounded
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
