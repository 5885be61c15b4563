"""Rows come back bit for bit or not at all: after kills, cuts, flips, full disks, deletions and other writers."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from clipfreeze.errors import DataError
from clipfreeze.train import store_records, store_segment
from clipfreeze.train.store import Store
from clipfreeze.train.store_folder import MARK, Use
from clipfreeze.train.store_reader import Reader
from clipfreeze.train.store_records import DTYPES
from clipfreeze.train.store_segment import INDEX, ROWS, seek_and_read

NAME, OTHER, PLENTY = "ab" * 16, "cd" * 16, 10**9


def key(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


def row(number: int, size: int = 100) -> Tensor:
    return torch.arange(number, number + size, dtype=torch.float32)


def write(store: Store, numbers: range, size: int = 100) -> None:
    store.write([key(number) for number in numbers], [row(number, size) for number in numbers])


def here(store: Store, numbers: range, size: int = 100) -> list[int]:
    """The numbers whose rows are here, each checked to be right."""
    rows = store.read([key(number) for number in numbers])
    found = [(number, read) for number, read in zip(numbers, rows, strict=True) if read is not None]
    assert all(torch.equal(read, row(number, size)) for number, read in found)
    return [number for number, _ in found]


@contextmanager
def opened(folder: Path, name: str = NAME, most_bytes: int = PLENTY) -> Iterator[Store]:
    store = Store(folder, name, most_bytes)
    try:
        yield store
    finally:
        store.close()


def only(folder: Path, suffix: str) -> Path:
    (path,) = (folder / NAME).glob("*" + suffix)
    return path


SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES, st.binary(min_size=8, max_size=8)), max_size=6))
@hypothesis_settings(max_examples=30)
def test_rows_of_any_dtype_and_shape_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, tuple[int, ...], bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    rows = []
    for dtype, shape, pattern in kinds:  # patterns hold NaNs with payloads and negative zeros too
        count = torch.Size(shape).numel()
        memory = torch.frombuffer(bytearray(pattern * max(count, 1)), dtype=torch.uint8)
        bits = memory % 2 if dtype == torch.bool else memory
        rows.append(bits.view(dtype)[:count].reshape(shape))
    keys = [key(number) for number in range(len(rows))]
    with opened(folder) as store:
        store.write(keys, rows)
        at_once = store.read(keys)
    with opened(folder) as store:
        later = store.read(keys)
    for read in (at_once, later):
        for wrote, got in zip(rows, read, strict=True):
            assert got is not None
            assert (got.dtype, got.shape) == (wrote.dtype, wrote.shape)
            assert torch.equal(got.reshape(-1).view(torch.uint8), wrote.reshape(-1).view(torch.uint8))


def test_a_row_that_is_no_plain_block_of_memory_is_kept_by_its_values(tmp_path: Path) -> None:
    grid = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    with opened(tmp_path) as store:
        store.write([key(0), key(1)], [grid.T, grid[:, 1]])
        turned, column = store.read([key(0), key(1)])
    assert turned is not None
    assert torch.equal(turned, grid.T)
    assert column is not None
    assert torch.equal(column, grid[:, 1])


def test_what_a_store_cannot_hold_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for kept in (torch.zeros(1, 1, 1, 1, 1), torch.zeros(2, dtype=torch.complex64)):
            with pytest.raises(ValueError, match="cannot keep"):
                store.write([key(0)], [kept])
        write(store, range(1))
        assert here(store, range(2)) == [0]


def test_a_key_keeps_its_first_row(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write(store, range(3))
        size = only(tmp_path, ROWS).stat().st_size
        store.write([key(0), key(3), key(3)], [row(9), row(3), row(9)])
        assert only(tmp_path, ROWS).stat().st_size == size + row(3).nbytes
        assert here(store, range(5)) == [0, 1, 2, 3]


def test_a_read_row_is_the_callers_own(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write(store, range(2))
        (first,) = store.read([key(0)])
        assert first is not None
        first.zero_()
        assert here(store, range(2)) == [0, 1]


def test_a_store_opened_again_has_what_it_had_and_takes_more(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write(store, range(3))
    with opened(tmp_path) as store:
        write(store, range(6))
    with opened(tmp_path) as store:
        assert here(store, range(7)) == [0, 1, 2, 3, 4, 5]
        assert store.take_notes() == []
    with opened(tmp_path, OTHER) as store:
        assert here(store, range(7)) == []


def test_records_are_found_however_often_they_were_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_records, "MOST_UNSORTED", 3)
    with opened(tmp_path) as store, opened(tmp_path) as other:
        for start in range(0, 40, 4):
            write(store, range(start, start + 4))
            write(other, range(start + 100, start + 104))
            if start % 8:
                store.refresh()
        store.refresh()
        assert here(store, range(200)) == [*range(40), *range(100, 140)]


def test_what_others_write_shows_at_refresh(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        write(one, range(2))
        write(other, range(5, 6))
        assert here(other, range(9)) == [5]
        other.refresh()
        assert here(other, range(9)) == [0, 1, 5]
        write(one, range(4))
        other.refresh()
        other.refresh()
        assert here(other, range(9)) == [0, 1, 2, 3, 5]


def write_and_die(folder: Path, go: int) -> None:
    """In a process of its own: wait for a byte, write 0 to 99, and be killed in the middle of the row 100."""

    def half(file: io.FileIO, data: memoryview) -> None:
        file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    store = Store(folder, NAME, PLENTY)
    os.read(go, 1)
    for start in range(0, 100, 10):
        write(store, range(start, start + 10))
    store_segment.write_all = half  # type: ignore[assignment]
    write(store, range(100, 110))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does a few plain writes and dies
def test_two_processes_write_at_once_and_one_is_killed_in_mid_write(tmp_path: Path) -> None:
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_and_die(tmp_path, wait)
        finally:
            os._exit(1)
    with opened(tmp_path) as store:
        os.write(go, b"!")
        for number in range(95, 205):
            if number != 103:
                write(store, range(number, number + 1))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        store.refresh()
        assert here(store, range(300)) == [number for number in range(205) if number != 103]
        write(store, range(103, 104))
        assert here(store, range(103, 104)) == [103]
    with opened(tmp_path) as store:
        assert here(store, range(300)) == list(range(205))
    os.close(wait)
    os.close(go)


@pytest.fixture(scope="module")
def ten_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ten")
    with opened(folder) as store:
        write(store, range(10))
    return folder


@pytest.mark.parametrize("suffix", [ROWS, INDEX])
@given(share=st.floats(0, 1), flips=st.integers(0, 255))
@hypothesis_settings(max_examples=40)
def test_a_damaged_file_loses_rows_and_never_gives_wrong_ones(
    tmp_path_factory: pytest.TempPathFactory, ten_rows: Path, suffix: str, share: float, flips: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(ten_rows, folder)
    path = only(folder, suffix)
    whole = bytearray(path.read_bytes())
    at = min(int(share * len(whole)), len(whole) - 1)
    if flips:
        whole[at] ^= flips
        path.write_bytes(whole)
    else:
        os.truncate(path, at)
    unit = len(whole) // (10 if suffix == ROWS else 11)
    with opened(folder) as store:
        left = here(store, range(10))
        if suffix == ROWS:
            assert left == [number for number in range(10) if (number != at // unit if flips else number < at // unit)]
        elif not flips:
            assert left == list(range(max(at // unit - 1, 0)))
        else:  # without its header, which names version and byte order, nothing is read
            assert len(left) >= 9 if at >= unit else left == []
        write(store, range(10))
        assert here(store, range(10)) == list(range(10))
    with opened(folder) as store:
        assert here(store, range(10)) == list(range(10))


def test_of_rows_written_twice_the_later_counts(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        write(one, range(300), 1)
        first = only(tmp_path, ROWS)
        write(other, range(300), 1)
    first.write_bytes(bytes(1200))
    with opened(tmp_path) as store:
        assert here(store, range(300), 1) == list(range(300))


def test_a_damaged_row_is_written_anew_whatever_came_between(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write(store, range(4))
    with opened(tmp_path) as store, opened(tmp_path) as other:
        os.truncate(only(tmp_path, ROWS), 450)
        assert here(store, range(4)) == [0]
        write(other, range(7, 9))
        store.refresh()
        write(store, range(4))
        assert here(store, range(9)) == [0, 1, 2, 3, 7, 8]


def test_a_refresh_reads_only_what_was_added(tmp_path: Path) -> None:
    reader = Reader(tmp_path / NAME)
    with opened(tmp_path) as store:
        for count in (3, 2):
            write(store, range(count * 10, count * 11))
            assert [len(records) for records in reader.new_records(but=None)] == [count]
            assert [len(records) for records in reader.new_records(but=None)] == [0]


def test_rows_that_are_cut_while_the_store_is_open_are_not_there(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write(store, range(4))
        os.truncate(only(tmp_path, ROWS), 450)
        assert here(store, range(4)) == [0]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted")
def test_a_store_that_somebody_deletes_goes_on_from_its_open_files(tmp_path: Path) -> None:
    with opened(tmp_path) as writer, opened(tmp_path) as reader:
        write(writer, range(3))
        reader.refresh()
        assert here(writer, range(3)) == [0, 1, 2]
        shutil.rmtree(tmp_path / NAME)
        assert here(writer, range(3)) == [0, 1, 2]
        assert here(reader, range(3)) == []
        for store in (writer, reader):
            store.refresh()
            store.refresh()
            write(store, range(3, 5))
            (note,) = store.take_notes()
            assert "was deleted" in note
    with opened(tmp_path) as store:
        write(store, range(2))
        assert here(store, range(3)) == [0, 1]


def test_a_full_disk_stops_the_writing_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(file: io.FileIO, data: memoryview) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as store:
        write(store, range(3))
        size = only(tmp_path, ROWS).stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(store_segment, "write_all", half)
            write(store, range(3, 6))
        write(store, range(6, 9))
        (note,) = store.take_notes()
        assert "No space left on device" in note
        assert store.take_notes() == []
        assert here(store, range(9)) == [0, 1, 2]
        assert only(tmp_path, ROWS).stat().st_size == size
    with opened(tmp_path) as store:
        assert here(store, range(9)) == [0, 1, 2]
        write(store, range(9))
        assert here(store, range(9)) == list(range(9))


@pytest.mark.parametrize("kind", [memoryview, bytes])
def test_an_interrupted_write_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    def half(file: io.FileIO, data: memoryview | bytes) -> None:
        stops = isinstance(data, kind)  # in the rows, or in the index
        file.write(data[: len(data) // 2] if stops else data)
        if stops:
            raise KeyboardInterrupt

    with opened(tmp_path) as store:
        write(store, range(3))
        with monkeypatch.context() as patch:
            patch.setattr(store_segment, "write_all", half)
            with pytest.raises(KeyboardInterrupt):
                write(store, range(3, 6))
        write(store, range(4, 9))
    with opened(tmp_path) as store:
        assert here(store, range(9)) == [0, 1, 2, 4, 5, 6, 7, 8]


def test_what_the_system_does_not_take_at_once_is_written_in_parts(tmp_path: Path) -> None:
    class Reluctant(io.FileIO):
        def write(self, data: memoryview) -> int:  # type: ignore[override]
            return super().write(data[:7])

    with Reluctant(tmp_path / "file", "w") as file:
        store_segment.write_all(file, bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    if exists:
        with opened(tmp_path) as store:
            write(store, range(3))

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Use, "__init__", refuse)  # root may write anywhere, so the system cannot be asked to refuse
    with opened(tmp_path) as store:
        write(store, range(5))
        store.refresh()
        assert here(store, range(5)) == ([0, 1, 2] if exists else [])
        (note,) = store.take_notes()
        assert "Read-only file system" in note


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_to_write_is_read(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write(store, range(3))
    (tmp_path / NAME).chmod(0o500)
    try:
        with opened(tmp_path) as store:
            write(store, range(5))
            assert here(store, range(5)) == [0, 1, 2]
            assert len(store.take_notes()) == 1
    finally:
        (tmp_path / NAME).chmod(0o700)


def test_a_cache_folder_that_is_a_file_or_beneath_one_is_an_error_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="--cache-dir") as caught:
            Store(folder, NAME, PLENTY)
        assert caught.value.problems[0].path == str(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_cache_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "b") as store:
        write(store, range(1))
        assert here(store, range(1)) == [0]


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.*") if path.suffix in (ROWS, INDEX))


def used_at(folder: Path, name: str, seconds: float) -> None:
    os.utime(folder / name / MARK, (seconds, seconds))


def three_stores(folder: Path) -> list[str]:
    """Three closed stores of 4.5 KB each; the first is the least recently used, though it was written last."""
    names = [letter * 16 for letter in "bca"]
    for name in reversed(names):
        with opened(folder, name) as store:
            write(store, range(10))
    for age, name in enumerate(names):
        used_at(folder, name, 1e9 + age)
    return names


def test_opening_makes_room_by_what_was_used_least_recently(tmp_path: Path) -> None:
    oldest, middle, newest = three_stores(tmp_path)
    with opened(tmp_path, oldest, 10_000) as store:  # which is used now
        assert here(store, range(10)) == list(range(10))
        assert not (tmp_path / middle).exists()
    with opened(tmp_path, newest) as store:
        assert here(store, range(10)) == list(range(10))


def test_opening_is_use(tmp_path: Path) -> None:
    oldest, middle, newest = three_stores(tmp_path)
    with opened(tmp_path, oldest):
        pass
    with opened(tmp_path, NAME, 10_000):
        assert [(tmp_path / name).exists() for name in (oldest, middle, newest)] == [True, False, True]


def test_writing_makes_room_too(tmp_path: Path) -> None:
    names = three_stores(tmp_path)
    with opened(tmp_path, NAME, 22_000) as store:
        assert all((tmp_path / name).exists() for name in names)
        write(store, range(10))
        assert here(store, range(10)) == list(range(10))
        assert store.take_notes() == []
    assert [(tmp_path / name).exists() for name in names] == [False, True, True]


def test_a_store_that_is_open_is_never_taken_away(tmp_path: Path) -> None:
    oldest, middle, newest = three_stores(tmp_path)
    with opened(tmp_path, oldest, 15_000):
        used_at(tmp_path, oldest, 1e9)
        with opened(tmp_path, NAME, 10_000):
            assert [(tmp_path / name).exists() for name in (oldest, middle, newest)] == [True, False, True]


def test_a_store_that_a_killed_process_had_open_can_go(tmp_path: Path) -> None:
    oldest, *_ = three_stores(tmp_path)
    with opened(tmp_path, oldest):
        (lease,) = (tmp_path / oldest).glob("open-*")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    _, machine, _, end = lease.name.split("-")
    lease.with_name(f"open-{machine}-{process.pid}-{end}").touch()  # of a process that is no more
    lease.with_name(f"open-{machine}-{os.getpid()}-{end}").touch()  # of one whose number we bear now
    os.utime(lease.with_name(f"open-{machine}-{os.getpid()}-{end}"), (1e9, 1e9))
    used_at(tmp_path, oldest, 1e9)
    with opened(tmp_path, NAME, 10_000):
        assert not (tmp_path / oldest).exists()


def test_a_store_stops_at_the_bound_says_so_once_and_is_read_on(tmp_path: Path) -> None:
    bound = 40_000
    with opened(tmp_path, most_bytes=bound) as store:
        for start in range(0, 200, 10):
            write(store, range(start, start + 10))
        kept = here(store, range(200))
        assert kept == list(range(len(kept)))
        assert 0.7 * bound < held(tmp_path) < bound
        (note,) = store.take_notes()
        assert "is full" in note
    with opened(tmp_path, most_bytes=bound) as store:
        write(store, range(200, 300))
        assert here(store, range(300)) == kept
        assert held(tmp_path) < bound


def test_many_writers_together_stay_under_the_bound(tmp_path: Path) -> None:
    bound = 100_000
    stores = [Store(tmp_path, name, bound) for name in (NAME, NAME, NAME, OTHER)]
    for start in range(0, 400, 4):
        for number, store in enumerate(stores):
            write(store, range(start + number, start + number + 1))
    for store in stores:
        store.close()
    assert 0.7 * bound < held(tmp_path) < bound


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    oldest, *_ = three_stores(tmp_path)
    foreign = {
        "notes.txt": "mine",
        f"{'d' * 16}/picture.png": "no store: it bears a hex name, and no mark",
        f"photos/{MARK}": "no store: it bears no hex name",
        f"{'e' * 16}": "a file named like a store",
        f"{oldest}/notes.txt": "mine, in a store",
        f"{oldest}/kept{ROWS}": "mine, though it ends like ours",
    }
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text * 1000)
    with opened(tmp_path, NAME, 1000) as store:
        store.refresh()
    assert all((tmp_path / name).read_text() == text * 1000 for name, text in foreign.items())
    assert not list((tmp_path / oldest).glob("*" + INDEX))
    with opened(tmp_path, "e" * 16) as store:
        write(store, range(1))
        assert here(store, range(1)) == []
        assert len(store.take_notes()) == 1


def test_files_that_end_like_ours_are_no_rows(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write(store, range(2))
    (tmp_path / NAME / f"x{INDEX}").write_bytes(b"y" * 500)
    (tmp_path / NAME / f"x{ROWS}").write_bytes(b"y" * 500)
    with opened(tmp_path) as store:
        assert here(store, range(9)) == [0, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_writes_into_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        write(store, range(2))
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write(store, range(2, 4))
        assert len(list((tmp_path / NAME).glob("*" + INDEX))) == 2
        assert here(store, range(9)) == [0, 1, 2, 3]


def test_threads_share_a_store(tmp_path: Path) -> None:
    def work(start: int) -> list[int]:
        for number in range(start, start + 50):
            write(store, range(number, number + 3))
            if number % 10 == 0:
                store.refresh()
        return here(store, range(start, start + 52))

    with opened(tmp_path) as store, ThreadPoolExecutor(4) as pool:
        starts = (0, 20, 40, 60)
        assert list(pool.map(work, starts)) == [list(range(start, start + 52)) for start in starts]


def test_more_files_than_stay_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipfreeze.train.store_reader._MOST_OPEN", 1)
    for number in range(3):
        with opened(tmp_path) as store:
            write(store, range(number, number + 1))
    with opened(tmp_path) as store:
        assert here(store, range(9)) == here(store, range(9)) == [0, 1, 2]


def test_systems_without_positioned_reads_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        write(store, range(5))
        monkeypatch.setattr("clipfreeze.train.store_reader.read_at", seek_and_read)
        assert here(store, range(5)) == list(range(5))
        os.truncate(only(tmp_path, ROWS), 450)
        assert here(store, range(5)) == [0]
