"""An export appears whole or not at all, and never over anything."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from clipfreeze.errors import DataError, RunError
from clipfreeze.export import files, open_clip
from clipfreeze.export.files import whole_folder
from clipfreeze.export.open_clip import write_open_clip


def paths(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_folder_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "new" / "out"
    with whole_folder(out) as part:
        (part / "a").write_text("a")
        assert not out.exists()
    assert paths(tmp_path) == ["new", "new/out", "new/out/a"]


def test_an_empty_folder_is_taken_also_when_the_export_fails(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert paths(tmp_path) == ["out"]
    with whole_folder(tmp_path / "out") as part:
        (part / "a").write_text("a")
    assert paths(tmp_path) == ["out", "out/a"]


def test_a_folder_with_files_is_refused_and_left_alone(build, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(DataError, match="out is not empty"):
        write_open_clip(build(), tmp_path / "out")
    assert paths(tmp_path / "out") == ["mine"]
    assert not (tmp_path / "out.part").exists()


def test_a_file_in_the_place_of_the_folder_or_of_its_parent_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    for out, words in ((tmp_path / "out", "out is a file"), (tmp_path / "out" / "below", "cannot write to")):
        with pytest.raises(DataError, match=words), whole_folder(out):
            raise AssertionError
    assert paths(tmp_path) == ["out"]


def test_what_a_killed_export_left_is_in_the_way(tmp_path):
    (tmp_path / "out.part").mkdir()
    with pytest.raises(DataError, match=r"out\.part is in the way"), whole_folder(tmp_path / "out"):
        raise AssertionError
    assert paths(tmp_path) == ["out.part"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")],
)
def test_a_full_disk_leaves_nothing(build, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    loaded = build()
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*new/out: No space left on device"):
        write_open_clip(loaded, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weights_that_come_back_as_others_leave_nothing(build, tmp_path, monkeypatch):
    def broken(path, tensors):
        files.write_tensors(path, {**tensors, "ln_final.weight": tensors["ln_final.weight"] * 1.01})

    monkeypatch.setattr(open_clip, "write_tensors", broken)
    with pytest.raises(RunError, match="text features differ by"):
        write_open_clip(build(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_another_logit_scale_leaves_nothing(build, tmp_path, monkeypatch):
    def broken(path, tensors):
        files.write_tensors(path, {**tensors, "logit_scale": tensors["logit_scale"] + 0.1})

    monkeypatch.setattr(open_clip, "write_tensors", broken)
    with pytest.raises(RunError, match="logit_scale differ"):
        write_open_clip(build(), tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(build, tmp_path):
    loaded = build()
    torch.nn.init.constant_(loaded.model.visual.proj, float("nan"))
    with pytest.raises(RunError, match="not finite"):
        write_open_clip(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_have_the_modes_of_new_files(build, tmp_path):
    write_open_clip(build(), tmp_path / "out")
    (tmp_path / "new").touch()
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "new").stat().st_mode}
