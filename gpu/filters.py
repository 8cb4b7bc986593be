"""Filters: ``price < 50 and brand in ['a', 'b'] and not sold``, read once, tested on all rows of a segment at once.

The text has Python's syntax, is parsed by Python's `ast` and never evaluated. What may stand in it::

    price < 50                10 <= price < 50          price != other_price
    brand == 'a'              brand in ['a', 'b']       brand not in ('a', 'b')
    sold                      not sold                  price is None, price is not None
    name.startswith('x')      name.endswith('x')        'x' in name
    and  or  not  ( )         True  False               col("user-id") == 7

``col("…")`` is a column whose name Python would not take for one. A row that lacks the attribute passes no test of it,
neither ``price < 50`` nor ``not price < 50``; only ``is None`` finds it. Numbers compare by value (int with float,
never rounded), texts in the order of their code points, bools only for equality.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from headrace.gpu.backend import Array
from headrace.gpu.columns import Columns
from headrace.gpu.errors import FilterError
from headrace.gpu.filter_masks import Test
from headrace.gpu.filter_reader import read

__all__ = ["Filter", "parse"]

_KINDS = ("int", "float", "bool", "str")
_SMALL = 4096


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on attributes, from `parse`. Immutable, and a key: equal filters have equal texts and columns.

    Attributes
    ----------
    text : str
    kinds : tuple of (str, str)
        The columns that it reads, and the kind each was said to have; sorted.
    """

    text: str
    kinds: tuple[tuple[str, str], ...]
    _test: Test = field(compare=False, repr=False)

    def mask(self, columns: Columns, rows: int, xp: ModuleType) -> Array:
        """Which of the first `rows` rows pass.

        Parameters
        ----------
        columns : Columns
            A column that is not in it is null in every row.
        rows : int
        xp : module
            numpy or cupy, where the columns are.

        Returns
        -------
        bool (rows,), a new array on the device

        Raises
        ------
        FilterError
            A column holds another kind than the filter was read for.
        """
        return self._test.mask(columns, rows, xp)

    def to_wire(self) -> dict[str, Any]:
        """Plain types: the text, and what is needed to read it elsewhere."""
        return {"text": self.text, "kinds": dict(self.kinds)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Filter:
        """The reverse of `to_wire`; raises `FilterError`."""
        return parse(wire["text"], wire["kinds"])


def parse(text: str, schema: Mapping[str, str]) -> Filter:
    """Read a filter. Thread-safe; the last ones read are remembered.

    Parameters
    ----------
    text : str
    schema : mapping of str to str
        Column to its kind: "int", "float", "bool" or "str".

    Raises
    ------
    FilterError
        A syntax error, an unknown column, kinds that do not compare, or a limit passed; one sentence with the place,
        and the text with the place marked.
    """
    if not isinstance(text, str):
        raise FilterError(f"the filter is {text!r}: write it as text, such as 'price < 50'")
    for name, kind in schema.items():
        if kind not in _KINDS:
            raise FilterError(f"column {name!r} has the kind {kind!r}: a filter knows {', '.join(_KINDS)}")
    known = tuple(sorted(schema.items()))
    return _parse_small(text, known) if len(text) <= _SMALL else _parse_large(text, known)


def _parse(text: str, known: tuple[tuple[str, str], ...]) -> Filter:
    test, used = read(text, dict(known))
    return Filter(text, tuple(sorted(used.items())), test)


# Two memories, so that a few huge lists of values do not push out, or add up to more than, all that is usual.
_parse_small = functools.lru_cache(256)(_parse)
_parse_large = functools.lru_cache(8)(_parse)
