"""Numbers compared by value, as Python does and NumPy does not: an int64 is never rounded to meet a float64."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from headrace.gpu.backend import Array

__all__ = ["OPERATORS", "Number", "compare_mixed", "exactly", "float_bound", "int_bound"]

Number = int | float

OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_LOW, _HIGH = -(1 << 63), (1 << 63) - 1


def int_bound(sign: str, value: Number) -> tuple[str, int] | bool:
    """``x sign value`` for any int64 x, as a comparison with an int64; or its answer, where that is always the same."""
    if isinstance(value, float):
        if math.isnan(value):
            return sign == "!="
        if math.isinf(value):
            value = _HIGH + 1 if value > 0 else _LOW - 1
        elif value.is_integer():
            value = int(value)
        elif sign in ("==", "!="):
            return sign == "!="
        else:  # x < 2.5 is x < 3, and x <= 2.5 is x <= 2
            value = math.ceil(value) if sign in ("<", ">=") else math.floor(value)
    if value > _HIGH:
        return sign in ("<", "<=", "!=")
    if value < _LOW:
        return sign in (">", ">=", "!=")
    return sign, value


def float_bound(sign: str, value: Number) -> tuple[str, float] | bool:
    """``x sign value`` for any float64 x, as a comparison with a float64; or its answer."""
    try:
        near = float(value)
    except OverflowError:
        near = math.inf if value > 0 else -math.inf
    if near == value or math.isnan(near):
        return sign, near
    if sign in ("==", "!="):
        # No float is this number; NaN is unequal to it too.
        return sign == "!="
    if sign in ("<", "<="):  # below a number between two floats: up to the lower one
        return "<=", near if near < value else math.nextafter(near, -math.inf)
    return ">=", near if near > value else math.nextafter(near, math.inf)


def exactly(kind: str, numbers: Sequence[Number]) -> list[Number]:
    """Those of `numbers` that a column of this kind can hold, and nothing else can equal."""
    bound = int_bound if kind == "int" else float_bound
    if kind == "bool":
        return list(numbers)
    wanted = (bound("==", number) for number in numbers)
    return [pair[1] for pair in wanted if not isinstance(pair, bool)]


def compare_mixed(sign: str, left: Array, right: Array, xp: ModuleType) -> Array:
    """An int64 column with a float64 column, either way round, exactly."""
    if left.dtype.kind == "f":
        turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(sign, sign)
        return compare_mixed(turned, right, left, xp)
    # Rounding keeps order: where the rounded integer differs from the float, it is on the true side of it. Where they
    # are equal the float is a whole number, and the integers decide; 2**63 is one that no int64 reaches.
    rounded = left.astype(xp.float64)
    tie = rounded == right
    beyond = tie & (right >= 2.0**63)
    inside = tie & ~beyond
    whole = xp.where(inside, right, 0.0).astype(xp.int64)
    if sign in ("==", "!="):
        same = inside & (left == whole)
        return same if sign == "==" else ~same
    settled = OPERATORS[sign](rounded, right) & ~tie
    if sign in ("<", "<="):
        settled |= beyond
    return settled | (inside & OPERATORS[sign](left, whole))
