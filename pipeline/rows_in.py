"""What a caller hands in, a frame or rows, as Kafka records; refused before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from headrace.cluster.state import CollectionSpec
from headrace.gpu.errors import RecordError
from headrace.pipeline.arguments import check_ids
from headrace.streams.attributes import short
from headrace.streams.encode import encode_binary, encode_json, encode_key

__all__ = ["Record", "delete_records", "upsert_records"]

Record = tuple[bytes | None, bytes | None, Any]
"""Key, value, headers."""


def upsert_records(frame: Any, spec: CollectionSpec) -> list[Record]:
    """Records of a pandas or cuDF frame, or of mappings, each with ``id`` and ``text`` or ``vector``; the rest are
    attributes.

    Raises
    ------
    RecordError
        A row has no id or one of the wrong type, a vector of another length, or neither text nor vector (or a text, and
        the collection has no encoder); names the row. Nothing has been sent then.
    """
    return [_record(position, row, spec) for position, row in enumerate(_rows(frame))]


def delete_records(ids: Iterable[str | int], spec: CollectionSpec) -> list[Record]:
    """One tombstone for each id."""
    return [(encode_key(row_id), None, None) for row_id in check_ids(ids, spec.ids, spec.name)]


def _rows(frame: Any) -> Iterable[Mapping[str, Any]]:
    if hasattr(frame, "to_pandas"):  # cuDF
        frame = frame.to_pandas()
    if hasattr(frame, "to_dict") and hasattr(frame, "columns"):
        return frame.to_dict("records")  # type: ignore[no-any-return]
    if isinstance(frame, Mapping):
        return [frame]
    if not isinstance(frame, Iterable) or isinstance(frame, str | bytes):
        raise RecordError(f"rows cannot be made of {short(frame)}: give a frame, or a list of dicts with 'id'")
    return frame


def _key(position: int, row_id: Any, spec: CollectionSpec) -> bytes:
    kind = (int, np.integer) if spec.ids == "integer" else str
    if isinstance(row_id, bool) or not isinstance(row_id, kind):
        raise RecordError(
            f"row {position}: id {row_id!r} is no {spec.ids}, and the ids of collection {spec.name!r} are"
        )
    return encode_key(row_id)  # type: ignore[arg-type]  # NumPy's integers are taken too


def _record(position: int, row: Mapping[str, Any], spec: CollectionSpec) -> Record:
    if not isinstance(row, Mapping) or "id" not in row:
        raise RecordError(f"row {position} has no 'id': give each row an id, and a text or a vector")
    _key(position, row["id"], spec)
    given = {name: _plain(value) for name, value in row.items() if name not in ("id", "vector")}
    attributes = {name: value for name, value in given.items() if value is not None}
    vector = row.get("vector")
    if vector is not None and not (isinstance(vector, float) and np.isnan(vector)):
        try:
            length = np.shape(vector)
        except ValueError as error:
            raise RecordError(
                f"row {position} (id {row['id']!r}): its vector is not made of numbers: {error}"
            ) from error
        if length != (spec.dim,):
            raise RecordError(
                f"row {position} (id {row['id']!r}): its vector has shape {length}, collection {spec.name!r} holds "
                f"vectors of {spec.dim} numbers"
            )
        key, value, headers = encode_binary(row["id"], vector, attributes)
        return key, value, headers
    text = attributes.pop("text", None)
    if not isinstance(text, str):
        raise RecordError(f"row {position} (id {row['id']!r}) has neither a 'text' nor a 'vector'")
    if spec.encoder is None:
        raise RecordError(
            f"row {position} (id {row['id']!r}) has a text, and collection {spec.name!r} has no encoder: "
            "give it a vector, or create the collection with encoder='minilm'"
        )
    key, value = encode_json(row["id"], text=text, attributes=attributes)
    return key, value, None


def _plain(value: Any) -> Any:
    """A plain Python value; None for pandas' several ways to say nothing."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and value != value):
        return None
    return None if type(value).__name__ in ("NAType", "NaTType") else value
