"""Attributes beside the rows of a segment: one column per name, on the device.

One piece of code over NumPy and CuPy. A frame of pandas or cuDF in the same place would cost a hundred times more to
append 256 rows to, and could not be read while it is appended to; its columns are arrays such as these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Array
from headrace.gpu.buffers import Buffer
from headrace.gpu.errors import RecordError
from headrace.gpu.vocabulary import GrowingVocabulary, Vocabulary, merge

__all__ = ["Column", "Columns", "Vocabulary"]

Rows = npt.NDArray[np.int64]

_DTYPES: Mapping[str, str] = {"int": "int64", "float": "float64", "bool": "bool", "str": "int32"}
_ABSENT: Mapping[str, Any] = {"int": 0, "float": 0.0, "bool": False, "str": -1}
_KINDS: Mapping[type, str] = {int: "int", float: "float", bool: "bool", str: "str"}
_FITTING: Mapping[str, set[type]] = {"int": {int}, "float": {int, float}, "bool": {bool}, "str": {str}}
_NONE = type(None)


@dataclass(frozen=True, slots=True)
class Column:
    """One moment of one column. It may be longer than your view: slice first, ``column.values[:rows]``.

    Attributes
    ----------
    kind : {"int", "float", "bool", "str"}
    values : int64, float64, bool or (str) int32 (n,), on the device
        Of a str column the codes. 0 (str: -1) where not valid.
    valid : bool (n,), on the device
        False where the row lacks the attribute.
    vocabulary : Vocabulary or None
        Of a str column.
    """

    kind: str
    values: Array
    valid: Array
    vocabulary: Vocabulary | None = None

    @property
    def codes(self) -> Array:
        """`values`, by the name that it deserves in a str column."""
        return self.values


class Columns:
    """All attributes of a segment's rows.

    A row takes 9 bytes in each column (bool 2, str 5), whether it has the attribute or not, and up to twice that while
    they grow; a str column has each distinct text once more, on the host. To append takes 0.1 microseconds a row and
    column in batches of 256, three times as long for texts that were never there before.

    Parameters
    ----------
    xp : module
        numpy or cupy.

    Notes
    -----
    One writer; everybody else may read without a lock what was appended before, as is written in
    `headrace.gpu.buffers`. On a GPU writer and readers use the same stream, or the writer waits for its own before it
    tells anybody of the rows.
    """

    def __init__(self, xp: ModuleType) -> None:
        self._xp = xp
        self._parts: dict[str, _Part] = {}
        self._count = 0
        self._sealed = False

    def __len__(self) -> int:
        """Rows, those without any attribute included."""
        return self._count

    @property
    def schema(self) -> Mapping[str, str]:
        """Kinds by name, of the columns that some row has had."""
        return MappingProxyType({name: part.kind for name, part in self._parts.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Column:
        """The column as it is now; at least as long as every view published before. KeyError if there is none."""
        part = self._parts[name]
        return Column(part.kind, part.values.first(), part.valid.first(), part.vocabulary)

    @property
    def nbytes(self) -> int:
        """Bytes held, on the device and (vocabularies) on the host."""
        return sum(part.nbytes for part in self._parts.values())

    def append(self, attributes: Mapping[str, Sequence[Any]], count: int) -> None:
        """Write `count` rows behind the last one.

        Parameters
        ----------
        attributes : mapping of str to sequence, each (count,)
            int, float, bool or str, one kind per column (int in a float column too); None where a row lacks the
            attribute. Columns that are not named are absent in all of these rows.
        count : int

        Raises
        ------
        RecordError
            A value is not of its column's kind, or a list has another length; nothing has been written.
        ValueError
            This is a copy, from `take` or `gather`.
        """
        if self._sealed:
            raise ValueError(f"sealed columns of {self._count} rows cannot be appended to: append to new ones")
        types = {name: self._types(name, values, count) for name, values in attributes.items()}
        kinds = {name: self._kind(name, types[name], values) for name, values in attributes.items()}
        new = {
            name: _Part(self._xp, kind, GrowingVocabulary() if kind == "str" else None)
            for name, kind in kinds.items()
            if kind is not None and name not in self._parts
        }
        written = {
            name: (self._parts.get(name) or new[name]).encode(attributes[name], _NONE in types[name])
            for name, kind in kinds.items()
            if kind is not None and types[name] != {_NONE}
        }
        for part in new.values():
            part.lack(self._count)
        if new:
            self._parts = self._parts | new  # a new dictionary: readers walk through the old one without the lock
        for name, part in self._parts.items():
            if name in written:
                part.append(*written[name])
            else:
                part.lack(count)
        self._count += count

    def growth(self, attributes: Mapping[str, Sequence[Any]], count: int) -> int:
        """Bytes that `append` would add to `nbytes`, at most: also of columns that lack a value, and of new texts."""
        grown = sum(part.growth(count, attributes.get(name, ())) for name, part in self._parts.items())
        for name in attributes.keys() - self._parts.keys():
            first = next((value for value in attributes[name] if value is not None), None)
            if first is not None:  # else there is no such column yet
                kind = _KINDS.get(type(first), "float")
                part = _Part(self._xp, kind, GrowingVocabulary() if kind == "str" else None)
                grown += part.nbytes + part.growth(2 * (self._count + count), attributes[name])  # it doubles
        return grown

    def _types(self, name: str, values: Sequence[Any], count: int) -> set[type]:
        if len(values) != count:
            raise RecordError(f"attribute {name!r} has {len(values)} values for {count} rows: pass one for each")
        return set(map(type, values))

    def _kind(self, name: str, types: set[type], values: Sequence[Any]) -> str | None:
        """The column's kind; None if it has none yet, because all values are None."""
        types = types - {_NONE}
        known = self._parts.get(name)
        kind = known.kind if known else None
        if kind is None and types:
            kind = "float" if types == {int, float} else _KINDS.get(next(iter(types)))
        if not types <= _FITTING.get(kind or "", set()):
            fitting = _FITTING.get(kind or "", set())
            wrong = next(value for value in values if type(value) not in fitting and value is not None)
            holds = f"this column holds {kind}" if kind else "only str, int, float and bool can be kept"
            raise RecordError(f"attribute {name!r} is {type(wrong).__name__} {repr(wrong)[:60]}, but {holds}")
        return kind

    def rows(self, rows: Rows) -> list[dict[str, Any]]:
        """The attributes that each of `rows` (integers (r,)) has, as plain Python values; one gather per column."""
        found: list[dict[str, Any]] = [{} for _ in range(len(rows))]
        at = self._xp.asarray(rows)
        for name, part in self._parts.items():
            for row, value in zip(found, part.to_list(at), strict=True):
                if value is not None:
                    row[name] = value
        return found

    def take(self, rows: Rows) -> Columns:
        """A sealed copy of `rows`, in that order."""
        return self.gather(self._xp, [(self, rows)])

    @staticmethod
    def gather(xp: ModuleType, sources: Sequence[tuple[Columns, Rows]]) -> Columns:
        """A sealed copy of chosen rows of several segments, one source after the other; for merges.

        Texts get new codes, in their own order, and those that no row has any more are left out. Columns that no chosen
        row has are left out too.

        Raises
        ------
        RecordError
            A column is of one kind in one source and of another elsewhere.
        """
        gathered = Columns(xp)
        gathered._sealed = True
        gathered._count = sum(len(rows) for _, rows in sources)
        chosen = [(columns._parts, xp.asarray(rows)) for columns, rows in sources]
        for name in dict.fromkeys(name for parts, _ in chosen for name in parts):
            part = _gather(xp, name, [(parts.get(name), rows) for parts, rows in chosen], gathered._count)
            if part is not None:
                gathered._parts[name] = part
        return gathered


