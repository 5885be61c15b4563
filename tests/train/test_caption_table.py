"""A table of images and captions is read as a person reads it, or refused with file, line and the setting."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipfreeze.errors import DataError
from clipfreeze.train.columns import TableFormat
from clipfreeze.train.delimited import SEPARATORS
from clipfreeze.train.table import read_table

from hand import coloured


def write(folder: Path, content: str | bytes, images: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    for name in images:
        (folder / name).write_bytes(coloured("red"))
    path = folder / "pairs.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def captions(path: Path, layout: TableFormat | None = None) -> list[tuple[str, ...]]:
    return [pair.captions for pair in read_table(path, layout)]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_the_separator_is_found(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path, separator.join(["filepath", "title"]) + "\n" + separator.join(["a.png", "one"]) + "\n")
    assert captions(path) == [("one",)]


@pytest.mark.parametrize(
    "content",
    [
        "\ufefffilepath,title\r\na.png,one\r\n",
        "filepath , title\na.png, one\n",
        " Image ;Caption\na.png;one\n",
        "id,text,image,more\n7,one,a.png,\n",
        '\n"image","caption"\n\n"a.png","one"\n,\n',
        "url|image|caption, long\tand short|title\nx|a.png|two|one\n",
    ],
)
def test_headers_as_people_write_them(tmp_path: Path, content: str) -> None:
    assert captions(write(tmp_path, content)) == [("one",)]


def test_a_wrong_separator_shows_the_header_as_read(tmp_path: Path) -> None:
    path = write(tmp_path, "filepath,title\na.png,one\n")
    with pytest.raises(DataError) as caught:
        read_table(path, TableFormat(separator="tab"))
    assert "pairs.csv:1: no image column" in str(caught.value)
    assert "separator tab, is 'filepath,title'" in str(caught.value)
    assert "--separator" in str(caught.value)


def test_a_wrong_column_name_gets_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "picture,words\na.png,one\n")
    with pytest.raises(DataError, match="did you mean picture"):
        read_table(path, TableFormat(image_column="pictur", caption_column="words"))
    assert captions(path, TableFormat(image_column="picture", caption_column="words")) == [("one",)]


@pytest.mark.parametrize("word", ["None", "NA", "null", "n/a", "nan", "007", "1e5", "TRUE", "-"])
def test_words_stay_words(tmp_path: Path, word: str) -> None:
    assert captions(write(tmp_path, f"image,caption\na.png,{word}\n")) == [(word,)]


def test_empty_captions_are_errors_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, 'image,caption\na.png,one\nb.png,\na.png,"  "\n')
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert [(p.line, p.what) for p in caught.value.problems] == [
        (3, "the caption is empty"),
        (4, "the caption is empty"),
    ]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"image,caption\n" + b"a.png,one\n" * 5 + b"a.png,it\x92s\n", 7, "byte 0x92"),
        ("image,caption\na.png,one\n".encode("utf-16"), 1, "UTF-16"),
        ("image,caption\na.png,one\n".encode("utf-16-le"), 1, "zero byte"),
    ],
)
def test_another_encoding_is_an_error_with_line_and_setting(
    tmp_path: Path, content: bytes, line: int, words: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}:{line}: .*{words}") as caught:
        read_table(path)
    assert "--encoding" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-8"])
def test_a_named_encoding_is_used(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, "image,caption\na.png,it\u2019s\n".encode(encoding))
    assert captions(path, TableFormat(encoding=encoding)) == [("it\u2019s",)]


def test_an_unknown_encoding_or_separator_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "image,caption\na.png,one\n")
    with pytest.raises(DataError, match="no encoding 'utf-9'"):
        read_table(path, TableFormat(encoding="utf-9"))
    with pytest.raises(DataError, match="no separator 'space'"):
        read_table(path, TableFormat(separator="space"))


def test_a_quoted_line_break_belongs_to_the_caption(tmp_path: Path) -> None:
    path = write(tmp_path, 'image,caption\na.png,"one\ntwo, three"\nb.png,four\n')
    table = read_table(path)
    assert [pair.captions for pair in table] == [("one\ntwo, three",), ("four",)]
    assert [pair.place for pair in table] == [f"{path}:2", f"{path}:4"]


def test_ragged_rows_are_errors_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "image,caption\na.png,one, two\nb.png\n")
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert [(p.line, p.what) for p in caught.value.problems] == [
        (2, "3 fields where the header has 2"),
        (3, "1 fields where the header has 2"),
    ]


def test_an_open_quote_is_an_error_where_it_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs.csv:3: a row that starts here"):
        read_table(write(tmp_path, 'image,caption\na.png,one\nb.png,"two\nb.png,three\n'))


def test_missing_pictures_are_found_before_anything_else(tmp_path: Path) -> None:
    rows = "".join(f"no{number}.png,one\n" for number in range(14))
    with pytest.raises(DataError) as caught:
        read_table(write(tmp_path, "image,caption\na.png,one\n" + rows))
    assert (caught.value.problems[0].line, caught.value.problems[0].what) == (3, "there is no file no0.png")
    assert "and 4 more" in str(caught.value)


def test_a_caption_taken_for_a_path_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file a long"):
        read_table(write(tmp_path, f"image,caption\na {'long ' * 100},one\n"))


@pytest.mark.parametrize("content", ["", "\n\n", ",,\n", "image,caption\n", "image,caption\n,\n"])
def test_an_empty_table_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"the table (is empty|has a header and no rows)"):
        read_table(write(tmp_path, content))


def test_rows_of_one_image_are_one_pair(tmp_path: Path) -> None:
    path = write(tmp_path, "image,caption\na.png,one\nb.png,two\na.png,three\na.png,one\n")
    assert captions(path) == [("one", "three"), ("two",)]


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool)


@given(st.lists(words, min_size=1, max_size=5, unique=True), st.sampled_from(list(SEPARATORS)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_csv_writes_is_read_back(tmp_path: Path, said: list[str], separator: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([["image", "caption"], *(["a.png", text] for text in said)])
    assert captions(write(tmp_path, out.getvalue())) == [tuple(said)]
