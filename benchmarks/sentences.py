"""A hundred thousand short texts that every machine with Headrace has: the sentences of its Python's docstrings.

`headrace.pipeline.corpus` gives each docstring's first paragraph, about 30,000 of them; a benchmark of the store wants
more, so this takes all sentences of all paragraphs. Files are parsed, never imported.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from headrace.pipeline.corpus import SKIPPED_FILES, SKIPPED_FOLDERS, TEMPLATE

__all__ = ["sentences", "split"]

MIN_CHARACTERS, MAX_CHARACTERS = 12, 400
"""Shorter ones are single words; longer ones are mostly tables and lists, and take the encoder long."""

_NO_PROSE = re.compile(r"^(>>>|\.\. )")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])")
_UNDERLINE = re.compile(r"^\s*([-=~^*\"+#.])\1{2,}\s*$", re.MULTILINE)


def sentences(
    limit: int,
    *,
    seed: int = 0,
    roots: Iterable[Path] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """At most `limit` distinct sentences in an order that `seed` decides.

    Parameters
    ----------
    limit : int
        Fewer come where this Python has fewer.
    seed : int
        The same seed, limit and installed packages give the same texts in the same order.
    roots : iterable of Path, optional
        Folders that hold packages; None is the standard library and site-packages.
    on_progress : callable, optional
        Called with files read so far and files to read.
    """
    if roots is None:
        places = sysconfig.get_paths()
        roots = [Path(place) for place in dict.fromkeys(places[kind] for kind in ("stdlib", "purelib", "platlib"))]
    files = [file for root in roots for file in _files(root)]
    found: dict[str, None] = {}
    for done, file in enumerate(files):
        if on_progress is not None:
            on_progress(done, len(files))
        for written in _docstrings(file):
            found.update(dict.fromkeys(split(written)))
    texts = sorted(found)
    random.Random(seed).shuffle(texts)
    return texts[:limit]


def split(docstring: str) -> list[str]:
    """The sentences of prose in one docstring, each on one line; examples, directives and templates are left out."""
    found = []
    for paragraph in _PARAGRAPH.split(_UNDERLINE.sub("", inspect.cleandoc(docstring))):
        line = " ".join(paragraph.split())
        if _NO_PROSE.match(line) or TEMPLATE.search(line):
            continue
        for sentence in _SENTENCE.split(line):
            fits = MIN_CHARACTERS <= len(sentence) <= MAX_CHARACTERS and " " in sentence
            if fits and sentence[0].isalpha() and ">>>" not in sentence:
                # What UTF-8 cannot hold, no tokenizer takes.
                found.append(sentence.encode("utf-8", "replace").decode("utf-8"))
    return found


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root).parts
        if not SKIPPED_FILES.match(path.name) and SKIPPED_FOLDERS.isdisjoint(inner[:-1]):
            yield path


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes are not this program's to report
            tree = ast.parse(file.read_bytes(), filename=str(file))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # a template, a file for another Python, a parser's test case
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            written = ast.get_docstring(node, clean=False)
            if written:
                yield written
