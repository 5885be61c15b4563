"""The shape of the code, as DESIGN has it: layers, imports, names, and what the package offers."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import clipfreeze

PACKAGE = Path(clipfreeze.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (  # each may import from those after it, and from its own
    ("cli",),
    ("train", "export"),
    ("changes", "models"),
    ("stored", "foreign"),
    ("inject", "optim"),
    ("plan",),
    ("policy", "anatomy"),
    ("demo",),
    ("errors", "pieces"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_file_imports_only_from_layers_below_its_own(file):
    own = layer(module_of(file))
    if not own:
        return  # the package's door opens on everything, lazily
    wrong = [
        name
        for name in imports(file)
        if name.startswith("clipfreeze.") and layer(name) != own and RANK[layer(name)] <= RANK[own]
    ]
    assert not wrong


def test_no_public_function_bears_a_module_s_name():
    modules = {name for file in FILES for name in module_of(file).split(".")}
    functions = {
        node.name
        for file in FILES
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }
    assert not modules & functions


def test_only_the_anatomy_asks_which_architecture_a_model_is():
    asking = [
        module_of(file)
        for file in FILES
        if layer(module_of(file)) != "anatomy"
        and any(name.startswith(("open_clip.transformer", "open_clip.timm", "timm.models")) for name in imports(file))
    ]
    assert not asking


def test_the_public_names():
    assert clipfreeze.__all__ == [
        "Applied", "ClipfreezeError", "Plan", "Policy", "apply", "describe", "fit", "load", "load_policy", "resolve",
    ]  # fmt: skip
    assert all(getattr(clipfreeze, name) for name in clipfreeze.__all__)
    assert set(clipfreeze.__all__) <= set(dir(clipfreeze))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = clipfreeze.nonsense


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["check", "last_n", "full"],
        ["show", "last_n"],
        ["schema"],
        ["apply", "--help"],
        ["export", "--help"],
        ["data", "--help"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_verbs_that_need_no_model_import_no_torch(arguments):
    code = (
        "import sys\n"
        "from clipfreeze.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(3 if {'torch', 'open_clip', 'rich'} & set(sys.modules) else 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 10  # the stated bound is 0.3 s, which benchmarks/startup.py measures
