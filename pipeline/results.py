"""What the clients hand back, and how a read says how fresh it must be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Bounded",
    "Consistency",
    "Difference",
    "Hit",
    "Hits",
    "Loaded",
    "Restoration",
    "Row",
    "Rows",
    "Snapshot",
    "Verification",
    "Write",
    "bounded",
]


@dataclass(frozen=True, slots=True)
class Bounded:
    """A read that is no older than `staleness` milliseconds."""

    staleness: float


def bounded(staleness: float) -> Bounded:
    """For ``consistency=``: the answer holds everything that was in Kafka `staleness` milliseconds ago.

    Raises
    ------
    ConfigError
        `staleness` is no number, or negative.
    """
    given: Any = staleness
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 <= float(given) < math.inf:
        raise ConfigError(f"a staleness of {given!r} ms cannot be: give a number, 0 or more")
    return Bounded(float(given))


Consistency = str | Bounded
"""``"strong"``, ``"session"``, ``"bounded"``, ``"eventual"``, or `bounded` with a number."""


@dataclass(frozen=True, slots=True)
class Write:
    """Records that Kafka has acknowledged.

    Attributes
    ----------
    offsets : dict of int to int
        Topic partition to the offset after the last of these records: whoever has applied up to there has all of them.
    count : int
    acks : tuple of (id, topic partition, offset)
    """

    offsets: dict[int, int]
    count: int
    acks: tuple[tuple[str | int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A stored record. `timestamp` is Kafka's, in milliseconds; `vector` is float32 (dim,) or None if not asked for."""

    id: str | int
    topic_partition: int
    offset: int
    timestamp: int
    cell: int
    attributes: dict[str, Any]
    vector: npt.NDArray[np.float32] | None = None


class Rows(list["Row | None"]):
    """Answer to a `get`: a row, or None, for each id asked for; `offsets` is what had been applied."""

    def __init__(self, rows: Iterable[Row | None], offsets: Mapping[int, int]) -> None:
        super().__init__(rows)
        self.offsets = dict(offsets)


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer. `score` is higher-is-better for cosine and ip, a squared distance (lower is better) for l2."""

    id: str | int
    score: float
    attributes: dict[str, Any]
    topic_partition: int
    offset: int


class Hits(list[Hit]):
    """Answers to one query, best first.

    Attributes
    ----------
    offsets : dict of int to int
        Topic partition to the first offset that had not been applied on some copy that was asked.
    """

    def __init__(self, hits: Iterable[Hit], offsets: Mapping[int, int]) -> None:
        super().__init__(hits)
        self.offsets = dict(offsets)

    def to_pandas(self) -> pd.DataFrame:
        """One row per hit: ``id``, ``score`` and a column for each attribute; an attribute of one of these two names
        stands as ``attributes.id`` or ``attributes.score``, as `pandas.json_normalize` would call it.
        """
        import pandas as pd

        rows = [{"id": hit.id, "score": hit.score, **dict(map(_column, hit.attributes.items()))} for hit in self]
        return pd.DataFrame(rows, columns=None if rows else ["id", "score"])

    def __repr__(self) -> str:
        lines = (f"  {hit.score:.3f}  {hit.id}" for hit in self)
        return "\n".join([f"{len(self)} hits", *lines])


def _column(attribute: tuple[str, Any]) -> tuple[str, Any]:
    name, value = attribute
    return (f"attributes.{name}" if name in ("id", "score") else name), value


@dataclass(frozen=True, slots=True)
class Difference:
    """An id about which the copies differ.

    Attributes
    ----------
    id : str or int
    cell : int or None
        Of its row, as far as the copies can tell; None where the highest version is a deletion.
    copies : dict of str to str
        Worker to what is wrong there: it lacks the row, has another version, has a row too many. The highest version
        that any copy knows is taken for the right one; only the log, which a repair asks, may know better.
    """

    id: str | int
    cell: int | None
    copies: dict[str, str]


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether all copies hold the same rows at the same versions.

    Attributes
    ----------
    ok : bool
        They do: from the first, or now that they have been repaired.
    cells, copies : int
        What was compared.
    differences : list of str
        One sentence for each cell whose copies differ, after a repair for what is left of it; or why they could not be
        compared.
    ids : list of Difference
        What was found, repaired or not: the first 100.
    differing : int
        How many ids were found to differ.
    repaired : int
        How many of them do not any more.
    """

    ok: bool
    cells: int
    copies: int
    differences: list[str] = field(default_factory=list)
    ids: list[Difference] = field(default_factory=list)
    differing: int = 0
    repaired: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot at its place.

    Attributes
    ----------
    name : str
        By which `restore` finds it.
    collection, url : str
    rows : int
    bytes, bytes_written : int
        Of all its files; and what writing it added to what was there already.
    seconds : float
    created : float
        Seconds since 1970.
    offsets : dict of int to int
        Topic partition to the offset from which the log is read behind it.
    problem : str
        Why it cannot be restored; empty if nothing is known against it. Its files are read only when it is, or with
        ``check=True``.
    """

    name: str
    collection: str
    url: str
    rows: int = 0
    bytes: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    created: float = 0.0
    offsets: dict[int, int] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one worker has loaded of a snapshot.

    Attributes
    ----------
    worker : str
    cells, rows, bytes : int
    adopted, rebuilt : int
        Sealed segments that were taken over with their index, and those whose rows were taken out.
    seconds : float
    """

    worker: str
    cells: int
    rows: int
    bytes: int
    adopted: int
    rebuilt: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Restoration:
    """A collection that has come back.

    Attributes
    ----------
    collection : str
    snapshot : Snapshot
        That was loaded.
    workers : tuple of Loaded
    seconds : float
        Until all workers had loaded their cells.
    replayed : int
        Offsets of the log that were then read, up to where it ended when the snapshot was loaded: as many records, less
        what compaction has taken away.
    catch_up_seconds : float or None
        That this took; None if it was not done at the deadline, or no topic is read.
    passed_over : tuple of str
        A sentence for each newer snapshot that could not be used.
    """

    collection: str
    snapshot: Snapshot
    workers: tuple[Loaded, ...]
    seconds: float
    replayed: int = 0
    catch_up_seconds: float | None = None
    passed_over: tuple[str, ...] = ()
