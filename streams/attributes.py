"""Attributes have one kind per column: which records disagree with it, and which columns are new."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["BEYOND", "check_columns", "short"]

_KINDS: Mapping[type, str] = {int: "int", float: "float", bool: "bool", str: "str"}
_FITTING: Mapping[str, set[type]] = {"int": {int}, "float": {int, float}, "bool": {bool}, "str": {str}}
_INT64 = 1 << 63
BEYOND = f"beyond the range of int64 ({-_INT64} to {_INT64 - 1})"
"""What is said of a whole number that no column and no id can hold."""


def short(value: object, most: int = 60) -> str:
    """`value` as Python would write it, cut to `most` characters: reasons are for reading, records may be large."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def check_columns(
    columns: dict[str, list[Any]],
    rows: list[int],
    schema: Mapping[str, str],
    refuse: Callable[[int, str], None],
) -> dict[str, str]:
    """Hold the columns against the schema; whole numbers in a float column are widened in place.

    Parameters
    ----------
    columns : dict of str to list
        Values by record, None where absent.
    rows : list of int
        The usable records, rising: positions in the columns. Others are neither read nor changed.
    schema : Mapping of str to str
        Column to kind ("int", "float", "bool", "str") as known so far.
    refuse : callable
        Told the row and the reason of each record that does not fit.

    Returns
    -------
    dict of str to str
        The schema with what is new: the first usable record that has a column decides its kind, and a record that is
        refused decides nothing.
    """
    grown = dict(schema)
    if not all(_uniform(columns, name, rows, grown) for name in columns):
        rows, grown = _one_by_one(columns, rows, schema, refuse)
    for name in columns.keys() & grown.keys():
        if grown[name] == "float":
            column = columns[name]
            for row in rows:
                if type(column[row]) is int:
                    column[row] = float(column[row])
    return grown


def _uniform(columns: dict[str, list[Any]], name: str, rows: list[int], grown: dict[str, str]) -> bool:
    """True if the whole column has the kind that it must have; a new column is noted. The way of every good batch."""
    column = columns[name]
    values = column if len(rows) == len(column) else [column[row] for row in rows]
    kinds = set(map(type, values))
    kinds.discard(type(None))
    if not kinds:
        return True
    if name not in grown:
        kind = _KINDS.get(next(iter(kinds)))
        if len(kinds) > 1 or kind is None:
            return False
        grown[name] = kind
    if not kinds <= _FITTING[grown[name]]:
        return False
    return int not in kinds or all(type(value) is not int or -_INT64 <= value < _INT64 for value in values)


def _one_by_one(
    columns: dict[str, list[Any]], rows: list[int], schema: Mapping[str, str], refuse: Callable[[int, str], None]
) -> tuple[list[int], dict[str, str]]:
    """The slow way: the rows that fit, and the schema after them."""
    grown = dict(schema)
    fitting = []
    for row in rows:
        new: dict[str, str] = {}
        for name, column in columns.items():
            if (value := column[row]) is None:
                continue
            kind, why = _kind(name, value, grown.get(name))
            if why:
                refuse(row, why)
                break
            new[name] = kind
        else:
            grown.update(new)
            fitting.append(row)
    return fitting, grown


def _kind(name: str, value: Any, known: str | None) -> tuple[str, str]:
    """The kind of the column with this value in it, and why the value cannot be there (empty if it can)."""
    kind = _KINDS.get(type(value))
    if kind is None:
        what = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else type(value).__name__
        return "", f"attribute {short(name)} is {what} {short(value)}: only str, int, float, bool and null are allowed"
    if kind == "int" and not -_INT64 <= value < _INT64:
        return "", f"attribute {short(name)} is {short(value)}, {BEYOND}: write it as a str"
    if known in (None, kind) or (known == "float" and kind == "int"):
        return known or kind, ""
    return "", f"attribute {short(name)} is {kind} {short(value)}, but this column holds {known}"
