"""What a caller hands to a call, checked before anything is asked of anybody: a sentence instead of a stray error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral, Real
from os import PathLike, fspath
from os.path import abspath, expanduser
from typing import Any

from headrace.gpu.errors import ConfigError, RecordError
from headrace.gpu.index_spec import KINDS, IndexSpec, build_params
from headrace.streams.attributes import BEYOND

__all__ = ["check_ids", "count", "index_spec", "seconds", "share", "snapshot_url"]

_IDS = {"string": str, "integer": Integral}
_INT64 = 1 << 63


def seconds(name: str, value: Any, default: float) -> float:
    """A number of seconds to wait, `default` for None; raises `ConfigError` for anything that cannot be waited for."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value!r} cannot be: give seconds, a number above 0")
    return float(value)


def count(name: str, value: Any) -> int:
    """A whole number, 0 or more, 0 for None; raises `ConfigError`."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ConfigError(f"{name}={value!r} cannot be: give a whole number, 0 or more")
    return int(value)


def snapshot_url(url: Any) -> str:
    """Where snapshots are kept, as all processes of a cluster understand it: a folder gets its whole path; "" stays "".

    Raises
    ------
    ConfigError
        It is no text, or a password is in it, which status and logs would show.
    """
    if isinstance(url, PathLike):
        url = fspath(url)
    if not isinstance(url, str):
        raise ConfigError(f"url={url!r} cannot be: give a folder, or a URL such as 's3://bucket/docs'")
    kind, is_url, rest = url.partition("://")
    if not is_url:
        return abspath(expanduser(url)) if url.strip() else ""
    if "@" in rest.partition("/")[0]:
        raise ConfigError(
            f"a {kind} URL with a user in it would be shown in status and logs: leave it out, and give what the place "
            "asks for as the option headrace.snapshots.options"
        )
    return url.rstrip("/")


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
    if kind == "string":
        for position, row_id in enumerate(wanted):
            if not row_id.isascii() and any("\ud800" <= sign <= "\udfff" for sign in row_id):
                raise RecordError(f"id {row_id!r} (number {position}) is no text: half a surrogate pair is no UTF-8")
        return wanted
    numbers = [int(row_id) for row_id in wanted]
    for position, number in enumerate(numbers):
        if not -_INT64 <= number < _INT64:
            raise RecordError(f"id {number} (number {position}) is {BEYOND}, and no record has it")
    return numbers


def share(name: str, value: Any) -> float | None:
    """A number above 0 and at most 1, or None; raises `ConfigError`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ConfigError(f"{name}={value!r} cannot be: give a number above 0 and at most 1, such as 0.95")
    return float(value)


def index_spec(dim: int, index: Any, dtype: Any, recall_target: Any) -> IndexSpec:
    """What a new collection's index is to be; raises `ConfigError`.

    Parameters
    ----------
    dim : int
        Of the collection's vectors.
    index : str, IndexSpec, mapping or None
        A kind, all of it, or some fields.
    dtype, recall_target
        Instead of the index's own, unless None.
    """
    match index:
        case None:
            spec = IndexSpec()
        case str():
            spec = IndexSpec(kind=index)
        case IndexSpec():
            spec = index
        case Mapping():
            spec = IndexSpec.from_wire(index)
        case _:
            raise ConfigError(
                f"index={index!r} cannot be: give {', '.join(KINDS)}, an IndexSpec or a dict of its fields"
            )
    if dtype is not None:
        spec = replace(spec, dtype=dtype)
    if (target := share("recall_target", recall_target)) is not None:
        spec = replace(spec, recall_target=target)
    build_params(spec, 1 << 20, dim)  # what does not fit is said now, not when the first segment is sealed
    return spec
