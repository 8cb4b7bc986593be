"""What a filter tests of a row, computed for all rows at once: one piece of code over NumPy and CuPy.

SQL's three-valued logic, without a third value: `not` has been pushed down to the single tests (De Morgan's laws hold
for it), and each of them answers for the rows that it is *known* to hold for. A row that lacks the attribute is known
for neither a test nor its negation. Texts are tested once each, on a column's vocabulary, never once for each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Array
from headrace.gpu.columns import Column, Columns, Vocabulary
from headrace.gpu.errors import FilterError
from headrace.gpu.exact_numbers import OPERATORS, Number, compare_mixed, exactly, float_bound, int_bound

__all__ = ["Always", "Compare", "CompareColumns", "Every", "Flag", "IsNull", "Match", "OneOf", "Some", "Test"]


class Test(Protocol):
    """One node of a filter."""

    def mask(self, columns: Columns, rows: int, xp: ModuleType) -> Array:
        """The rows among the first `rows` that are known to pass: bool (rows,), on the device, the caller's to keep."""


@dataclass(frozen=True, slots=True)
class Every:
    """Passes what passes every part."""

    parts: tuple[Test, ...]

    def mask(self, columns: Columns, rows: int, xp: ModuleType) -> Array:
        found = self.parts[0].mask(columns, rows, xp)
        for part in self.parts[1:]:
            found &= part.mask(columns, rows, xp)
        return found


@dataclass(frozen=True, slots=True)
class Some:
    """Passes what passes some part."""

    parts: tuple[Test, ...]

    def mask(self, columns: Columns, rows: int, xp: ModuleType) -> Array:
        found = self.parts[0].mask(columns, rows, xp)
        for part in self.parts[1:]:
            found |= part.mask(columns, rows, xp)
        return found


@dataclass(frozen=True, slots=True)
class Always:
    """``True`` or ``False``, written out."""

    value: bool

    def mask(self, columns: Columns, rows: int, xp: ModuleType) -> Array:
        return xp.full(rows, self.value, dtype=xp.bool_)


@dataclass(frozen=True, slots=True)
class IsNull:
    """``name is None``; negated: ``is not None``."""

    name: str
    negated: bool

    def mask(self, columns: Columns, rows: int, xp: ModuleType) -> Array:
        column = _column(columns, self.name, None)
        if column is None:
            return xp.full(rows, not self.negated, dtype=xp.bool_)
        valid = column.valid[:rows]
        return valid.copy() if self.negated else ~valid


class _Single:
    """A test of one column's values, known wherever the row has one."""

    __slots__ = ()
    name: str
    kind: str
    negated: bool

    def mask(self, columns: Columns, rows: int, xp: ModuleType) -> Array:
        column = _column(columns, self.name, self.kind)
        if column is None:
            return xp.zeros(rows, dtype=xp.bool_)
        found = self._test(column, rows, xp)
        return (~found if self.negated else found) & column.valid[:rows]

    def _test(self, column: Column, rows: int, xp: ModuleType) -> Array:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Flag(_Single):
    """A bool column by itself."""

    name: str
    kind: str
    negated: bool

    def _test(self, column: Column, rows: int, xp: ModuleType) -> Array:
        return column.values[:rows]


@dataclass(frozen=True, slots=True)
class Compare(_Single):
    """``name operator value``."""

    name: str
    kind: str
    operator: str
    value: Number | str
    negated: bool

    def _test(self, column: Column, rows: int, xp: ModuleType) -> Array:
        values = column.values[:rows]
        if isinstance(self.value, str):
            assert column.vocabulary is not None
            return _by_code(column.vocabulary.compare(self.operator, self.value), values, xp)
        if column.kind == "bool":
            return OPERATORS[self.operator](values, self.value)
        bound = (int_bound if column.kind == "int" else float_bound)(self.operator, self.value)
        if isinstance(bound, bool):
            return xp.full(rows, bound, dtype=xp.bool_)
        sign, value = bound
        return OPERATORS[sign](values, value)


