"""What everybody in a cluster must agree on about one collection, under one number: the epoch.

The scheduler's coordinator makes a new `CollectionState` for every change and sends it to all workers; clients fetch
it. A message that carries an older epoch than its receiver knows is refused, and its sender fetches the newer state and
tries again.
On the wire a state is plain msgpack: nothing here is ever pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster.snapshot_state import Restoring, Snapshots
from headrace.gpu.index_spec import IndexSpec

__all__ = ["Codebook", "CollectionSpec", "CollectionState", "Source", "first_codebook"]


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """What a user decides about a collection when creating it.

    Attributes
    ----------
    name : str
    dim : int
        Length of every vector.
    metric : {"cosine", "ip", "l2"}
    encoder : str or None
        ``name@version`` of the model that turns texts into vectors; None where records carry vectors only.
    cells : int
        Cells of the codebook once it is trained.
    replicas : int
        Copies of every cell (fewer while there are fewer workers).
    ids : {"string", "integer"}
    index : IndexSpec
        Of sealed segments.
    uid : str
        Of this creation, given by the scheduler: a name that was dropped and made anew is another collection.
    """

    name: str
    dim: int
    metric: str = "cosine"
    encoder: str | None = None
    cells: int = 64
    replicas: int = 2
    ids: str = "string"
    index: IndexSpec = field(default_factory=IndexSpec)
    uid: str = ""

    def to_wire(self) -> dict[str, Any]:
        """Plain msgpack types."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> CollectionSpec:
        return cls(**{**wire, "index": IndexSpec.from_wire(wire["index"])})


@dataclass(frozen=True, slots=True)
class Source:
    """Where a collection's records come from.

    Attributes
    ----------
    bootstrap, topic : str
    partitions : int
        Topic partitions: part of the collection, because another number maps keys otherwise.
    format : {"json", "binary"}
        Of records that do not say.
    origins : dict of int to int
        The first offset that the log still held when ingest began.
    topic_id : str
        Kafka's own id of the topic, by which it is told from another that was made under its name; "" where the broker
        has none.
    """

    bootstrap: str
    topic: str
    partitions: int
    format: str
    origins: Mapping[int, int]
    topic_id: str = ""


