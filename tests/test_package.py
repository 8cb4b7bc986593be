"""The package as a whole: what it exports, what importing it costs, and which folder may know which."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import headrace
from headrace.gpu import errors

ROOT = Path(headrace.__file__).resolve().parent.parent
FOLDERS = ("gpu", "streams", "cluster", "pipeline")  # lowest first: each may import those before it
HEAVY = frozenset(
    [
        "bokeh",
        "confluent_kafka",
        "cudf",
        "cuml",
        "cupy",
        "cuvs",
        "dask",
        "distributed",
        "faiss",
        "numpy",
        "onnxruntime",
        "pandas",
        "streamz",
        "tokenizers",
        "tornado",
    ]
)
NOT_IN_GPU = ("confluent_kafka", "dask", "distributed", "streamz")


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module imports, ``from a import b`` as ``a.b``."""
    package = ["headrace", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def test_importing_headrace_loads_nothing_heavy() -> None:
    program = "import sys, headrace; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert "headrace" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("name", headrace.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(headrace, name)
    assert name in dir(headrace)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_all_is_sorted_and_holds_the_whole_error_tree() -> None:
    assert headrace.__all__ == sorted(set(headrace.__all__))
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds <= set(headrace.__all__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(headrace.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(headrace.__all__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'conekt'"):
        _ = headrace.conekt


def test_version() -> None:
    assert headrace.__version__ == importlib.metadata.version("headrace")


def test_folders_import_only_downward() -> None:
    upward = []
    for path in modules():
        allowed = FOLDERS[: FOLDERS.index(path.relative_to(ROOT).parts[0]) + 1]
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            # The topmost folder may use the public names; below it they would lead upwards.
            if name == "headrace" and allowed == FOLDERS:
                continue
            if top == "headrace" and rest.partition(".")[0] not in allowed:
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
            if top in FOLDERS:
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {name} without headrace.")
    assert not upward


def test_the_device_knows_no_kafka_and_no_dask() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / "gpu").rglob("*.py"))
        for line, name in imports(path)
        if name.partition(".")[0] in NOT_IN_GPU
    ]
    assert not found


def test_relative_imports_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "gpu" / "host" / "flat.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ...pipeline import client\nfrom . import frames\nimport headrace.streams.codec as codec\n")
    assert [name for _, name in imports(path)] == [
        "headrace.pipeline.client",
        "headrace.gpu.host.frames",
        "headrace.streams.codec",
    ]
