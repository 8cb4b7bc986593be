"""Texts that every machine with Headrace has: the docstrings of the Python that runs it.

They are read with `ast` from the files of the standard library and of site-packages; nothing is imported, so nothing is
run. One document is a docstring's first paragraph under the qualified name of what it describes.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Doc", "docstrings"]

MIN_CHARACTERS = 20
"""Shorter ones ("See base class.") say nothing of what they describe."""
MAX_CHARACTERS = 600
"""Some first paragraphs are whole pages; past this they are cut, at a word."""

# Tests describe what they test, vendored copies what is there already, and installers' folders are no packages.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_vendor", "_distutils_hack", "site-packages", "dist-packages"}
)
SKIPPED_FILES = re.compile(r"^(test_.*|.*_tests?|conftest|setup)\.py$")
# Templates that a decorator fills in at import: "Return %(axes)s of the {klass}." is not what the reader would see.
TEMPLATE = re.compile(r"%\(\w+\)[sdr]|\{\w*\}")
# Documentation of C functions begins with the call itself.
SIGNATURE = re.compile(r"^[\w.]+\(.*\)(\s*->.*)?$")
# An example, a directive, a field or a section's heading: this docstring has no summary.
NO_PROSE = re.compile(r"^(>>>|\.\. |:\w|\w+ -{3})")


@dataclass(frozen=True)
class Doc:
    """One document.

    Attributes
    ----------
    id : str
        Qualified name, such as ``"pandas.core.window.rolling.Rolling.mean"``; unique.
    text : str
        First paragraph of the docstring, on one line; distinct.
    package, module : str
        Top-level package, and the module that holds it.
    kind : {"module", "class", "function", "method"}
    """

    id: str
    text: str
    package: str
    module: str
    kind: str


def docstrings(
    limit: int | None = None,
    *,
    seed: int = 0,
    roots: Iterable[str | os.PathLike[str]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Doc]:
    """Documents in an order that `seed` decides, all texts distinct.

    Everything is read before the first one is given: which of two equal texts stays (the first by id) must not depend
    on the order. The standard library and the project's own dependencies, 5,000 files, take one core fifteen seconds.

    Parameters
    ----------
    limit : int, optional
        At most so many; fewer where this Python has fewer.
    seed : int
        The same seed, limit and installed packages give the same documents in the same order.
    roots : iterable of path, optional
        Folders that hold packages, as on ``sys.path``; None is the standard library and site-packages.
    on_progress : callable, optional
        Called with files read so far and files to read.

    Yields
    ------
    Doc
    """
    files = [file for root in (_roots() if roots is None else roots) for file in _files(Path(root))]
    found: dict[str, Doc] = {}
    for done, (name, path) in enumerate(files):
        if on_progress is not None:
            on_progress(done, len(files))
        for doc in _read(name, path):
            found.setdefault(doc.id, doc)
    if on_progress is not None:
        on_progress(len(files), len(files))
    distinct: dict[str, Doc] = {}
    for identity in sorted(found):
        distinct.setdefault(found[identity].text, found[identity])
    docs = list(distinct.values())
    random.Random(seed).shuffle(docs)
    yield from docs[:limit]


def _roots() -> list[Path]:
    places = sysconfig.get_paths()
    return [
        Path(place) for place in dict.fromkeys(places[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    ]


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted module name and path of each module below `root`, sorted."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name.isidentifier() and name not in SKIPPED_FOLDERS)
        package = Path(folder).relative_to(root).parts
        for name in sorted(names):
            stem = name.removesuffix(".py")
            if stem != name and stem.isidentifier() and not SKIPPED_FILES.match(name):
                module = package if stem == "__init__" else (*package, stem)
                if module and module[-1] != "__main__":
                    yield ".".join(module), Path(folder, name)


def _read(module: str, path: Path) -> Iterator[Doc]:
    try:
        with warnings.catch_warnings():
            # Other people's invalid escapes are not this program's to report.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        # A file for another Python, a template, a test case of a parser: it is no module here. The last two are how
        # the parser refuses what is nested too deeply.
        return
    yield from _walk(tree, module, module, "module")


def _walk(node: ast.AST, name: str, module: str, kind: str) -> Iterator[Doc]:
    text = _summary(node)
    if text:
        yield Doc(name, text, module.partition(".")[0], module, kind)
    for child in _bodies(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            inner = "class" if isinstance(child, ast.ClassDef) else "method" if kind == "class" else "function"
            yield from _walk(child, f"{name}.{child.name}", module, inner)


def _bodies(node: ast.AST) -> Iterator[ast.stmt]:
    """What a module or class defines, also under ``if`` and ``try``; a function's insides are its own affair."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.TryStar | ast.With | ast.ExceptHandler):
            yield from _bodies(child)
        elif isinstance(child, ast.stmt):
            yield child


def _summary(node: ast.AST) -> str:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    written = ast.get_docstring(node, clean=False)
    if not written:
        return ""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", inspect.cleandoc(written))]
    text = next((part for part in paragraphs if part and not SIGNATURE.match(part)), "")
    if len(text) < MIN_CHARACTERS or TEMPLATE.search(text) or NO_PROSE.match(text):
        return ""
    if len(text) > MAX_CHARACTERS:
        text = text[: MAX_CHARACTERS - 1].rpartition(" ")[0] + "…"
    # What UTF-8 cannot hold, no record could carry.
    return text.encode("utf-8", "replace").decode("utf-8")