@dataclass(frozen=True, slots=True)
class Codebook:
    """Centroids of one generation; their cells are numbered ``first, first + 1, …``, never used by another generation.

    Attributes
    ----------
    generation : int
    first : int
    centroids : float32 (cells, dim)
        Generation 0 is one cell whose centroid is never looked at.
    """

    generation: int
    first: int
    centroids: npt.NDArray[np.float32]

    @property
    def cells(self) -> range:
        return range(self.first, self.first + len(self.centroids))

    def to_wire(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "first": self.first,
            "dim": self.centroids.shape[1],
            "centroids": np.ascontiguousarray(self.centroids, dtype="<f4").tobytes(),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Codebook:
        centroids = np.frombuffer(wire["centroids"], dtype="<f4").reshape(-1, wire["dim"])
        return cls(wire["generation"], wire["first"], centroids)


@dataclass(frozen=True, slots=True)
class CollectionState:
    """One epoch of one collection.

    Attributes
    ----------
    epoch : int
        Only rises.
    incarnation : int
        Rises when the last copy of a cell was lost, or the topic is another: stores begin empty and the log is read
        from its start.
    members : dict of str to str
        Worker address to "active" or "joining". A joining worker is written to, not read.
    codebook : Codebook
        By which writes are routed.
    previous : Codebook or None
        Whose cells still hold rows that have not been relabelled.
    copies : dict of int to tuple of str
        Cell to the workers that are sent its rows.
    surplus : dict of int to tuple of str
        Of `copies`, those that are given up once others have taken over; they are read until then.
    leaving : tuple of str
        Workers that are being emptied: they are given no cells and read no topic partitions.
    roles : dict of str to str
        Members that may only hold rows ("search") or only read the topic ("ingest"); the others may do both.
    serving : dict of int to tuple of str
        Cell to the workers that hold all of its rows.
    moving : bool
        Rows are being copied or relabelled: nobody forgets a deletion.
    source : Source or None
    readers : dict of int to str
        Topic partition to the worker that reads it.
    schema : dict of str to str
        Attribute to its kind ("int", "float", "bool", "str").
    alarms : tuple of str
        What a person should know about the collection's past, such as a log that was truncated.
    snapshots : Snapshots
        When they are taken, and the newest there is.
    restoring : Restoring or None
        The snapshot that all members are loading; until they have, all of them are joining and none is read.
    """

    spec: CollectionSpec
    codebook: Codebook
    epoch: int = 0
    incarnation: int = 0
    members: Mapping[str, str] = field(default_factory=dict)
    previous: Codebook | None = None
    copies: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    serving: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    surplus: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    leaving: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    moving: bool = False
    source: Source | None = None
    readers: Mapping[int, str] = field(default_factory=dict)
    schema: Mapping[str, str] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    snapshots: Snapshots = field(default_factory=Snapshots)
    restoring: Restoring | None = None

    @property
    def active(self) -> tuple[str, ...]:
        """Workers that answer reads, in a fixed order."""
        return tuple(sorted(address for address, role in self.members.items() if role == "active"))

    @property
    def cells(self) -> list[int]:
        """Cells that may hold rows: of the codebook, and of the one before while rows are still there."""
        return [*self.codebook.cells, *(self.previous.cells if self.previous else ())]

    def with_(self, **changes: Any) -> CollectionState:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def lineage(self) -> str:
        """Whose snapshots may be loaded: the uid of the first creation, also once it has been restored."""
        return self.snapshots.lineage or self.spec.uid

    def told(self) -> dict[str, Any]:
        """What changes without a new epoch, as plain msgpack types."""
        return {
            "schema": dict(self.schema),
            "alarms": list(self.alarms),
            "snapshots": self.snapshots.to_wire(),
        }

    def hearing(self, told: Mapping[str, Any]) -> CollectionState:
        """With what another has `told`."""
        return self.with_(
            schema=dict(told["schema"]),
            alarms=tuple(told["alarms"]),
            snapshots=Snapshots.from_wire(told.get("snapshots")),
        )

    def to_wire(self) -> dict[str, Any]:
        """Plain msgpack types."""
        return {
            "spec": self.spec.to_wire(),
            "codebook": self.codebook.to_wire(),
            "previous": self.previous and self.previous.to_wire(),
            "epoch": self.epoch,
            "incarnation": self.incarnation,
            "members": dict(self.members),
            "copies": [[cell, *holders] for cell, holders in self.copies.items()],
            "serving": [[cell, *holders] for cell, holders in self.serving.items()],
            "surplus": [[cell, *holders] for cell, holders in self.surplus.items()],
            "leaving": list(self.leaving),
            "roles": dict(self.roles),
            "moving": self.moving,
            "source": self.source
            and {
                "bootstrap": self.source.bootstrap,
                "topic": self.source.topic,
                "partitions": self.source.partitions,
                "format": self.source.format,
                "origins": [list(pair) for pair in self.source.origins.items()],
                "topic_id": self.source.topic_id,
            },
            "readers": [list(pair) for pair in self.readers.items()],
            **self.told(),
            "restoring": self.restoring and self.restoring.to_wire(),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> CollectionState:
        source = wire["source"]
        return cls(
            spec=CollectionSpec.from_wire(wire["spec"]),
            codebook=Codebook.from_wire(wire["codebook"]),
            previous=Codebook.from_wire(wire["previous"]) if wire["previous"] else None,
            epoch=wire["epoch"],
            incarnation=wire["incarnation"],
            members=dict(wire["members"]),
            copies={row[0]: tuple(row[1:]) for row in wire["copies"]},
            serving={row[0]: tuple(row[1:]) for row in wire["serving"]},
            surplus={row[0]: tuple(row[1:]) for row in wire["surplus"]},
            leaving=tuple(wire["leaving"]),
            roles=dict(wire.get("roles", {})),  # snapshots from before there were roles have none
            moving=wire["moving"],
            source=Source(**{**source, "origins": dict(source["origins"])}) if source else None,
            readers=dict(wire["readers"]),
            schema=dict(wire["schema"]),
            alarms=tuple(wire["alarms"]),
            snapshots=Snapshots.from_wire(wire["snapshots"]),
            restoring=Restoring.from_wire(wire["restoring"]),
        )


def first_codebook(dim: int) -> Codebook:
    """Generation 0: one cell for everything, until there are enough rows to train on."""
    return Codebook(0, 0, np.zeros((1, dim), dtype=np.float32))