class _Part:
    """One column's buffers."""

    def __init__(self, xp: ModuleType, kind: str, vocabulary: Vocabulary | None, expected: int = 1024) -> None:
        self._xp, self.kind, self.vocabulary = xp, kind, vocabulary
        self.values = Buffer(xp, _DTYPES[kind], expected=expected)
        self.valid = Buffer(xp, "bool", expected=expected)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.valid.nbytes + (self.vocabulary.nbytes if self.vocabulary else 0)

    def growth(self, more: int, values: Sequence[Any]) -> int:
        """Bytes that appending `more` rows would add, of which `values` are there."""
        texts = self.vocabulary.growth(values) if isinstance(self.vocabulary, GrowingVocabulary) else 0
        return self.values.growth(more) + self.valid.growth(more) + texts

    def encode(self, values: Sequence[Any], absent: bool) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """Host arrays of the values and of which are there (None: all)."""
        if isinstance(self.vocabulary, GrowingVocabulary):
            codes = self.vocabulary.encode(values)
            return codes, codes >= 0 if absent else None
        valid = None
        if absent:
            valid = np.array([value is not None for value in values], dtype=np.bool_)
            values = [_ABSENT[self.kind] if value is None else value for value in values]
        try:
            return np.array(values, dtype=_DTYPES[self.kind]), valid
        except OverflowError as error:
            raise RecordError(f"an attribute does not fit {_DTYPES[self.kind]}: {error}; write it as a str") from error

    def append(self, values: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None) -> None:
        xp = self._xp
        self.values.append(xp.asarray(values))
        self.valid.append(xp.ones(len(values), dtype=xp.bool_) if valid is None else xp.asarray(valid))

    def lack(self, count: int) -> None:
        """Rows that have no value here."""
        self.values.append(self._xp.full(count, _ABSENT[self.kind], dtype=_DTYPES[self.kind]))
        self.valid.append(self._xp.zeros(count, dtype=self._xp.bool_))

    def to_list(self, rows: Array) -> list[Any]:
        values = _to_host(self.values.take(rows))
        if self.vocabulary is not None:
            return self.vocabulary.to_list(values)
        valid = _to_host(self.valid.take(rows))
        if valid.all():
            return values.tolist()  # type: ignore[no-any-return]
        return [value if there else None for value, there in zip(values.tolist(), valid.tolist(), strict=True)]


