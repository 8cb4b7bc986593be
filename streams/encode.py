"""How a record is written: the key is the id, the value is JSON or raw little-endian float32.

What these functions let through, `headrace.streams.records.decode` takes in: whoever writes learns of a mistake at
once, instead of finding the record in the dead letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from headrace.gpu.errors import RecordError
from headrace.streams.attributes import BEYOND, short
from headrace.streams.vector_checks import kind_fault

__all__ = [
    "ATTRIBUTES_HEADER",
    "ENCODER_HEADER",
    "FORMAT_HEADER",
    "RESERVED",
    "encode_binary",
    "encode_json",
    "encode_key",
]

FORMAT_HEADER = "headrace-format"
ATTRIBUTES_HEADER = "headrace-attributes"
ENCODER_HEADER = "headrace-encoder"

RESERVED = frozenset({"id", "text", "vector"})
"""Fields of a JSON record that have a meaning of their own."""

_INT64 = 1 << 63


def encode_key(id: str | int) -> bytes:
    """The Kafka key of an id.

    Raises
    ------
    RecordError
        The id is neither a str that can be UTF-8 and is not empty, nor an int of 64 bits.
    """
    if isinstance(id, np.generic):
        id = id.item()
    if isinstance(id, str) and id:
        try:
            return id.encode()
        except UnicodeEncodeError as error:
            raise RecordError(f"id {id!r} cannot be written as UTF-8: use another id") from error
    if isinstance(id, int) and not isinstance(id, bool):
        if -_INT64 <= id < _INT64:
            return b"%d" % id
        raise RecordError(f"id {short(id)} is {BEYOND}: write it as a str")
    raise RecordError(f"id {short(id)} cannot be a key: use a str that is not empty or an int of 64 bits")


def encode_json(
    id: str | int,
    *,
    text: str | None = None,
    vector: npt.ArrayLike | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> tuple[bytes, bytes]:
    """A record as JSON.

    Parameters
    ----------
    id : str or int
    text : str, optional
        What the collection's encoder turns into a vector, unless there is a `vector`; kept as the attribute "text".
    vector : array of float32 (dim,), optional
    attributes : Mapping, optional
        Flat: str, int (64 bits), float (finite), bool or None.

    Returns
    -------
    key, value : bytes

    Raises
    ------
    RecordError
        Something that `decode` would refuse, whatever the collection; its dimension is not checked here.
    """
    key = encode_key(id)
    if text is None and vector is None:
        raise RecordError(f"record {short(id)} has neither text nor vector: give one of them, or delete the id")
    fields: dict[str, Any] = {}
    if text is not None:
        if not isinstance(text, str):
            raise RecordError(f"text of record {short(id)} is {type(text).__name__} {short(text)}: give a str")
        fields["text"] = text
    if vector is not None:
        fields["vector"] = _vector(id, vector)
    if attributes:
        if taken := RESERVED & attributes.keys():
            raise RecordError(f"record {short(id)} has an attribute named {sorted(taken)[0]!r}: choose another name")
        fields.update(_flat(id, attributes))
    return key, _dump(id, fields)


def encode_binary(
    id: str | int,
    vector: npt.ArrayLike,
    attributes: Mapping[str, Any] | None = None,
    *,
    encoder: str | None = None,
) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    """A record as little-endian float32, attributes in a header: a third of the bytes of JSON, and nothing to parse.

    Parameters
    ----------
    id, vector, attributes
        As for `encode_json`; here "text" is an attribute like any other.
    encoder : str, optional
        ``name@version`` of what made the vector; a collection with another encoder refuses the record.

    Returns
    -------
    key, value : bytes
    headers : list of (str, bytes)

    Raises
    ------
    RecordError
        As for `encode_json`.
    """
    headers = [(FORMAT_HEADER, b"f32")]
    if attributes:
        if taken := (RESERVED - {"text"}) & attributes.keys():
            raise RecordError(f"record {short(id)} has an attribute named {sorted(taken)[0]!r}: choose another name")
        headers.append((ATTRIBUTES_HEADER, _dump(id, _flat(id, attributes))))
    if encoder is not None:
        headers.append((ENCODER_HEADER, encoder.encode()))
    return encode_key(id), _vector(id, vector).astype("<f4", copy=False).tobytes(), headers


def _vector(id: str | int, vector: npt.ArrayLike) -> npt.NDArray[np.float32]:
    try:
        if why := kind_fault(vector):
            raise TypeError(f"it has {why} in it")
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            numbers = np.ascontiguousarray(vector, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"vector of record {short(id)} is not made of numbers: {error}") from error
    if numbers.ndim != 1 or not numbers.size:
        raise RecordError(f"vector of record {short(id)} has shape {numbers.shape}: give one of shape (dim,)")
    if not np.isfinite(numbers).all():
        raise RecordError(f"vector of record {short(id)} has numbers that are not finite in float32: leave it out")
    return numbers


def _flat(id: str | int, attributes: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, given in attributes.items():
        value = given.item() if isinstance(given, np.generic) else given
        if not isinstance(name, str):
            raise RecordError(f"record {short(id)} has an attribute named {short(name)}: names are str")
        if value is not None and type(value) not in (str, int, float, bool):
            raise RecordError(
                f"attribute {name!r} of record {short(id)} is {type(given).__name__} {short(given)}: "
                "only str, int, float, bool and None can be written"
            )
        if type(value) is int and not -_INT64 <= value < _INT64:
            raise RecordError(
                f"attribute {name!r} of record {short(id)} is {short(value)}, {BEYOND}: write it as a str"
            )
        if type(value) is float and not np.isfinite(value):
            raise RecordError(f"attribute {name!r} of record {short(id)} is {value}: write None where it is missing")
        flat[name] = value
    return flat


def _dump(id: str | int, fields: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as error:  # a lone surrogate
        raise RecordError(f"record {short(id)} cannot be written as JSON: {error}") from error