@dataclass(frozen=True, slots=True)
class OneOf(_Single):
    """``name in [...]``."""

    name: str
    kind: str
    values: tuple[Number | str, ...]
    negated: bool

    def _test(self, column: Column, rows: int, xp: ModuleType) -> Array:
        values = column.values[:rows]
        if column.vocabulary is not None:
            table = np.zeros(len(column.vocabulary), dtype=np.bool_)
            codes = [column.vocabulary.code(text) for text in self.values if isinstance(text, str)]
            table[[code for code in codes if 0 <= code < len(table)]] = True
            return _by_code(table, values, xp)
        numbers = [value for value in self.values if not isinstance(value, str)]
        wanted = np.unique(np.array(exactly(column.kind, numbers), dtype=values.dtype))
        if not len(wanted):
            return xp.zeros(rows, dtype=xp.bool_)
        return xp.isin(values, xp.asarray(wanted))


@dataclass(frozen=True, slots=True)
class Match(_Single):
    """``name.startswith(part)``, ``name.endswith(part)``, ``part in name``."""

    name: str
    kind: str
    how: str
    part: str
    negated: bool

    def _test(self, column: Column, rows: int, xp: ModuleType) -> Array:
        # Codes first: a text that is added meanwhile is behind those that these rows have.
        codes = column.values[:rows]
        assert column.vocabulary is not None
        part = self.part
        if self.how == "contains":
            found = [part in text for text in column.vocabulary]
        elif self.how == "startswith":
            found = [text.startswith(part) for text in column.vocabulary]
        else:
            found = [text.endswith(part) for text in column.vocabulary]
        return _by_code(np.array(found, dtype=np.bool_), codes, xp)


@dataclass(frozen=True, slots=True)
class CompareColumns:
    """``name operator other``, both columns."""

    name: str
    kind: str
    operator: str
    other: str
    other_kind: str
    negated: bool

    def mask(self, columns: Columns, rows: int, xp: ModuleType) -> Array:
        left, right = _column(columns, self.name, self.kind), _column(columns, self.other, self.other_kind)
        if left is None or right is None:
            return xp.zeros(rows, dtype=xp.bool_)
        one, two = left.values[:rows], right.values[:rows]
        if left.vocabulary is not None and right.vocabulary is not None:
            first, second = _ranks(left.vocabulary, right.vocabulary)
            one, two = _by_code(first, one, xp), _by_code(second, two, xp)
        if {left.kind, right.kind} == {"int", "float"}:
            found = compare_mixed(self.operator, one, two, xp)
        else:
            found = OPERATORS[self.operator](one, two)
        return (~found if self.negated else found) & left.valid[:rows] & right.valid[:rows]


def _column(columns: Columns, name: str, kind: str | None) -> Column | None:
    """None if no row here has it. The column's own kind decides; a number may be kept as int where float was said.

    Raises
    ------
    FilterError
        It holds another kind than the filter was read for.
    """
    try:
        column = columns[name]
    except KeyError:
        return None
    numbers = {"int", "float"}
    if kind not in (None, column.kind) and not {kind, column.kind} <= numbers:
        raise FilterError(f"column {name!r} holds {column.kind}, the filter was read for {kind}: read it again")
    return column


def _by_code(table: npt.NDArray[Any], codes: Array, xp: ModuleType) -> Array:
    """`table` at each code; anything at -1, where a row has no text."""
    if not len(table):
        return xp.zeros(len(codes), dtype=table.dtype)
    return xp.asarray(table)[codes]


def _ranks(left: Vocabulary, right: Vocabulary) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Numbers for the texts of two vocabularies that compare as the texts do, by code."""
    one, two = list(left), list(right)
    place = {text: at for at, text in enumerate(sorted({*one, *two}))}
    first, second = (np.array([place[text] for text in texts], dtype=np.int64) for texts in (one, two))
    return first, second
