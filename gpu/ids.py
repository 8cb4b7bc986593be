"""The users' own ids: their hashes, and a column of them beside a segment's rows.

From an id to its row's place leads `headrace.gpu.id_map`.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import numpy.typing as npt
from pandas.util import hash_array

from headrace.gpu.buffers import Buffer
from headrace.gpu.errors import RecordError
from headrace.gpu.packed_text import PackedText, chunks
from headrace.gpu.rows import Id

__all__ = ["IdColumn", "hash_ids", "row_digests"]

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

_PER_REFERENCE = 9  # of a list, with what it reserves ahead
_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)


def hash_ids(ids: Sequence[Id], kind: str) -> Hashes:
    """64 bits of each id, uint64 (n,): the same in every process, on every machine and in every release.

    Copies of a cell are compared by digests of these, so nothing salted will do. Texts go through pandas' SipHash-2-4
    of their UTF-8, the only batch hash of strings among the libraries that are here anyway (0.1 microseconds a text);
    integers through SplitMix64's finaliser, which is one-to-one: two integers never share a hash. The tests pin the
    values, because pandas only promises them to be deterministic.

    Parameters
    ----------
    ids : sequence of str or int, (n,)
        Any str, lone surrogates too; integers of 64 bits.
    kind : {"string", "integer"}

    Raises
    ------
    RecordError
        An id is not of that kind. Columns and maps are not asked about such ids: hash first.
    """
    if kind == "integer":
        return _mix(_integers(ids).view(np.uint64))
    if not all(issubclass(type_, str) for type_ in set(map(type, ids))):
        wrong = next(id_ for id_ in ids if not isinstance(id_, str))
        raise RecordError(f"the id {repr(wrong)[:60]} is not a str, as the ids of this collection are: pass it as one")
    texts = np.array(ids, dtype=np.object_)
    try:
        hashes: Hashes = hash_array(texts, categorize=False)
    except UnicodeEncodeError:  # a lone surrogate; bytes are hashed as they are, so all others come out the same
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        hashes = hash_array(np.array(encoded, dtype=np.object_), categorize=False)
    return hashes


def row_digests(hashes: Hashes, topic_partitions: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> Hashes:
    """64 bits of each row's id and version, uint64 (n,); their wrapped sum is an order-free digest of a set of rows.

    Parameters
    ----------
    hashes : uint64 (n,)
        From `hash_ids`.
    topic_partitions : int32 (n,)
    offsets : int64 (n,)
    """
    partitions = _mix(topic_partitions.astype(np.uint64) + _GOLDEN)
    versions = _mix(offsets.astype(np.uint64) + partitions)
    # The hash once more: the id 7 at offset 7 must not cancel out, as it would where both had been mixed alike.
    return _mix(_mix(hashes + _GOLDEN) + versions)


def _integers(ids: Sequence[Id]) -> npt.NDArray[np.int64]:
    array = np.asarray(ids)
    if array.dtype.kind != "i" and len(ids):  # also uint64, which NumPy takes for integers from 2**63 on
        wrong = next((id_ for id_ in ids if not isinstance(id_, int) or not -(1 << 63) <= id_ < 1 << 63), array.dtype)
        raise RecordError(f"the id {repr(wrong)[:60]} is not an integer of 64 bits, as the ids of this collection are")
    return array.astype(np.int64)


def _mix(values: Hashes) -> Hashes:
    """SplitMix64's finaliser: one-to-one, and each bit of the result depends on all bits (Steele, Lea, Flood, 2014)."""
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58_476D_1CE4_E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D0_49BB_1331_11EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


