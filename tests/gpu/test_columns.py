"""Attributes as columns, against a list of dictionaries."""

from __future__ import annotations

import operator
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.columns import Columns
from headrace.gpu.errors import RecordError
from headrace.gpu.vocabulary import GrowingVocabulary, Vocabulary, merge

KINDS: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(),
    "bool": st.booleans(),
    "str": st.text(st.characters(), max_size=4),
}
NAMES = {f"{kind}{number}": kind for kind in KINDS for number in range(2)}

rows_of_a_batch = st.lists(
    st.fixed_dictionaries({}, optional={name: KINDS[kind] for name, kind in NAMES.items()}), max_size=8
)


def append(columns: Columns, batch: list[dict[str, Any]]) -> None:
    names = sorted({name for row in batch for name in row})
    columns.append({name: [row.get(name) for row in batch] for name in names}, len(batch))


def filled(batches: list[list[dict[str, Any]]]) -> tuple[Columns, list[dict[str, Any]]]:
    columns = Columns(np)
    for batch in batches:
        append(columns, batch)
    return columns, [row for batch in batches for row in batch]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Equal, types and NaN included, whatever the order of the columns."""
    return [sorted(map(repr, row.items())) for row in found] == [sorted(map(repr, row.items())) for row in expected]


def drawn_rows(data: st.DataObject, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    some = st.lists(st.integers(0, count - 1), max_size=20) if count else st.just([])
    return np.array(data.draw(some), dtype=np.int64)


@given(st.lists(rows_of_a_batch, max_size=5), st.data())
def test_columns_are_a_list_of_dictionaries(batches: list[list[dict[str, Any]]], data: st.DataObject) -> None:
    columns, expected = filled(batches)
    assert len(columns) == len(expected)
    assert same(columns.rows(np.arange(len(expected))), expected)
    rows = drawn_rows(data, len(expected))
    assert same(columns.rows(rows), [expected[row] for row in rows])
    assert dict(columns.schema) == {name: NAMES[name] for row in expected for name in row}
    assert ("int0" in columns) == any("int0" in row for row in expected)
    for name, kind in columns.schema.items():
        column = columns[name]
        there = [name in row for row in expected]
        assert (column.kind, column.valid.tolist(), len(column.values)) == (kind, there, len(expected))
        if column.vocabulary is not None:
            assert (column.codes == -1).tolist() == [not one for one in there]
            assert [column.vocabulary[code] for code in column.codes.tolist() if code >= 0] == [
                row[name] for row in expected if name in row
            ]


@given(st.lists(st.lists(rows_of_a_batch, max_size=3), min_size=1, max_size=4), st.data())
def test_merged_columns_are_what_was_chosen(segments: list[list[list[dict[str, Any]]]], data: st.DataObject) -> None:
    sources, expected = [], []
    for segment in segments:
        columns, rows = filled(segment)
        chosen = drawn_rows(data, len(rows))
        if data.draw(st.booleans()):  # merged once already
            columns = columns.take(np.arange(len(rows)))
        sources.append((columns, chosen))
        expected += [rows[row] for row in chosen]
    merged = Columns.gather(np, sources)
    assert len(merged) == len(expected)
    assert same(merged.rows(np.arange(len(expected))), expected)
    assert dict(merged.schema) == {name: NAMES[name] for row in expected for name in row}
    for name, kind in merged.schema.items():
        vocabulary = merged[name].vocabulary
        assert (vocabulary is not None) == (kind == "str")
        if vocabulary is not None:
            assert list(vocabulary) == sorted({row[name] for row in expected if name in row})


@given(st.lists(st.text(st.characters(), max_size=3), max_size=30), st.text(max_size=3), st.data())
def test_vocabularies_answer_as_their_texts_do(values: list[str], asked: str, data: st.DataObject) -> None:
    growing = GrowingVocabulary()
    codes = growing.encode([*values, None])
    used = np.array(data.draw(st.lists(st.booleans(), min_size=len(growing), max_size=len(growing))), dtype=np.bool_)
    ordered, (recoded,) = merge([(growing, used)])
    kept = [text for text, there in zip(growing, used.tolist(), strict=True) if there]
    assert growing.to_list(codes) == [*values, None]
    assert list(growing) == list(dict.fromkeys(values))
    assert list(ordered) == sorted(kept)
    assert recoded[-1] == -1
    assert ordered.to_list(recoded[codes]) == [*(text if text in kept else None for text in values), None]
    vocabularies: list[Vocabulary] = [growing, ordered]
    for vocabulary in vocabularies:
        texts = list(vocabulary)
        assert len(vocabulary) == len(texts)
        for text in {asked, *values}:
            assert vocabulary.code(text) == (texts.index(text) if text in texts else -1)
        for sign, holds in SIGNS.items():
            assert vocabulary.compare(sign, asked).tolist() == [holds(text, asked) for text in texts]
        with pytest.raises(IndexError):
            vocabulary[-1]
        with pytest.raises(IndexError):
            vocabulary[len(texts)]


SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}


def test_values_come_back_as_plain_python() -> None:
    columns = Columns(np)
    columns.append({"n": [1, None], "x": [2, 2.5], "b": [True, None], "s": ["a", None], "none": [None, None]}, 2)
    assert columns.rows(np.array([0, 1])) == [{"n": 1, "x": 2.0, "b": True, "s": "a"}, {"x": 2.5}]
    assert [type(value) for value in columns.rows(np.array([0]))[0].values()] == [int, float, bool, str]
    assert list(columns.schema.items()) == [("n", "int"), ("x", "float"), ("b", "bool"), ("s", "str")]
    with pytest.raises(KeyError):
        columns["none"]


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"s": ["b", "c"], "n": [1, "x"]}, r"attribute 'n' is str 'x', but this column holds int"),
        ({"s": ["b", "c"], "n": [1, True]}, r"attribute 'n' is bool True"),
        ({"s": ["b", "c"], "n": [1.5, None]}, r"attribute 'n' is float 1.5"),
        ({"n": [1, 2], "x": [1.5, "2"]}, r"attribute 'x' is str '2', but this column holds float"),
        ({"n": [1, 2], "new": [[1], None]}, r"attribute 'new' is list \[1\], but only"),
        ({"n": [1, 2], "new": [1]}, r"attribute 'new' has 1 values for 2 rows"),
        ({"n": [1, 2**63]}, r"does not fit int64"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(attributes: dict[str, list[Any]], why: str) -> None:
    columns = Columns(np)
    columns.append({"n": [1], "x": [1.0], "s": ["a"]}, 1)
    columns.append({"x": [0.5]}, 1)
    with pytest.raises(RecordError, match=why):
        columns.append(attributes, 2)
    columns.append({}, 1)
    assert columns.rows(np.arange(3)) == [{"n": 1, "x": 1.0, "s": "a"}, {"x": 0.5}, {}]
    assert set(columns.schema) == {"n", "x", "s"}


def test_kinds_must_agree_in_a_merge() -> None:
    one, two = Columns(np), Columns(np)
    one.append({"a": [1]}, 1)
    two.append({"a": ["x"]}, 1)
    first = np.array([0])
    with pytest.raises(RecordError, match="'a' is int in one segment and str in another"):
        Columns.gather(np, [(one, first), (two, first)])
    with pytest.raises(ValueError, match="sealed"):
        one.take(first).append({}, 1)


def test_texts_without_rows_are_forgotten() -> None:
    columns = Columns(np)
    columns.append({"s": [f"text {n}" for n in range(1000)]}, 1000)
    kept = columns.take(np.array([7, 5, 7]))
    vocabulary = kept["s"].vocabulary
    assert vocabulary is not None
    assert list(vocabulary) == ["text 5", "text 7"]
    assert kept["s"].codes.tolist() == [1, 0, 1]
    assert "s" not in columns.take(np.empty(0, dtype=np.int64))


def test_bytes_are_counted() -> None:
    columns = Columns(np)
    columns.append({"n": list(range(1024))}, 1024)
    assert columns.nbytes == 9 * 1024
    columns.append({"s": ["x" * 1000, *["y"] * 99]}, 100)
    assert columns.nbytes > 9 * 1124 + 5 * 1124 + 1000
    sealed = columns.take(np.arange(1124))
    assert sealed.nbytes == 9 * 1124 + 5 * 1124 + (1001 + 3 * 4)


def test_rows_that_were_published_stay_while_others_are_appended() -> None:
    columns = Columns(np)
    published = [0]
    wrong: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            rows = published[0]
            for name in list(columns.schema):
                column = columns[name]
                values, valid = column.values[:rows], column.valid[:rows]
                expected = np.arange(rows) >= (0 if name in ("n", "s") else 256 * int(name[3:]))
                if len(values) != rows or (valid != expected).any():
                    wrong.append(f"{name}: {len(values)} of {rows}")
                if name != "s" and (values != np.where(valid, np.arange(rows), 0)).any():
                    wrong.append(name)
            if rows:
                at = np.array([0, rows // 2, rows - 1])
                found = [(row["n"], row["s"]) for row in columns.rows(at)]
                if found != [(int(row), f"text {row}") for row in at]:
                    wrong.append(str(found))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for batch in range(80):
        numbers = list(range(256 * batch, 256 * (batch + 1)))
        more = {f"new{at}": numbers for at in range(0, batch + 1, 20)}  # a column that begins late
        columns.append({"n": numbers, "s": [f"text {n}" for n in numbers], **more}, 256)
        published[0] += 256
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_a_new_column_is_not_put_into_what_readers_walk_through() -> None:
    columns = Columns(np)
    columns.append({"a": [1]}, 1)
    walked = iter(columns._parts)
    columns.append({"b": [1]}, 1)
    assert list(walked) == ["a"]
