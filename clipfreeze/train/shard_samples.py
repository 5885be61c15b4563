"""What a webdataset sample is: files side by side in a shard whose names agree up to the first dot."""

from __future__ import annotations

import json
from collections.abc import Mapping

from clipfreeze.errors import DataError, Problem
from clipfreeze.train.columns import words_of
from clipfreeze.train.pictures import PICTURE_SUFFIXES

CAPTION_KEYS = ("txt", "caption", "json")
_IMAGE_KEYS = frozenset(suffix[1:] for suffix in PICTURE_SUFFIXES)
_JSON_CAPTIONS = ("caption", "text")


def base_and_key(name: str) -> tuple[str, str] | None:
    """As webdataset cuts a name: dots of the folder do no harm, "img.v2.jpg" is "img" and "v2.jpg".

    None for a name it passes over: one without a dot, or with nothing before it.
    """
    from webdataset.tariterators import base_plus_ext

    base, key = base_plus_ext(name)
    return None if base is None else (base, key.lower())


def is_metadata(name: str) -> bool:
    """Whether webdataset keeps the file for itself."""
    return name.startswith("__") and "__" in name[2:].partition("/")[0]


def image_key(keys: Mapping[str, object]) -> str | None:
    """The first key of a sample that is a picture's."""
    return next((key for key in keys if key in _IMAGE_KEYS), None)


def captions_of(files: Mapping[str, bytes], place: str, encoding: str) -> tuple[str, ...]:
    """What the caption files of a sample say: .txt before .caption before "caption" or "text" in .json; may be empty.

    Raises DataError for what cannot be read as text or JSON.
    """
    for key in CAPTION_KEYS:
        if key not in files:
            continue
        try:
            text = files[key].decode("utf-8-sig" if encoding == "utf-8" else encoding).strip()
        except UnicodeDecodeError as error:
            what = f"byte 0x{error.object[error.start]:02x} of the {key} is not {encoding}"
            raise DataError(Problem(what, "name the captions' encoding: --encoding cp1252", place)) from error
        said = _in_json(text, place) if key == "json" else (text,)
        if any(said):
            return tuple(dict.fromkeys(caption for caption in said if caption))
    return ()


def _in_json(text: str, place: str) -> tuple[str, ...]:
    try:
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(Problem(f"the json is not valid: {error}", None, place)) from error
    fields = [value[key] for key in _JSON_CAPTIONS if key in value] if isinstance(value, dict) else []
    return next(filter(None, map(words_of, fields)), ())