class IdColumn:
    """Ids by row, with their hashes. Made empty it grows by `append`; `take` and `gather` give sealed ones.

    An integer takes 8 bytes (its hash is computed when asked for). A text takes, sealed, its UTF-8, 4 bytes for its end
    and 8 for its hash; in a growing column it stays the Python object that came, about 65 bytes and its length.

    Parameters
    ----------
    kind : {"string", "integer"}

    Notes
    -----
    One writer. Rows that are written stay where they are, so that other threads may read them meanwhile without a lock.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._integers = Buffer(np, np.int64)
        self._texts: list[str] | PackedText = []
        self._text_bytes = 0  # of the objects in a growing column
        self._hashes = Buffer(np, np.uint64)
        self._sealed = False

    @classmethod
    def _seal(cls, kind: str, parts: Sequence[tuple[IdColumn, Rows]]) -> IdColumn:
        column = cls(kind)
        column._sealed = True
        count = sum(len(rows) for _, rows in parts)
        if kind == "integer":
            column._integers = Buffer(np, np.int64, expected=count)
            for source, rows in parts:
                column._integers.append(source._integers.take(rows))
            return column
        column._hashes = Buffer(np, np.uint64, expected=count)
        for source, rows in parts:
            column._hashes.append(source._hashes.take(rows))
        column._texts = PackedText(source._pick(some) for source, rows in parts for some in chunks(rows))
        return column

    def __len__(self) -> int:
        return len(self._integers) if self.kind == "integer" else len(self._texts)

    @property
    def sealed(self) -> bool:
        """Packed, and closed to `append`."""
        return self._sealed

    @property
    def nbytes(self) -> int:
        """Bytes held, hashes included."""
        if self.kind == "integer":
            return self._integers.nbytes
        texts = self._texts
        if isinstance(texts, PackedText):
            return texts.nbytes + self._hashes.nbytes
        return sys.getsizeof(texts) + self._text_bytes + self._hashes.nbytes

    def append(self, ids: Sequence[Id], hashes: Hashes) -> None:
        """Write ids and their `hash_ids` behind the last row.

        Raises
        ------
        ValueError
            The column is sealed.
        """
        if self._sealed:
            raise ValueError(f"a sealed column of {len(self)} ids cannot be appended to: append to a new one")
        if self.kind == "integer":
            self._integers.append(np.array(ids, dtype=np.int64))
            return
        self._text_bytes += sum(map(sys.getsizeof, ids))
        # Hashes first: a row exists from the moment its text does.
        self._hashes.append(hashes)
        self._texts.extend(ids)  # type: ignore[union-attr, arg-type]

    def growth(self, ids: Sequence[Id]) -> int:
        """Bytes that appending `ids` would add to `nbytes`, their texts' own included."""
        if self.kind == "integer":
            return self._integers.growth(len(ids))
        return self._hashes.growth(len(ids)) + sum(map(sys.getsizeof, ids)) + _PER_REFERENCE * len(ids)

    def to_list(self, rows: Rows | None = None) -> list[Id]:
        """Ids of `rows` (integers (r,), each in 0..len - 1), in that order; None: of all rows."""
        if self.kind == "integer":
            integers = self._integers.first() if rows is None else self._integers.take(rows)
            return integers.tolist()  # type: ignore[no-any-return]
        return self._pick(rows)  # type: ignore[return-value]

    def _pick(self, rows: Rows | None) -> list[str]:
        texts = self._texts
        if isinstance(texts, PackedText):
            return texts.to_list(rows)
        if rows is None:
            return texts[:]
        at = rows.tolist()
        return list(itemgetter(*at)(texts)) if len(at) > 1 else [texts[row] for row in at]

    def hashes(self, rows: Rows | None = None) -> Hashes:
        """`hash_ids` of the ids of `rows`, uint64 (r,); None: of all rows."""
        buffer = self._integers if self.kind == "integer" else self._hashes
        values: npt.NDArray[np.uint64] = buffer.first() if rows is None else buffer.take(rows)
        return _mix(values.view(np.uint64)) if self.kind == "integer" else values

    def same(self, rows: Rows, ids: Sequence[Id]) -> npt.NDArray[np.bool_]:
        """Is row ``rows[i]`` that of ``ids[i]``? Bool (r,). What an `IdMap` asks, segment by segment."""
        if self.kind == "integer":
            return self._integers.take(rows) == np.array(ids, dtype=np.int64)  # type: ignore[no-any-return]
        return np.fromiter(map(operator.eq, self._pick(rows), ids), dtype=np.bool_, count=len(rows))

    def take(self, rows: Rows) -> IdColumn:
        """A sealed column of `rows`, in that order."""
        return self._seal(self.kind, [(self, rows)])

    @staticmethod
    def gather(sources: Sequence[tuple[IdColumn, Rows]]) -> IdColumn:
        """A sealed column of chosen rows of several columns of one kind, one source after the other; for merges.

        Raises
        ------
        ValueError
            There is no source, or their kinds differ.
        """
        kinds = {source.kind for source, _ in sources}
        if len(kinds) != 1:
            raise ValueError(f"ids of {len(kinds)} kinds cannot be one column: gather columns of one kind")
        return IdColumn._seal(kinds.pop(), sources)
