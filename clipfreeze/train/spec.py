"""run.toml: all that a run can be repeated from."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tomli
from pydantic import Field, ValidationError

from clipfreeze.errors import DataError, Problem
from clipfreeze.policy.classes import CLASS_WORDS
from clipfreeze.policy.loading import builtin_policies
from clipfreeze.train.absolute import absolute_source
from clipfreeze.train.folder import SPEC, write_text
from clipfreeze.train.parts import is_share
from clipfreeze.train.settings import TrainingSettings, checked
from clipfreeze.train.table import TableFormat

_FOLDER = "local-dir:"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def installed_version(library: str = "clipfreeze") -> str:
    """Of a library; "unknown" where it is not installed, as clipfreeze may run without."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "unknown"


class RunSpec(TrainingSettings):
    """A run: which policy on which model and data, and how long."""

    policy: str = Field(description="name of a built-in policy or path of a policy file")
    params: dict[str, bool | int | float | str] = Field({}, description="the policy's knobs that were set")
    model: str = Field("demo", description="what `clipfreeze.models.load` takes; demo is the embedded model")
    pretrained: str | None = Field(None, description="a tag or a checkpoint file")
    data: str | None = Field(
        None, description="a table, folder, shards, stream or hf:NAME; null: the embedded pictures"
    )
    val: str | None = Field(
        None, description='to evaluate on: likewise, "5%" of the data, or the name of a part of them; null: the part '
        "that the data call so, else a tenth"
    )  # fmt: skip
    samples_per_epoch: Annotated[int, Field(gt=0)] | None = Field(
        None, description="pairs of a stream that count as an epoch"
    )
    retain: str | None = Field(None, description="data that the model shall go on to know, measured too")
    table: TableFormat = TableFormat()
    version: str = Field(default_factory=installed_version, description="of clipfreeze")

    def training(self) -> dict[str, Any]:
        """The settings that `fit` takes."""
        return {name: getattr(self, name) for name in TrainingSettings.model_fields}


def run_spec(**values: Any) -> RunSpec:
    """A spec by name. DataError for an unknown name or a wrong value."""
    return checked(RunSpec, values)


def repeatable(spec: RunSpec, parts: Collection[str] = ()) -> RunSpec:
    """With paths that hold from any folder. `parts` are the names of parts of the data, one of which `val` may be."""
    sources = {"data": spec.data, "retain": spec.retain}
    if spec.val is not None and not is_share(spec.val) and spec.val not in parts:
        sources["val"] = spec.val
    changed: dict[str, Any] = {key: absolute_source(source) for key, source in sources.items() if source is not None}
    if spec.cache_dir is not None:
        changed["cache_dir"] = str(Path(spec.cache_dir).absolute())
    if spec.table.image_root is not None:
        changed["table"] = spec.table.model_copy(update={"image_root": str(Path(spec.table.image_root).absolute())})
    if spec.policy not in builtin_policies():
        changed["policy"] = _if_there(spec.policy)
    if spec.pretrained is not None:
        changed["pretrained"] = _if_there(spec.pretrained)
    if spec.model.startswith(_FOLDER):
        changed["model"] = f"{_FOLDER}{Path(spec.model.removeprefix(_FOLDER)).absolute()}"
    classes = spec.params.get("classes")
    if isinstance(classes, str) and classes not in CLASS_WORDS:  # a file, from the user's folder
        changed["params"] = {**spec.params, "classes": _if_there(classes)}
    return spec.model_copy(update=changed)


def _if_there(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def write_spec(spec: RunSpec, folder: Path) -> None:
    """Leave run.toml in the folder; what is null is left out."""
    write_text(folder / SPEC, toml_text(spec.model_dump(exclude_none=True)))


def read_spec(folder: Path) -> RunSpec:
    """The run.toml of a run folder."""
    path = folder / SPEC
    if not path.is_file():
        raise DataError(f"{folder} is no run folder: it has no {SPEC}", "give the folder that `clipfreeze train` named")
    try:
        return RunSpec.model_validate(_as_tuples(tomli.loads(path.read_text(encoding="utf-8-sig"))))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(Problem(f"not valid TOML: {error}", None, str(path))) from error
    except ValidationError as error:
        problems = [
            Problem(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}", None, str(path)) for fault in error.errors()
        ]
        raise DataError(problems) from error


def toml_text(values: dict[str, Any]) -> str:
    """Scalars and lists of them, then a table for each dict of scalars."""
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{_key(key)} = {_scalar(value)}" for key, value in values.items() if key not in tables]
    for name, table in tables.items():
        if table:
            lines += ["", f"[{_key(name)}]", *(f"{_key(key)} = {_scalar(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """TOML has lists, a spec holds tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _scalar(name)


def _scalar(value: bool | int | float | str | Sequence[str]) -> str:
    """JSON's spelling is TOML's, but for the one control character that JSON leaves bare."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
