"""What everybody knows about a collection's snapshots: parts of a `CollectionState`, plain on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Restoring", "Snapshots"]


@dataclass(frozen=True, slots=True)
class Snapshots:
    """When snapshots are taken, and the newest there is.

    Changes without a new epoch, and is told to the workers, so that it survives the scheduler.

    Attributes
    ----------
    url : str
        Where scheduled ones go; empty without a schedule.
    every : float
        Seconds from the start of one to the next; 0 without a schedule.
    keep : int
        How many are kept there; 0 keeps all.
    unscheduled : bool
        A user has ended the schedule, so the configuration's is not begun again.
    lineage : str
        Which collection they are of, also after it has been restored: the uid of its first creation.
    heir_of : str
        Uid of the collection whose places this one writes to instead of it; empty if it has taken none over.
    last, last_url : str
        The newest that is complete, and where; from it the collection comes back should all copies of a cell be lost.
    last_at : float
        When it was taken, seconds since 1970 by the scheduler's clock.
    last_rows : int
    detached : bool
        It was restored without its topic: its rows are of another, and none may be read into them.
    obstacle : str
        Why the snapshot that is being loaded is not; what it says counts only while one is.
    failed : str
        Why the newest attempt failed; empty if it did not.
    tried_at : float
        When the newest attempt began, successful or not.
    revision : int
        Rises with every change.
    """

    url: str = ""
    every: float = 0.0
    keep: int = 0
    unscheduled: bool = False
    lineage: str = ""
    heir_of: str = ""
    last: str = ""
    last_url: str = ""
    last_at: float = 0.0
    last_rows: int = 0
    detached: bool = False
    obstacle: str = ""
    failed: str = ""
    tried_at: float = 0.0
    revision: int = 0

    def to_wire(self) -> dict[str, Any]:
        """Plain msgpack types."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any] | None) -> Snapshots:
        return cls(**(wire or {}))


@dataclass(frozen=True, slots=True)
class Restoring:
    """The snapshot that workers are loading; until they have, nobody is read and nothing is written.

    Attributes
    ----------
    url, snapshot : str
    lineage : str
        Of which collection it must be; another than the collection's own where it gets another name.
    offsets : dict of int to int
        Topic partition to the first offset that is read from the log afterwards.
    asked : bool
        Somebody asked for it by `restore`, who is told if it cannot be done; else a cell's last copy was lost.
    only : bool
        This snapshot, and no older one should it be damaged.
    """

    url: str
    snapshot: str
    lineage: str
    offsets: Mapping[int, int] = field(default_factory=dict)
    asked: bool = False
    only: bool = False

    def to_wire(self) -> dict[str, Any]:
        """Plain msgpack types."""
        return {**asdict(self), "offsets": [list(pair) for pair in self.offsets.items()]}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any] | None) -> Restoring | None:
        return cls(**{**wire, "offsets": dict(wire["offsets"])}) if wire else None
