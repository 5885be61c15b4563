"""`clipfreeze data` tells of a data set in text and JSON, and refuses what it cannot read."""

import json
import sys

import pytest
from PIL import Image

from clipfreeze.cli.app import main


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs `clipfreeze data` on a small table: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Image.new("RGB", (8 + number, 8)).save(f"{number}.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    rows = ["0.png,None", "1.png,None", "2.png,007", "3.png," + "long " * 90, "half.png,half"]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clipfreeze", "data", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


def test_a_table_is_told_in_words(cli, tmp_path):
    code, out, _ = cli("pairs.csv", "--batch-size", "4", "--contact-sheet", "sheet.jpg")
    assert code == 0
    assert "pairs: 5 pictures, 4 different captions" in out
    assert "width       8 to 11 pixels, median 9" in out
    assert "2 share a caption, most often 'None' 2" in out
    assert "of 4: 0.6 pairs with equal captions" in out
    assert "has 92, the model reads 77; 1 are cut" in out
    assert "broken      1 pictures\n  half.png: not a picture Pillow can read (from pairs.csv:6)" in out
    assert "look at     sheet.jpg" in out
    assert (tmp_path / "sheet.jpg").is_file()


def test_json_is_alone_on_stdout(cli):
    code, out, _ = cli("pairs.csv", "--format", "json", "--model", "demo", "--workers", "1")
    found = json.loads(out)
    assert code == 0
    assert (found["pictures"], found["texts"]["cut"], len(found["broken"])) == (5, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pair.csv"], "did you mean pairs.csv"),
        (["pairs.csv", "--caption-column", "captions"], "did you mean caption"),
        (["pairs.csv", "--image-root", "none"], "there is no file 0.png"),
        (["pairs.csv", "--model", "ViT-B-33"], "open_clip has no model"),
        (["pairs.csv", "--contact-sheet", "sheet.gif"], "--contact-sheet FILE.jpg"),
        (["pipe:cat a.tar"], "are a stream"),
    ],
)
def test_wrong_input_ends_with_2(cli, arguments, words):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert words in err