def _gather(xp: ModuleType, name: str, sources: Sequence[tuple[_Part | None, Array]], count: int) -> _Part | None:
    parts = [part for part, _ in sources if part is not None]
    kinds = sorted({part.kind for part in parts})
    if len(kinds) > 1:
        raise RecordError(f"attribute {name!r} is {kinds[0]} in one segment and {kinds[1]} in another")
    values = [part.values.take(rows) if part is not None else None for part, rows in sources]
    valid = [
        part.valid.take(rows) if part is not None else xp.zeros(len(rows), dtype=xp.bool_) for part, rows in sources
    ]
    if not any(bool(some.any()) for some in valid):
        return None
    vocabulary = None
    if kinds == ["str"]:
        coded = [(part.vocabulary, codes) for (part, _), codes in zip(sources, values, strict=True) if part is not None]
        vocabulary, recoded = merge([(texts, _used(xp, texts, codes)) for texts, codes in coded if texts is not None])
        tables = iter(recoded)
        values = [None if codes is None else xp.asarray(next(tables))[codes] for codes in values]
    gathered = _Part(xp, kinds[0], vocabulary, expected=count)
    for some, there in zip(values, valid, strict=True):
        if some is None:
            gathered.lack(len(there))
        else:
            gathered.values.append(some)
            gathered.valid.append(there)
    return gathered


def _used(xp: ModuleType, vocabulary: Vocabulary, codes: Array) -> npt.NDArray[np.bool_]:
    """Which codes occur, bool (n,), on the host; one more than there are, for -1, is cut off."""
    used = xp.zeros(len(vocabulary) + 1, dtype=xp.bool_)
    used[codes] = True
    return _to_host(used)[:-1]


def _to_host(array: Array) -> npt.NDArray[Any]:
    """A CuPy array comes to the host; a NumPy array is itself."""
    return array.get() if hasattr(array, "get") else np.asarray(array)
