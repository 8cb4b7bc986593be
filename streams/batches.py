"""A batch of records, before and after it is decoded, and which of its records count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Decoded", "RawBatch", "RecordSpec", "Refusal", "keep_last"]


@dataclass(slots=True)
class RawBatch:
    """Records as they left Kafka, in the order in which they were consumed.

    Attributes
    ----------
    topic : str
    keys, values : list of bytes or None, (n,)
    headers : list of (list of (str, bytes or None)) or None, (n,)
    topic_partitions : int32 (n,)
    offsets : int64 (n,)
    timestamps : int64 (n,)
        Kafka's, in milliseconds since the epoch.
    ranges : dict of int to (int, int)
        Topic partition to the offsets ``[low, high)`` that this batch accounts for: gaps included, so that it may be
        longer than the records are many, or be there with no record at all.
    pulled : float
        `time.time()` when the batch left Kafka.
    """

    topic: str
    keys: list[bytes | None]
    values: list[bytes | None]
    headers: list[list[tuple[str, bytes | None]] | None]
    topic_partitions: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    timestamps: npt.NDArray[np.int64]
    ranges: dict[int, tuple[int, int]]
    pulled: float


@dataclass(frozen=True)
class RecordSpec:
    """What the records of a collection must be.

    Attributes
    ----------
    dim : int
    metric : {"cosine", "ip", "l2"}
    ids : {"string", "integer"}
    format : {"json", "binary"}
        What a record without a format header is.
    schema : Mapping of str to str
        Attribute to kind ("int", "float", "bool", "str"), as known so far.
    encoder : str or None
        ``name@version`` of the collection's encoder; None: records must carry vectors.
    max_record_bytes : int
        Key, value and headers together.
    largest : float
        No number of a vector may be larger: of what the collection keeps vectors as, such as float16.
    """

    dim: int
    metric: str
    ids: str
    format: str
    schema: Mapping[str, str]
    encoder: str | None
    max_record_bytes: int = 1 << 20
    largest: float = float("inf")


@dataclass(frozen=True)
class Refusal:
    """A record that cannot be used: its position in the `RawBatch`, and why, in one sentence."""

    row: int
    reason: str


@dataclass(slots=True)
class Decoded:
    """The usable records of a batch, in its order.

    Attributes
    ----------
    rows : int64 (m,)
        Positions in the `RawBatch`.
    ids : list of str or list of int, (m,)
    deleted : bool (m,)
    texts : list of str or None, (m,)
        To be encoded where there is a text and no vector.
    vectors : float32 (v, dim)
        Not normalised.
    vector_rows : int64 (v,)
        Which of the m records have a vector, rising.
    attributes : dict of str to list, each (m,)
        Plain Python values, None where absent; the text itself is the attribute "text".
    schema : dict of str to str
        The spec's, and what is new.
    refused : list of Refusal
        Rising by row.
    """

    rows: npt.NDArray[np.int64]
    ids: list[str] | list[int]
    deleted: npt.NDArray[np.bool_]
    texts: list[str | None]
    vectors: npt.NDArray[np.float32]
    vector_rows: npt.NDArray[np.int64]
    attributes: dict[str, list[Any]]
    schema: dict[str, str]
    refused: list[Refusal]


def keep_last(
    decoded: Decoded,
    topic_partitions: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    timestamps: npt.NDArray[np.int64],
) -> Decoded:
    """Keep one record per id: within a topic partition the highest offset, between them the latest timestamp.

    After `decode`, not before: a bad last record must not swallow a good earlier one.

    Parameters
    ----------
    decoded : Decoded
    topic_partitions, offsets, timestamps : (n,)
        The `RawBatch`'s columns (indexed by ``decoded.rows``).
    """
    if len(set(decoded.ids)) == len(decoded.ids):
        return decoded
    newest: dict[tuple[object, int], int] = {}
    for at, (id_, row) in enumerate(zip(decoded.ids, decoded.rows.tolist(), strict=True)):
        place = (id_, int(topic_partitions[row]))
        if place not in newest or offsets[row] >= offsets[decoded.rows[newest[place]]]:
            newest[place] = at
    last: dict[object, int] = {}
    # Sorted, so that at equal timestamps the same record wins in whatever order the batch came.
    for (id_, _), at in sorted(newest.items(), key=lambda item: item[0][1]):
        if id_ not in last or timestamps[decoded.rows[at]] >= timestamps[decoded.rows[last[id_]]]:
            last[id_] = at
    return _take(decoded, np.array(sorted(last.values()), dtype=np.int64))


def _take(decoded: Decoded, kept: npt.NDArray[np.int64]) -> Decoded:
    place = np.full(len(decoded.ids), -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))
    vector_rows = place[decoded.vector_rows]
    return Decoded(
        rows=decoded.rows[kept],
        ids=[decoded.ids[at] for at in kept.tolist()],
        deleted=decoded.deleted[kept],
        texts=[decoded.texts[at] for at in kept.tolist()],
        vectors=decoded.vectors[vector_rows >= 0],
        vector_rows=vector_rows[vector_rows >= 0],
        attributes={name: [column[at] for at in kept.tolist()] for name, column in decoded.attributes.items()},
        schema=decoded.schema,
        refused=decoded.refused,
    )
