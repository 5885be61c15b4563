"""A run folder is claimed once, keeps what repeats the run, and never holds half a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from clipfreeze.errors import DataError, RunError
from clipfreeze.train.folder import METRICS, append_json, run_folder, write_text
from clipfreeze.train.sources import read_data
from clipfreeze.train.spec import RunSpec, read_spec, repeatable, toml_text, write_spec
from clipfreeze.train.stream import StreamLoader, read_stream
from clipfreeze.train.table import TableFormat

from hand import transform
from shard_files import write_shards


def begin(out: Path | None, policy: str = "last_n") -> Path:
    with run_folder(out, policy) as folder:
        append_json(folder / METRICS, {"step": 1})
    return folder


def end_before_the_first_step(out: Path | None) -> None:
    with run_folder(out, "full") as folder:
        write_text(folder / "run.toml", "")
        raise DataError("found later")


def test_folders_are_numbered_by_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [str(begin(None, name)) for name in ("last_n", "last_n", "my own/one")] == [
        "runs/last_n-1",
        "runs/last_n-2",
        "runs/my_own_one-1",
    ]


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    with pytest.raises(DataError, match="is not empty"):
        begin(folder)
    assert (folder / METRICS).read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"is a file|cannot write to .*file"):
        begin(tmp_path / place)


def test_two_runs_at_once_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with run_folder(None, "full") as one, run_folder(None, "full") as other:
        assert (one, other) == (Path("runs/full-1"), Path("runs/full-2"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_locked_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="Permission denied"):
        begin(tmp_path / "run")


def test_a_run_without_a_step_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for out in (None, tmp_path / "new" / "run", tmp_path / "mine"):
        with pytest.raises(DataError, match="later"):
            end_before_the_first_step(out)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_no_room_gives_the_systems_words_and_no_half_a_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # Unix
    metrics, whole = tmp_path / METRICS, tmp_path / "results.json"
    append_json(metrics, {"step": 1})
    write_text(whole, "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: File too large"):
            append_json(metrics, {"step": 2, "text": "x" * 100})
        with pytest.raises(RunError, match=r"cannot write .*results.json: File too large"):
            write_text(whole, "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert metrics.read_text() == '{"step": 1}\n'
    assert whole.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


scalars = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.dictionaries(st.text(), scalars | st.dictionaries(st.text(), scalars, min_size=1)))
def test_what_is_written_as_toml_is_read_back(values: dict[str, object]) -> None:
    assert tomli.loads(toml_text(values)) == values


@pytest.mark.parametrize(
    "spec",
    [
        RunSpec(policy="last_n"),
        RunSpec(
            policy="full",
            params={"lr": 1e-5, "n": 4, "logit_scale": False, "freeze": "text"},
            model="ViT-B-32",
            pretrained="openai",
            table=TableFormat(separator="\t", image_column='a "b"'),
            num_workers=2,
        ),
    ],
)
def test_a_spec_is_read_back_as_it_was(tmp_path: Path, spec: RunSpec) -> None:
    write_spec(spec, tmp_path)
    assert read_spec(tmp_path) == spec


def test_paths_hold_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.csv", "mine.toml", "full"):
        Path(name).touch()
    spec = repeatable(RunSpec(policy="mine.toml", data="pairs.csv", model="local-dir:model", pretrained="openai"))
    assert (spec.data, spec.policy) == (str(tmp_path / "pairs.csv"), str(tmp_path / "mine.toml"))
    assert (spec.model, spec.pretrained) == (f"local-dir:{tmp_path / 'model'}", "openai")
    assert repeatable(RunSpec(policy="full")).policy == "full"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("pairs.csv", "{cwd}/pairs.csv"),
        ("shards", "{cwd}/shards"),
        ("{cwd}/pairs.csv", "{cwd}/pairs.csv"),
        ("shards/{{0..3}}.tar", "{cwd}/shards/{{0..3}}.tar"),
        ("shards/*.tar", "{cwd}/shards/*.tar"),
        ("hf:shards", "hf:{cwd}/shards"),
        ("hf:shards:test", "hf:{cwd}/shards:test"),
        ("hf:cifar10:test", "hf:cifar10:test"),
        ("file:shards/{{0..3}}.tar", "file:{cwd}/shards/{{0..3}}.tar"),
        ("file:/shards/{{0..3}}.tar", "file:/shards/{{0..3}}.tar"),
        ("pipe:cat shards/{{0..3}}.tar", "pipe:cat shards/{{0..3}}.tar"),
        ("https://host/{{0..3}}.tar", "https://host/{{0..3}}.tar"),
    ],
)
def test_sources_hold_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").touch()
    Path("shards").mkdir()
    given, wanted = (text.format(cwd=tmp_path) for text in (source, expected))
    spec = repeatable(RunSpec(policy="full", data=given, val=given, retain=given))
    assert spec.data == spec.val == spec.retain == wanted
    assert repeatable(spec) == spec


def test_shards_are_found_from_any_folder_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a[b] 100%?#c"
    folder.mkdir()
    write_shards(folder, 2, 2)
    monkeypatch.chdir(folder)
    spec = repeatable(RunSpec(policy="full", data="*.tar", retain="{00000..00001}.tar", val="file:{00000..00001}.tar"))
    monkeypatch.chdir(tmp_path)
    assert len(read_data(str(spec.data))) == len(read_data(str(spec.retain))) == 4
    stream = StreamLoader(read_stream(str(spec.val), 4), transform(), None, batch_size=2, seed=0, num_workers=0)
    assert len(list(stream.batches(0))) == 2


def test_a_share_or_a_part_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("5%", "test"):
        Path(name).mkdir()
    assert repeatable(RunSpec(policy="full", val="5%")).val == "5%"
    assert repeatable(RunSpec(policy="full", val="test"), ["test"]).val == "test"
    assert repeatable(RunSpec(policy="full", val="test")).val == str(tmp_path / "test")


def test_files_beside_the_data_hold_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("names.txt", "store.csv"):
        Path(name).touch()
    Path("link.csv").symlink_to("store.csv")
    spec = RunSpec(policy="head", params={"classes": "names.txt"}, data="link.csv", table=TableFormat(image_root="a"))
    found = repeatable(spec)
    assert found.params == {"classes": str(tmp_path / "names.txt")}
    assert (found.data, found.table.image_root) == (str(tmp_path / "link.csv"), str(tmp_path / "a"))
    assert repeatable(RunSpec(policy="head", params={"classes": "data"})).params == {"classes": "data"}


@pytest.mark.parametrize(
    ("content", "words"),
    [("policy = ", "not valid TOML"), ("policy = 'full'\nepoch = 3", "epoch: Extra"), ("epochs = 0", "epochs: Input")],
)
def test_a_spoilt_spec_is_an_error_that_names_the_file(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(DataError, match=f"run.toml: {words}"):
        read_spec(tmp_path)


def test_another_folder_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no run folder"):
        read_spec(tmp_path)
