"""What a caller hands to a call, checked before anything is asked of anybody: a sentence instead of a stray error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from headrace.gpu.errors import ConfigError, RecordError

__all__ = ["check_ids", "seconds"]

_IDS = {"string": str, "integer": Integral}


def seconds(name: str, value: Any, default: float) -> float:
    """A number of seconds to wait, `default` for None; raises `ConfigError` for anything that cannot be waited for."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value!r} cannot be: give seconds, a number above 0")
    return float(value)


def check_ids(ids: Any, kind: str, collection: str) -> list[Any]:
    """Ids as a list; raises `RecordError` if they are none, or not of the kind that the collection's ids have.

    Parameters
    ----------
    ids : str, int, or iterable of one of them
    kind : {"string", "integer"}
    """
    listed = [ids] if isinstance(ids, str | Integral) else ids
    if not isinstance(listed, Iterable) or isinstance(listed, bytes):
        raise RecordError(f"ids={ids!r} cannot be: give an id or a list of ids")
    wanted = list(listed)
    for position, row_id in enumerate(wanted):
        if isinstance(row_id, bool) or not isinstance(row_id, _IDS[kind]):
            raise RecordError(
                f"id {row_id!r} (number {position}) is no {kind}, and the ids of collection {collection!r} are"
            )
    return [int(row_id) for row_id in wanted] if kind == "integer" else wanted
