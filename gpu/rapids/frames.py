"""Records as cuDF columns.

A cuDF column has one type. A field whose values agree becomes int64, float64, bool, str or list of float64; where
records disagree, or values are nested, the column is a struct with the one field ``json``, the value's JSON text, so
that nothing is converted or lost on the way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import cudf
import cupy as cp
import numpy as np
import orjson
import pandas as pd
import pyarrow as pa

from headrace.gpu.host import frames as host
from headrace.gpu.json_check import NESTED, parse

__all__ = ["decode_json", "to_lists", "vectors"]

_TYPES = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
_JSON = pa.struct([("json", pa.string())])
_NUMBERS = frozenset({int, float})
_INT64 = 1 << 63


def decode_json(values: Sequence[bytes]) -> tuple[cudf.DataFrame, dict[int, str]]:
    """Parse one JSON object per value, all in one call; see `headrace.gpu.backend.Frames.decode_json`.

    Parsed on the host, which has to look at every value anyway to refuse duplicate keys; the columns reach the device
    in one transfer, and their numbers are the same to the last bit as on the host backend.
    """
    parsed = parse(values)
    if not parsed.columns:
        return cudf.DataFrame(index=cudf.Index(np.array(parsed.rows, dtype=np.int64))), parsed.bad
    table, too_deep = _table(parsed.columns)
    parsed.bad.update((parsed.rows[place], NESTED) for place in too_deep)
    frame = cudf.DataFrame.from_arrow(table)
    frame.index = cudf.Index(np.delete(np.array(parsed.rows, dtype=np.int64), too_deep))
    return frame, parsed.bad


def to_lists(frame: cudf.DataFrame) -> dict[str, list[Any]]:
    """Columns as lists of plain Python values, None where missing."""
    return _lists(frame.to_arrow(preserve_index=False))


def vectors(frame: cudf.DataFrame, column: str, dim: int) -> tuple[Any, Any]:
    """The list column as a float32 matrix; see `headrace.gpu.backend.Frames.vectors`."""
    if column not in frame.columns:
        return cp.empty((0, dim), dtype=cp.float32), cp.empty(0, dtype=cp.int64)
    cells = frame[column]
    if isinstance(cells.dtype, cudf.ListDtype):
        rows = cp.flatnonzero(cells.list.len().fillna(-1).to_cupy() == dim)
        if len(rows) == 0:
            return cp.empty((0, dim), dtype=cp.float32), rows
        numbers = cells.take(rows).list.leaves.astype("float32")
        return numbers.to_cupy(na_value=np.nan).reshape(-1, dim), rows
    # One record with something else in this field made the column JSON text: read the lists among them on the host.
    lists = pd.DataFrame({column: pd.Series(to_lists(frame[[column]])[column], dtype=object)})
    matrix, places = host.vectors(lists, column, dim)
    return cp.asarray(matrix), cp.asarray(places)


def _table(columns: dict[str, list[Any]]) -> tuple[pa.Table, list[int]]:
    """The columns as an Arrow table, without the rows that are nested too deeply; their places are returned."""
    too_deep: set[int] = set()
    table = pa.table({name: _array(column, too_deep) for name, column in columns.items()})
    if too_deep:
        table = table.filter(pa.array([place not in too_deep for place in range(table.num_rows)]))
    return table, sorted(too_deep)


def _array(column: list[Any], too_deep: set[int]) -> pa.Array:
    kinds = set(map(type, column)) - {type(None)}
    if not kinds:
        return pa.nulls(len(column), pa.string())
    if kinds == {list} and all(_NUMBERS.issuperset(map(type, cell)) for cell in column if cell is not None):
        return _number_lists(column)
    in_range = kinds != {int} or all(cell is None or -_INT64 <= cell < _INT64 for cell in column)
    if len(kinds) == 1 and in_range and (kind := _TYPES.get(*kinds)):
        return pa.array(column, type=kind)
    cells = [None if cell is None else _encoded(cell, place, too_deep) for place, cell in enumerate(column)]
    return pa.array(cells, type=_JSON)


def _number_lists(column: list[Any]) -> pa.Array:
    lengths = [0 if cell is None else len(cell) for cell in column]
    numbers = np.fromiter(chain.from_iterable(filter(None, column)), dtype=np.float64, count=sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, numbers, mask=pa.array([cell is None for cell in column]))


def _encoded(cell: Any, place: int, too_deep: set[int]) -> dict[str, str] | None:
    if not isinstance(cell, dict | list):
        return {"json": json.dumps(cell)}  # takes whole numbers of any length
    try:
        return {"json": orjson.dumps(cell).decode()}
    except orjson.JSONEncodeError:
        too_deep.add(place)
        return None


def _lists(table: pa.Table) -> dict[str, list[Any]]:
    lists = {}
    for name in table.column_names:
        cells = table.column(name).to_pylist()
        if table.schema.field(name).type == _JSON:
            cells = [None if cell is None else _decoded(cell["json"]) for cell in cells]
        lists[name] = [None if type(cell) is float and cell != cell else cell for cell in cells]
    return lists


def _decoded(text: str) -> Any:
    return orjson.loads(text) if text[0] in "[{" else json.loads(text)
