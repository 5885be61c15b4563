"""A picture file or its bytes as the RGB a viewer would show: turned, on white, first frame."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clipfreeze.errors import DataError, Problem
from clipfreeze.train.pairs import Picture, Stored

PICTURE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)

# What Pillow's decoders raise on damaged files, beside UnidentifiedImageError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,
    OverflowError,
    struct.error,
)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_image(source: Picture, place: str) -> Image.Image:
    """Decode `source`; `place` says in messages where the picture comes from ("captions.csv:7").

    EXIF orientation is applied, transparency lies on white, animations give their first frame, 16-bit gray is scaled
    to 8 bits. DataError names the file when it is missing, empty, damaged, no picture, or above Pillow's pixel limit.
    """
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(_encoded(source))) as picture:
            if Image.MAX_IMAGE_PIXELS and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels")
            return _on_white(ImageOps.exif_transpose(picture))
    except _TOO_LARGE as error:
        fix = f"scale it down; the limit is Pillow's, {Image.MAX_IMAGE_PIXELS} pixels"
        raise _broken(source, place, f"too large a picture: {error}", fix) from error
    except FileNotFoundError as error:
        raise _broken(source, place, "there is no such picture file") from error
    except UnidentifiedImageError as error:
        empty = not (source.stat().st_size if isinstance(source, Path) else len(_encoded(source)))
        raise _broken(source, place, "the file is empty" if empty else "not a picture Pillow can read") from error
    except _DAMAGE as error:
        raise _broken(source, place, f"the picture cannot be decoded: {error}") from error


def _encoded(source: bytes | Stored) -> bytes:
    return source if isinstance(source, bytes) else source.read()


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _from_gray(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _from_gray(picture: Image.Image) -> Image.Image:
    """16 bits to 8. Pillow's own conversion clips everything above 255 to white."""
    if picture.mode == "F":
        raise ValueError("gray as floating point has no white; save it with 8 or 16 bits")
    values = np.asarray(picture.convert("I")).clip(0, 65535) / 257
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def _broken(source: Picture, place: str, what: str, fix: str | None = None) -> DataError:
    path = place if isinstance(source, bytes) else str(source)
    origin = "" if path == place else f" (from {place})"
    return DataError(Problem(what + origin, fix or "replace the file or take it out of the data", path))
