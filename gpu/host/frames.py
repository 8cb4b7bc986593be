"""Records as pandas columns. Decoded columns hold Python objects: whole numbers beside missing values stay exact."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.gpu.json_check import parse

__all__ = ["decode_json", "to_lists", "vectors"]

_PLAIN = frozenset({bool, dict, int, list, str, type(None)})
_PLAIN_OR_NAN = _PLAIN | {float}


def decode_json(values: Sequence[bytes]) -> tuple[pd.DataFrame, dict[int, str]]:
    """Parse one JSON object per value, all in one call; see `headrace.gpu.backend.Frames.decode_json`."""
    parsed = parse(values)
    # One block of objects, filled column by column: a frame from a dict of columns costs twice as much for 32 records.
    block = np.empty((len(parsed.columns), len(parsed.rows)), dtype=object)
    for line, column in zip(block, parsed.columns.values(), strict=True):
        line[:] = np.fromiter(column, dtype=object, count=len(column))
    frame = pd.DataFrame(
        block.T,
        index=pd.Index(np.array(parsed.rows, dtype=np.int64)),
        columns=pd.Index(list(parsed.columns), dtype=object),
        dtype=object,
        copy=False,
    )
    return frame, parsed.bad


def to_lists(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Columns as lists of plain Python values, None where missing; takes any frame, also one that a user made."""
    # One conversion for the whole frame: taking columns out of a frame one by one costs ten times as much.
    columns = frame.to_numpy(dtype=object).T.tolist()
    return {str(name): _plain(column) for name, column in zip(frame.columns, columns, strict=True)}


def vectors(frame: pd.DataFrame, column: str, dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The list column as a float32 matrix; see `headrace.gpu.backend.Frames.vectors`."""
    cells = frame[column].tolist() if column in frame.columns else []
    rows = [row for row, cell in enumerate(cells) if isinstance(cell, list | np.ndarray) and len(cell) == dim]
    matrix = _matrix([cells[row] for row in rows], dim)
    if matrix is None:  # at least one list holds something else than numbers: find out which
        rows = [row for row in rows if _matrix([cells[row]], dim) is not None]
        matrix = _matrix([cells[row] for row in rows], dim)
        assert matrix is not None
    return matrix, np.array(rows, dtype=np.int64)


def _plain(column: list[Any]) -> list[Any]:
    kinds = set(map(type, column))
    if kinds <= _PLAIN:
        return column
    if kinds <= _PLAIN_OR_NAN:
        return [None if type(value) is float and value != value else value for value in column]
    return [_plain_value(value) for value in column]


def _plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    # NaN, NaT and NA are what pandas writes for "missing".
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def _matrix(lists: Sequence[Sequence[float]], dim: int) -> npt.NDArray[np.float32] | None:
    """The lists as one matrix, or None if an element is not a number (JSON's true and false are not)."""
    # struct is three times as fast as NumPy here, and refuses the strings and nulls that NumPy reads as numbers.
    pack = struct.Struct(f"{dim}d").pack
    try:
        wide = np.frombuffer(b"".join([pack(*numbers) for numbers in lists]), dtype=np.float64)
    except struct.error:
        return None
    with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused as such by the caller
        matrix = wide.astype(np.float32).reshape(-1, dim)
    # A boolean would have become exactly 0 or 1; only rows with such an element need a second look.
    for row in np.flatnonzero(((matrix == 0) | (matrix == 1)).any(axis=1)).tolist():
        if not {bool, np.bool_}.isdisjoint(map(type, lists[row])):
            return None
    return matrix
