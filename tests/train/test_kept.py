"""What is kept of frozen parts: used again, and where anything is wrong with it, worked out anew."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

from clipfreeze.changes import apply
from clipfreeze.errors import DataError
from clipfreeze.plan.build import resolve
from clipfreeze.policy.loading import load_policy
from clipfreeze.train import batches, store_segment, thrift
from clipfreeze.train.identity import transform_name
from clipfreeze.train.kept import Budget, Kept, Memory
from clipfreeze.train.loop import Result, fit

import tiny
from hand import Words, colour_pairs, transform


def run(
    policy: str = "last_n",
    change: Callable[[Any], object] = lambda model: None,
    family: str = "clip_vit",
    **settings: Any,
) -> tuple[dict[str, Tensor], Result]:
    """The trained weights of three epochs on 16 pictures, from the same start."""
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]()
    with torch.no_grad():
        change(model)
    knobs = {"n": 1} if policy == "last_n" else {}
    applied = apply(resolve(load_policy(policy, **knobs), model), model)
    settings = {"epochs": 3, "batch_size": 4, "transform": transform(), **settings}
    result = fit(applied, colour_pairs(2), tokenizer=Words(), **settings)
    return {name: value.detach().clone() for name, value in applied.trainable().items()}, result


def assert_like(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def prefixed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each time that samples go through a frozen prefix, how many."""
    counts: list[int] = []
    through = thrift.Thrift._through

    def counted(self: Any, prefix: Any, given: Tensor, at_once: int) -> list[Tensor]:
        counts.append(len(given))
        return through(self, prefix, given, at_once)

    monkeypatch.setattr(thrift.Thrift, "_through", counted)
    return counts


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures that were decoded."""
    names: list[str] = []
    open_image = batches.open_image

    def noted(image: Any, place: str) -> Any:
        names.append(place)
        return open_image(image, place)

    monkeypatch.setattr(batches, "open_image", noted)
    return names


def test_a_sample_goes_through_the_prefix_once_and_its_picture_is_decoded_once(prefixed, opened):
    run()
    assert sum(prefixed) == 32  # 16 pictures and 16 captions
    assert len(opened) == 16


def test_another_run_with_the_same_frozen_part_starts_from_what_is_on_disk(tmp_path, prefixed, opened):
    plain, _ = run()
    first, _ = run(cache_dir=str(tmp_path))
    prefixed.clear(), opened.clear()
    second, _ = run(cache_dir=str(tmp_path), cache_ram="0")
    assert not prefixed
    assert len(opened) == 4  # of the first batch, which tells what is frozen
    assert_like(first, plain)
    assert_like(second, plain)


@pytest.mark.parametrize("policy", ["projections", "logit_scale", "lora"])
def test_policies_with_other_cuts_do_not_meet_on_disk(policy, tmp_path):
    run(cache_dir=str(tmp_path))
    assert_like(run(policy, cache_dir=str(tmp_path))[0], run(policy)[0])


def test_changed_weights_before_the_cut_are_another_prefix(tmp_path, prefixed):
    def stir(model: Any) -> None:
        model.visual.conv1.weight[0, 0, 0, 0] += 1

    run(cache_dir=str(tmp_path))
    prefixed.clear()
    found, _ = run(change=stir, cache_dir=str(tmp_path))
    assert sum(prefixed) == 16  # pictures; the text tower is the same
    assert_like(found, run(change=stir)[0])


def test_another_transform_gives_other_rows(tmp_path, prefixed):
    other = Compose([ToTensor(), Normalize((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))])
    other.transforms.insert(0, transform().transforms[0])
    other.transforms.insert(1, transform().transforms[1])
    run(cache_dir=str(tmp_path))
    prefixed.clear()
    found, _ = run(transform=other, cache_dir=str(tmp_path))
    assert sum(prefixed) == 16
    assert_like(found, run(transform=other)[0])


def test_a_transform_that_does_not_say_what_it_does_is_kept_in_memory_alone(tmp_path, prefixed):
    known = transform()
    run(transform=lambda picture: known(picture), cache_dir=str(tmp_path))
    prefixed.clear()
    run(transform=lambda picture: known(picture), cache_dir=str(tmp_path))
    assert sum(prefixed) == 16  # captions are on disk


def test_functions_that_differ_in_a_number_are_other_transforms():
    def made(number: str) -> Any:
        scope: dict[str, Any] = {"__name__": "transforms"}
        exec(f"def turn(picture, by=1): return picture.rotate({number} * by)", scope)
        return scope["turn"]

    assert transform_name(made("3")) == transform_name(made("3"))
    assert transform_name(made("3")) != transform_name(made("4"))


@pytest.mark.parametrize("fault", ["cut", "flipped", "gone"])
def test_damaged_files_are_worked_out_anew(fault, tmp_path):
    run(cache_dir=str(tmp_path))
    files = list(tmp_path.rglob("*.rows"))
    assert files
    for path in files:
        held = bytearray(path.read_bytes())
        if fault == "cut":
            path.write_bytes(held[: len(held) // 2])
        elif fault == "flipped":
            held[::97] = bytes(byte ^ 255 for byte in held[::97])
            path.write_bytes(held)
        else:
            path.unlink()
    assert_like(run(cache_dir=str(tmp_path))[0], run()[0])


def test_a_full_disk_ends_the_writing_with_a_note_and_not_the_run(tmp_path, monkeypatch):
    def full(file: Any, data: Any) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_segment, "write_all", full)
    found, result = run(cache_dir=str(tmp_path))
    assert any("No space left on device" in note for note in result.notes)
    assert_like(found, run()[0])


def test_a_folder_that_cannot_be_one_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        run(cache_dir=str(tmp_path / "file"))


def test_without_room_everything_is_worked_out_each_time(prefixed):
    found, _ = run(cache_ram="0")
    assert sum(prefixed) == 96
    assert_like(found, run()[0])


def test_rows_in_bf16_are_near(prefixed):
    found, expected = run(cache_dtype="bf16")[0], run()[0]
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-3
    assert any(not torch.equal(found[name], value) for name, value in expected.items())


def test_augmented_pictures_are_not_kept_unless_views_are_counted(prefixed, opened):
    run(transform=transform(train=True))
    assert len(opened) == 48
    opened.clear()
    run(transform=transform(train=True), views=2)
    assert len(opened) == 32


def test_views_change_nothing_where_a_transform_draws_no_numbers():
    assert_like(run(views=2)[0], run()[0])


def test_a_budget_holds_what_fits_and_no_more():
    kept = Kept(Memory(Budget(3 * 8 * 4)))
    rows = [torch.full((2, 4), float(number)) for number in range(5)]
    kept.put(list(range(5)), rows)
    found = kept.fetch(list(range(5)))
    assert [row is not None for row in found] == [True, True, True, False, False]
    torch.testing.assert_close(found[2], rows[2])
    assert kept.memory.bytes == 3 * 8 * 4


def test_rows_of_unlike_length_come_back_as_they_were():
    kept = Kept(Memory(Budget(10**6)))
    rows = [torch.randn(length, 3) for length in (4, 1, 7)]
    kept.put(["a", "b", "c"], rows)
    for found, row in zip(kept.fetch(["c", "a", "b"]), (rows[2], rows[0], rows[1]), strict=True):
        assert torch.equal(found, row)
