"""Data are the same wherever they lie and in every process, and others as soon as something is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfreeze.train.digest import digest_of
from clipfreeze.train.sources import read_data
from clipfreeze.train.stream import read_stream

from hand import colour_pairs
from shard_files import write_shards


def fill(folder: Path) -> None:
    write_shards(folder, 2, 3)
    rows = [{"image": pair.image, "caption": pair.captions[0]} for pair in colour_pairs()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    lines = ["image,caption"]
    for number, pair in enumerate(colour_pairs()):
        (folder / f"{number}.png").write_bytes(bytes(pair.image))  # type: ignore[arg-type]
        lines.append(f"{number}.png,{pair.captions[0]}")
    (folder / "pairs.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("source", ["pairs.csv", "pairs.parquet", "{00000..00001}.tar"])
def test_data_are_the_same_in_another_folder_and_when_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    fill(tmp_path)
    (tmp_path / "moved").mkdir()
    fill(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    digests = [digest_of(read_data(where)) for where in (source, source, tmp_path / source, f"moved/{source}")]
    assert len(set(digests)) == 1


def test_other_data_are_not_the_same(tmp_path: Path) -> None:
    fill(tmp_path)
    seen = {digest_of(read_data(f"{tmp_path}/{name}")) for name in ("pairs.csv", "00000.tar", "00001.tar")}
    shutil.copy(tmp_path / "00000.tar", tmp_path / "renamed.tar")
    seen.add(digest_of(read_data(tmp_path / "renamed.tar")))
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes() + b"x")
    seen.add(digest_of(read_data(tmp_path / "pairs.csv")))
    assert len(seen) == 5


def test_a_stream_is_its_shards_and_the_length_of_an_epoch() -> None:
    one = digest_of(read_stream("file:a/{0..3}.tar", 9))
    assert one == digest_of(read_stream("file:/b/{0..3}.tar", 9))
    assert one != digest_of(read_stream("file:a/{0..3}.tar", 8))
    assert one != digest_of(read_stream("file:a/{0..2}.tar", 9))
    assert digest_of(read_stream("pipe:cat a/0.tar", 9)) != digest_of(read_stream("pipe:cat b/0.tar", 9))
