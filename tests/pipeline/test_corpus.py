"""Docstrings of the Python that runs, found without importing it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from headrace.pipeline.corpus import MAX_CHARACTERS, Doc, docstrings

SHAPES = '''
"""Plane shapes and what can be measured of them."""

import sys
sys.headrace_test_was_imported = True


class Circle:
    """All points at one distance from the middle.

    A second paragraph is not part of the document.
    """

    def area(self):
        """Area enclosed by
        the circle's line."""

        def helper():
            """Never seen: a function's insides are its own affair."""

    def _radius(self):
        """A private method is left out of the documents."""


def short():
    """Too short."""


def filled():
    """Return the %(what)s of the shape, by template."""


def braces():
    """Return the {what} of the shape, by template."""


def called(x):
    """called(x, y=1) -> float

    What stands below the signature is the summary.
    """


def example():
    """>>> example()  # an example and nothing else"""


try:
    async def waits():
        """A coroutine that is defined under a try statement."""
except ImportError:
    def waits():
        """Another definition of the same name, which comes second."""
'''


def tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def ids(root: Path) -> set[str]:
    return {doc.id for doc in docstrings(roots=[root])}


def test_finds_public_things_by_their_qualified_names(tmp_path: Path) -> None:
    docs = {doc.id: doc for doc in docstrings(roots=[tree(tmp_path, {"plane/shapes.py": SHAPES})])}
    assert set(docs) == {
        "plane.shapes",
        "plane.shapes.Circle",
        "plane.shapes.Circle.area",
        "plane.shapes.called",
        "plane.shapes.waits",
    }
    assert docs["plane.shapes.Circle.area"] == Doc(
        "plane.shapes.Circle.area", "Area enclosed by the circle's line.", "plane", "plane.shapes", "method"
    )
    assert [docs[name].kind for name in sorted(docs)] == ["module", "class", "method", "function", "function"]
    assert docs["plane.shapes.Circle"].text == "All points at one distance from the middle."
    assert docs["plane.shapes.called"].text == "What stands below the signature is the summary."
    assert docs["plane.shapes.waits"].text.startswith("A coroutine")


def test_reads_without_importing(tmp_path: Path) -> None:
    list(docstrings(roots=[tree(tmp_path, {"plane/shapes.py": SHAPES})]))
    assert not hasattr(sys, "headrace_test_was_imported")


def test_leaves_out_tests_and_vendored_copies(tmp_path: Path) -> None:
    text = '"""A module that says enough about itself."""\n'
    root = tree(
        tmp_path,
        {
            "pack/__init__.py": text,
            "pack/tests/test_a.py": '"""Tests of the first part of the pack."""',
            "pack/test_b.py": '"""Tests of the second part of the pack."""',
            "pack/conftest.py": '"""Fixtures of the tests of the pack."""',
            "pack/_vendor/other.py": '"""A copy of somebody else\'s whole module."""',
            "pack-1.0.dist-info/notes.py": '"""Not in a package at all, by its name."""',
            "pack/__main__.py": '"""Runs the pack from the command line."""',
        },
    )
    assert ids(root) == {"pack"}


@pytest.mark.parametrize(
    "content",
    [
        b"def broken(:\n",
        b'"""A docstring with a null byte."""\n\x00',
        b'# coding: utf-8\n"""\xff\xfe not what the coding says it is"""',
        b'# coding: no-such-coding\n"""Nobody knows how to read this file."""',
        b"x = " + b"(" * 5000 + b")" * 5000,
        b"",
    ],
    ids=["syntax", "null", "bytes", "coding", "nesting", "empty"],
)
def test_passes_over_what_does_not_parse(tmp_path: Path, content: bytes) -> None:
    root = tree(tmp_path, {"a.py": content, "b.py": '"""A neighbour that is read all the same."""'})
    assert ids(root) == {"b"}


def test_others_warnings_are_not_ours(tmp_path: Path) -> None:
    # The suite turns warnings into errors, so an unsuppressed SyntaxWarning would fail this test.
    root = tree(tmp_path, {"a.py": '"""Escapes that are \\d invalid, and tests of literals."""\nx = 1 is 1\n'})
    assert ids(root) == {"a"}


def test_other_codings_and_lone_surrogates(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "a.py": b"# coding: latin-1\n" + '"""Größe und Maß eines Gegenstands."""'.encode("latin-1"),
            "b.py": '"""A text with half a \\ud83d character in it."""',
        },
    )
    docs = {doc.id: doc.text for doc in docstrings(roots=[root])}
    assert docs["a"] == "Größe und Maß eines Gegenstands."
    assert docs["b"].encode() == b"A text with half a ? character in it."


def test_texts_are_distinct_and_the_first_id_keeps_one(tmp_path: Path) -> None:
    same = '"""The very same words in each of these."""'
    assert ids(tree(tmp_path, {"b.py": same, "a.py": same, "c.py": same})) == {"a"}


def test_long_paragraphs_are_cut_at_a_word(tmp_path: Path) -> None:
    (doc,) = docstrings(roots=[tree(tmp_path, {"a.py": '"""' + "words " * 1000 + '"""'})])
    assert len(doc.text) <= MAX_CHARACTERS
    assert doc.text.endswith("words…")


def test_order_is_the_seed_s(tmp_path: Path) -> None:
    root = tree(tmp_path, {f"m{n}.py": f'"""This is module number {n} of forty."""' for n in range(40)})
    whole = list(docstrings(roots=[root]))
    assert whole == list(docstrings(roots=[root]))
    assert [doc.id for doc in whole] != sorted(doc.id for doc in whole)
    other = list(docstrings(seed=1, roots=[root]))
    assert other != whole
    assert set(other) == set(whole)
    assert list(docstrings(7, roots=[root])) == whole[:7]
    assert list(docstrings(1000, roots=[root])) == whole


def test_progress_ends_complete(tmp_path: Path) -> None:
    root = tree(tmp_path, {f"m{n}.py": "" for n in range(3)})
    seen: list[tuple[int, int]] = []
    list(docstrings(roots=[root], on_progress=lambda done, total: seen.append((done, total))))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_finds_the_rolling_mean_of_pandas(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("pandas")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    window = "pandas/core/window"
    shutil.copytree(Path(spec.submodule_search_locations[0], "core/window"), tmp_path / window)
    docs = {doc.id: doc.text for doc in docstrings(roots=[tmp_path])}
    assert docs["pandas.core.window.rolling.Rolling.mean"] == "Calculate the rolling mean."
