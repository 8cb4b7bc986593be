"""What a caller hands in, a frame or rows, as Kafka records; refused before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from headrace.cluster.state import CollectionSpec
from headrace.gpu.errors import RecordError
from headrace.pipeline.arguments import check_ids
from headrace.streams.attributes import check_columns, short
from headrace.streams.encode import encode_binary, encode_json, encode_key
from headrace.streams.vector_checks import vector_faults

__all__ = ["Record", "delete_records", "upsert_records"]

Record = tuple[bytes | None, bytes | None, Any]
"""Key, value, headers."""


def upsert_records(frame: Any, spec: CollectionSpec, schema: Mapping[str, str] | None = None) -> list[Record]:
    """Records of a pandas or cuDF frame, or of mappings, each with ``id`` and ``text`` or ``vector``; the rest are
    attributes.

    What the workers would put into the dead letters is refused here, as far as it can be known.

    Parameters
    ----------
    schema : mapping of str to str, optional
        Attributes to their kinds, as known so far.

    Raises
    ------
    RecordError
        A row has no id or one of the wrong type, a vector that cannot be used, or neither text nor vector (or a text,
        and the collection has no encoder), or an attribute of another kind than its column; names the row. Nothing has
        been sent then.
    """
    rows = list(_rows(frame))
    attributes = [_attributes(position, row) for position, row in enumerate(rows)]
    _check_attributes(rows, attributes, schema or {})
    records = [_record(position, row, attributes[position], spec) for position, row in enumerate(rows)]
    _check_vectors(rows, records, spec)
    return records


def delete_records(ids: Iterable[str | int], spec: CollectionSpec) -> list[Record]:
    """One tombstone for each id."""
    return [(encode_key(row_id), None, None) for row_id in check_ids(ids, spec.ids, spec.name)]


def _rows(frame: Any) -> Iterable[Mapping[str, Any]]:
    if hasattr(frame, "to_pandas"):  # cuDF
        frame = frame.to_pandas()
    if hasattr(frame, "to_dict") and hasattr(frame, "columns"):
        if not frame.columns.is_unique:  # pandas would keep the last one, with a warning
            name = frame.columns[frame.columns.duplicated()][0]
            raise RecordError(f"the frame has two columns {short(name)}: rename one")
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
    try:
        return encode_key(row_id)  # type: ignore[arg-type]  # NumPy's integers are taken too
    except RecordError as error:
        raise RecordError(f"row {position}: {error}") from error


def _attributes(position: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping) or "id" not in row:
        raise RecordError(f"row {position} has no 'id': give each row an id, and a text or a vector")
    given = {name: _plain(value) for name, value in row.items() if name not in ("id", "vector")}
    return {name: value for name, value in given.items() if value is not None}


def _check_attributes(
    rows: Sequence[Mapping[str, Any]], attributes: Sequence[dict[str, Any]], schema: Mapping[str, str]
) -> None:
    """Refuse what does not fit its column. Whole numbers come back from pandas as floats where one is missing: those
    go into a column of integers as what they are.
    """
    for given in attributes:
        for name, value in given.items():
            if schema.get(name) == "int" and isinstance(value, float) and value.is_integer():
                given[name] = int(value)

    def refuse(position: int, why: str) -> None:
        raise RecordError(f"row {position} (id {rows[position]['id']!r}): {why}")

    # A text that is encoded is no attribute; of a row with a vector it is.
    plain = [
        {name: value for name, value in given.items() if name != "text" or row.get("vector") is not None}
        for row, given in zip(rows, attributes, strict=True)
    ]
    columns = {name: [given.get(name) for given in plain] for name in {name for given in plain for name in given}}
    check_columns(columns, list(range(len(rows))), schema, refuse)


def _check_vectors(rows: Sequence[Mapping[str, Any]], records: Sequence[Record], spec: CollectionSpec) -> None:
    there = [position for position, (_, _, headers) in enumerate(records) if headers is not None]
    if not there:
        return
    matrix = np.stack([np.frombuffer(records[position][1] or b"", dtype="<f4") for position in there])
    for at, why in vector_faults(matrix, spec.metric).items():
        raise RecordError(f"row {there[at]} (id {rows[there[at]]['id']!r}): {why}")


def _record(position: int, row: Mapping[str, Any], attributes: dict[str, Any], spec: CollectionSpec) -> Record:
    _key(position, row["id"], spec)
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
