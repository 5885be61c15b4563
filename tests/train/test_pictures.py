"""Every kind of picture file comes out as a viewer would show it, or as an error that names the file."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipfreeze.errors import DataError
from clipfreeze.train.pictures import open_image


def encoded(picture: Image.Image, form: str, **settings: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **settings)
    return out.getvalue()


def pixel(data: bytes) -> tuple[int, ...]:
    picture = open_image(data, "test")
    assert picture.mode == "RGB"
    value = picture.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def palette_with_hole() -> bytes:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 255, 255, 0, 0])
    return encoded(picture, "PNG", transparency=1)


def animation() -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"), WHITE),
        (encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG"), (204, 204, 204)),
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255)), "WEBP", lossless=True), RED),
        (palette_with_hole(), WHITE),
        (encoded(Image.new("LA", (4, 4), (0, 0)), "PNG"), WHITE),
        (encoded(Image.new("PA", (4, 4)), "TIFF"), WHITE),
        (encoded(Image.new("1", (4, 4), 1), "PNG"), WHITE),
        (encoded(Image.new("1", (4, 4), 0), "PNG"), BLACK),
        (encoded(Image.new("L", (4, 4), 7), "PNG"), (7, 7, 7)),
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), RED),
        (animation(), RED),
        (encoded(Image.fromarray(np.full((4, 4), 65535, np.uint16)), "PNG"), WHITE),
        (encoded(Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), "PNG"), (100, 100, 100)),
        (encoded(Image.fromarray(np.full((4, 4), 257 * 100, np.int32)), "TIFF"), (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb_on_white(data: bytes, colour: tuple[int, ...]) -> None:
    assert pixel(data) == colour


def test_cmyk_jpeg_has_three_channels_and_its_colour() -> None:
    red, green, blue = pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red > 240
    assert max(green, blue) < 15


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif), "test").size == (20, 40)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"no picture at all", "not a picture"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:700], "cannot be decoded"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating point"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        open_image(path, "captions.csv:7")
    assert str(path) in str(caught.value)
    assert "captions.csv:7" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.png: there is no such picture file \(from a.csv:2\)"):
        open_image(tmp_path / "gone.png", "a.csv:2")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [99, 49, 10])
def test_above_the_pixel_limit_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (10, 10)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    with pytest.raises(DataError, match=r"large.png: too large a picture"):
        open_image(path, "test")


@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]),
    st.integers(0, 3000),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=8),
)
def test_no_damage_raises_anything_but_a_data_error(form: str, length: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(Image.effect_noise((24, 24), 50).convert("RGB"), form)[:length])
    for place, value in changes:
        if place < len(data):
            data[place] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF and the like
        with contextlib.suppress(DataError):
            assert open_image(bytes(data), "test").mode == "RGB"
