"""Which JSON values can be used: one parse for the whole batch, and for each value that cannot be used, the reason.

Both backends ask here, so the same record is refused for the same reason wherever it is read. What orjson accepts is
JSON for Headrace, with two things added that orjson passes over in silence: a key that appears twice, and a whole
number beyond 64 bits (which orjson would round to a float).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

__all__ = ["NESTED", "Parsed", "parse"]

# Stands between the values of a batch. It is drawn anew in each process, so no record can be made to contain it; the
# top and the lowest bit are set, so no float is equal to it either.
_SEPARATOR = secrets.randbits(61) | 1 << 61 | 1
_JOINT = b",%d," % _SEPARATOR

_INT64 = 2.0**63

NESTED = "nested too deeply"
"""The reason for a value with more levels than can be read."""


@dataclass(slots=True)
class Parsed:
    """The usable values of a batch, as columns of Python objects.

    Attributes
    ----------
    rows : list of int
        Positions of the usable values in the batch, rising.
    columns : dict of str to list
        One list per field that any usable value has, aligned with `rows`; None where it is absent or null.
    bad : dict of int to str
        Position of each other value, and why it cannot be used.
    """

    rows: list[int]
    columns: dict[str, list[Any]]
    bad: dict[int, str]


def parse(values: Sequence[bytes]) -> Parsed:
    """Parse one JSON object per value; one bad value never touches its neighbours.

    Whole numbers stay exact at the top level of a value, however large; inside a list or a nested object those beyond
    64 bits become floats.
    """
    items, bad, text = _load(values)
    rows, objects = [], []
    for row, item in enumerate(items):
        if type(item) is dict:
            rows.append(row)
            objects.append(item)
        elif row not in bad:
            bad[row] = f"not a JSON object but {_kind(item)}"
    if len(rows) < len(values):
        text = b" ".join([values[row] for row in rows])
    columns = _columns(objects)
    tokens = sum(map(len, objects))
    for name, column in columns.items():
        kinds = list(map(type, column))
        tokens += kinds.count(str)
        if float in kinds:
            _restore_integers(values, rows, name, column)
    # Every string token of a value is a key or a string. If the fields that are there account for all quotes of the
    # batch, then no value has hidden one, and nested values have none at all.
    if _quotes(text) != 2 * tokens:
        keep = _without_duplicates(values, rows, objects, bad)
        if len(keep) < len(rows):
            rows = [rows[i] for i in keep]
            columns = {name: [column[i] for i in keep] for name, column in columns.items()}
            seen: set[str] = set().union(*(objects[i] for i in keep))
            columns = {name: column for name, column in columns.items() if name in seen}
    return Parsed(rows, columns, bad)


def _load(values: Sequence[bytes]) -> tuple[Sequence[Any], dict[int, str], bytes]:
    """Each value parsed, the reasons for those that are not JSON (None stands in their place), and all in one text."""
    text = b"[%b]" % _JOINT.join(values)
    try:
        joined = orjson.loads(text)
    except orjson.JSONDecodeError:
        joined = []
    # A value that is not closed (`{"a":[1`) swallows the separator behind it, and one that holds two (`1,2`) makes the
    # list longer. All separators in their places mean that each value was read by itself.
    if len(joined) == 2 * len(values) - 1 and joined[1::2].count(_SEPARATOR) == len(values) - 1:
        return joined[::2], {}, text
    items, bad = [], {}
    for row, value in enumerate(values):
        try:
            items.append(orjson.loads(value))
        except orjson.JSONDecodeError as error:
            items.append(None)
            bad[row] = _reason(value, error)
    return items, bad, text


def _reason(value: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        value.decode()
    except UnicodeDecodeError as broken:
        return f"not UTF-8 (byte {broken.start})"
    if "depth" in error.msg or "ecursion" in error.msg:
        return NESTED
    return "empty" if not value.strip() else f"not JSON: {error}"


def _kind(item: Any) -> str:
    if item is None:
        return "null"
    kinds: Mapping[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return kinds.get(type(item), "an array")


def _columns(objects: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    # dict.fromkeys keeps the order in which the fields were first seen, so that frames are the same on every run.
    names: dict[str, None] = {}
    for item in objects:
        names.update(dict.fromkeys(item))
    return {name: [item.get(name) for item in objects] for name in names}


def _restore_integers(values: Sequence[bytes], rows: Sequence[int], name: str, column: list[Any]) -> None:
    """Put back the whole numbers that orjson has rounded, because they are beyond 64 bits."""
    for i, number in enumerate(column):
        if type(number) is float and not -_INT64 < number < _INT64:
            # Valid JSON of less than 1024 levels: what could fail is only the stack of the caller.
            try:
                column[i] = json.loads(values[rows[i]])[name]
            except RecursionError:
                continue


def _quotes(text: bytes) -> int:
    """How many quotes open or close a string in valid JSON (escaped ones do not)."""
    count = text.count(b'"')
    if b"\\" in text:
        # Pairs first: in `\\"` the quote closes the string, in `\\\"` it does not.
        count -= text.replace(b"\\\\", b"").count(b'\\"')
    return count


def _without_duplicates(
    values: Sequence[bytes], rows: Sequence[int], objects: Sequence[dict[str, Any]], bad: dict[int, str]
) -> list[int]:
    """Positions in `rows` of the values without a duplicate key; the others are put into `bad`."""
    keep = []
    for i, (row, item) in enumerate(zip(rows, objects, strict=True)):
        if _quotes(values[row]) == 2 * _tokens(item):
            keep.append(i)
        else:
            bad[row] = f"duplicate key{_duplicate(values[row])}"
    return keep


def _tokens(item: Any) -> int:
    """Keys and strings in a parsed value, on all levels."""
    count, waiting = 0, [item]
    while waiting:  # a stack of our own: parsed values may be nested deeper than Python may call
        item = waiting.pop()
        if isinstance(item, dict):
            count += len(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, str):
            count += 1
    return count


class _Found(Exception):
    pass


def _refuse_duplicate(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise _Found(name)
        seen.add(name)


def _duplicate(value: bytes) -> str:
    """The name of the key that appears twice, for the reason only: that there is one is known already."""
    try:
        json.loads(value, object_pairs_hook=_refuse_duplicate)
    except _Found as found:
        return f" {found.args[0]!r}"
    except RecursionError:
        return ""
    return ""
