"""From a filter's syntax tree to its tests: whitelisted nodes, checked names and kinds, refusals with their place."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from headrace.gpu.errors import FilterError
from headrace.gpu.filter_masks import Always, Compare, CompareColumns, Every, Flag, IsNull, Match, OneOf, Some, Test
from headrace.gpu.filter_text import checked, refusal

__all__ = ["MAX_TESTS", "read"]

MAX_TESTS = 256
"""Comparisons in one filter: each reads a column of every row."""

_SIGNS: Mapping[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip
_METHODS = "texts have .startswith('…') and .endswith('…')"
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def read(text: str, schema: Mapping[str, str]) -> tuple[Test, dict[str, str]]:
    """The tests that a filter makes, and the columns that it reads with their kinds.

    Raises
    ------
    FilterError
        As `filters.parse`.
    """
    plain = checked(text, schema)
    ahead = len(plain) - len(plain.lstrip())
    try:
        tree = ast.parse(plain.lstrip(), mode="eval").body
    except SyntaxError as error:
        start = ahead + max(0, (error.offset or 1) - 1)
        why = re.split(r"\. Perhaps|;", error.msg or "invalid syntax")[0]
        raise refusal(text, min(start, len(text) - 1), start + 1, f"it cannot be read here ({why})") from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise FilterError(f"the filter cannot be read ({type(error).__name__}): write a simpler one") from None
    reader = _Reader(text, plain.lstrip(), ahead, schema)
    return reader.condition(tree, negated=False), reader.used


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    kind: str


@dataclass(slots=True)
class _Reader:
    """Turns a syntax tree into tests, checking names and kinds; a negation is carried down to the tests."""

    text: str
    plain: str
    ahead: int
    schema: Mapping[str, str]
    used: dict[str, str] = field(default_factory=dict)
    tests: int = 0

    # -- conditions ----------------------------------------------------------------------------------------------------

    def condition(self, node: ast.expr, *, negated: bool) -> Test:
        match node:
            case ast.BoolOp():
                parts = tuple(self.condition(part, negated=negated) for part in node.values)
                return Every(parts) if isinstance(node.op, ast.And) != negated else Some(parts)
            case ast.UnaryOp(op=ast.Not()):
                return self.condition(node.operand, negated=not negated)
            case ast.Compare():
                return self._comparison(node, negated)
            case ast.Constant(value=bool(value)):
                return Always(value != negated)
            case ast.Call(func=ast.Attribute() as function):
                return self._method(node, function, negated)
        column = self._column(node)
        if column is None:
            self._refuse(node, "this is no condition: compare a column with a value, as in price < 50")
        if column.kind != "bool":
            self._refuse(node, f"column {column.name!r} holds {_many(column.kind)}: compare it with a value")
        return self._counted(node, Flag(column.name, "bool", negated))

    def _comparison(self, node: ast.Compare, negated: bool) -> Test:
        sides = [node.left, *node.comparators]
        if len(sides) > 2:
            for between in sides[1:-1]:
                if isinstance(between, ast.List | ast.Tuple):
                    self._refuse(between, "a list can only stand at the end: join two conditions with 'and'")
        pairs = tuple(
            self._pair(left, sign, right, negated)
            for left, sign, right in zip(sides, node.ops, sides[1:], strict=False)
        )
        if len(pairs) == 1:
            return pairs[0]
        return Some(pairs) if negated else Every(pairs)

    def _pair(self, left: ast.expr, sign: ast.cmpop, right: ast.expr, negated: bool) -> Test:
        if isinstance(sign, ast.In | ast.NotIn):
            return self._counted(left, self._membership(left, right, negated != isinstance(sign, ast.NotIn)))
        if isinstance(sign, ast.Is | ast.IsNot):
            return self._counted(left, self._null(left, right, negated != isinstance(sign, ast.IsNot)))
        for side in (left, right):
            if isinstance(side, ast.Constant) and side.value is None:
                self._refuse(side, "nothing equals None: write 'is None' or 'is not None'")
            if isinstance(side, ast.List | ast.Tuple):
                self._refuse(side, "a list can only be compared with 'in' or 'not in'")
        operator = _SIGNS[type(sign)]
        one, two = self._column(left), self._column(right)
        if one is None:
            if two is None:
                self._refuse(left, "two values are compared: one side must be a column", until=right)
            one, two, left, right = two, None, right, left
            operator = _TURNED.get(operator, operator)
        if two is not None:
            self._check(one, two.kind, operator, right, f"column {two.name!r}, which holds {_many(two.kind)}")
            found: Test = CompareColumns(one.name, one.kind, operator, two.name, two.kind, negated)
        else:
            value = self._value(right)
            self._check(one, type(value).__name__, operator, right, repr(value))
            found = Compare(one.name, one.kind, operator, value, negated)
        return self._counted(left, found)

    def _membership(self, left: ast.expr, right: ast.expr, negated: bool) -> Test:
        if isinstance(right, ast.List | ast.Tuple):
            column = self._column(left)
            if column is None:
                self._refuse(left, "only a column can be looked for in a list")
            values = tuple(self._value(element) for element in right.elts)
            for value, element in zip(values, right.elts, strict=True):
                self._check(column, type(value).__name__, "==", element, _short(value))
            return OneOf(column.name, column.kind, values, negated)
        column = self._column(right)
        if column is None:
            self._refuse(right, "'in' needs a list of values, as in brand in ['a', 'b'], or a column of texts")
        part = self._value(left) if self._column(left) is None else None
        if column.kind != "str" or not isinstance(part, str):
            self._refuse(right, f"only a text can be looked for in a column, and {column.name!r} must hold texts")
        return Match(column.name, column.kind, "contains", part, negated)

    def _null(self, left: ast.expr, right: ast.expr, negated: bool) -> Test:
        if not isinstance(right, ast.Constant) or right.value is not None:
            self._refuse(right, "'is' only goes with None: write == or !=")
        column = self._column(left)
        if column is None:
            self._refuse(left, "only a column can be None")
        return IsNull(column.name, negated)

    def _method(self, node: ast.Call, function: ast.Attribute, negated: bool) -> Test:
        if function.attr not in ("startswith", "endswith"):
            self._refuse(node, f".{function.attr}() cannot be: {_METHODS}")
        column = self._column(function.value)
        if column is None or column.kind != "str":
            self._refuse(function.value, f".{function.attr}() needs a column that holds texts")
        if len(node.args) != 1 or node.keywords or not isinstance(node.args[0], ast.Constant):
            self._refuse(node, f".{function.attr}() takes one text, as in {column.name}.{function.attr}('x')")
        part = self._value(node.args[0])
        if not isinstance(part, str):
            self._refuse(node.args[0], f".{function.attr}() takes a text, not {part!r}")
        return self._counted(node, Match(column.name, column.kind, function.attr, part, negated))

    def _counted(self, node: ast.expr, test: Test) -> Test:
        self.tests += 1
        if self.tests > MAX_TESTS:
            self._refuse(node, f"the filter makes more than {MAX_TESTS} comparisons: write lists with 'in'")
        return test

    # -- operands ------------------------------------------------------------------------------------------------------

    def _column(self, node: ast.expr) -> _Column | None:
        """The column that a node names, None if it names none."""
        match node:
            case ast.Name():
                # As it was typed: Python would fold letters that look alike into one.
                start, end = self._span(node)
                name = self.text[start:end]
            case ast.Call(func=ast.Name(id="col")):
                if len(node.args) != 1 or node.keywords:
                    self._refuse(node, 'col() takes one name, as in col("user-id")')
                argument = node.args[0]
                if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                    self._refuse(argument, 'col() takes the column\'s name as a text, as in col("user-id")')
                name = argument.value
            case ast.Call(func=ast.Name(id=other)):
                self._refuse(node, f'{other}() is not known: a filter has col("name") only')
            case ast.Call(func=ast.Attribute(attr=method)):
                if method in ("startswith", "endswith"):
                    self._refuse(node, f".{method}() is a condition by itself: compare it with nothing")
                self._refuse(node, f".{method}() cannot be: {_METHODS}")
            case ast.Attribute():
                name = self._dotted(node)
                hint = f': write col("{name}")' if name in self.schema else ""
                self._refuse(node, f"a column's name has no dots here{hint}" if name else "this cannot be read")
            case _:
                return None
        kind = self.schema.get(name)
        if kind is None:
            self._refuse(node, self._unknown(name))
        self.used[name] = kind
        return _Column(name, kind)

    def _dotted(self, node: ast.expr) -> str:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""

    def _unknown(self, name: str) -> str:
        if name in ("id", "_id", "key"):
            return (
                f"column {_short(name)} is not known: ids are not attributes: read rows by id with get(ids); to "
                "filter by them write them into the records as an attribute, too"
            )
        if not self.schema:
            return (
                f"column {_short(name)} is not known, and no other is yet: records bring columns, or "
                "create_collection(attributes={…}) names them beforehand"
            )
        near = difflib.get_close_matches(name, self.schema, n=1)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        shown = sorted(self.schema)[:20]
        more = f" and {len(self.schema) - len(shown)} more" if len(self.schema) > len(shown) else ""
        return f"column {_short(name)} is not known: {hint} {', '.join(shown)}{more}"

    def _value(self, node: ast.expr) -> int | float | str:
        match node:
            case ast.Constant(value=bool() | int() | float() | str()):
                return node.value  # type: ignore[return-value]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Constant(value=None):
                self._refuse(node, "None never matches a value: write 'is None' and join it with 'or'")
            case ast.Name() | ast.Call():
                self._refuse(node, "a value is needed here: put a text into quotes")
        self._refuse(node, "a value is needed here: a number, a text in quotes, True or False")

    def _check(self, column: _Column, kind: str, operator: str, node: ast.expr, what: str) -> None:
        """That values of these two kinds can be compared."""
        numbers = ("int", "float")
        if column.kind != kind and not (column.kind in numbers and kind in numbers):
            self._refuse(node, f"column {column.name!r} holds {_many(column.kind)}: it cannot be compared with {what}")
        if column.kind == "bool" and operator not in ("==", "!="):
            self._refuse(node, f"column {column.name!r} holds {_many('bool')}: they have no order, write == or !=")

    # -- places --------------------------------------------------------------------------------------------------------

    def _span(self, node: ast.expr) -> tuple[int, int]:
        """Where a node stands in the text; `ast` counts UTF-8 bytes."""
        start, end = node.col_offset, node.end_col_offset or node.col_offset + 1
        if not self.plain.isascii():
            encoded = self.plain.encode("utf-8", "surrogatepass")
            start, end = (len(encoded[:at].decode("utf-8", "surrogatepass")) for at in (start, end))
        return start + self.ahead, end + self.ahead

    def _refuse(self, node: ast.expr, why: str, *, until: ast.expr | None = None) -> NoReturn:
        start, end = self._span(node)
        if until is not None:
            end = self._span(until)[1]
        raise refusal(self.text, start, end, why)


def _many(kind: str) -> str:
    return {"int": "whole numbers", "float": "numbers", "bool": "True and False", "str": "texts"}[kind]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
