"""What the two halves of a coordinator's work on snapshots have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from headrace.cluster.manifests import FOLDER, Entry, read_manifest
from headrace.cluster.state import CollectionState
from headrace.gpu.snapshot_place import Place

__all__ = ["Owner", "SnapshotSettings", "entries_at"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SnapshotSettings:
    """How snapshots are taken.

    Attributes
    ----------
    url : str
        Folder in which every collection has its own, for snapshots that nobody asks for; empty: there are none.
    every : float
        Seconds between two of these.
    keep : int
        How many of these are kept; 0 keeps all.
    options : mapping
        fsspec's, such as keys; never shown.
    deadline : float
        Seconds that one worker may take to write or load its share.
    patience : float
        Seconds for which a place that cannot be reached is tried again when a lost cell is to be loaded from it.
    settle : float
        Seconds for which a snapshot waits for rows that move.
    gather : float
        Seconds for which the workers that there were are waited for, before those that are there load everything.
    """

    url: str = ""
    every: float = 600.0
    keep: int = 5
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    deadline: float = 3600.0
    patience: float = 60.0
    settle: float = 30.0
    gather: float = 5.0


class Owner(Protocol):
    """What a `Keeper` needs of its coordinator."""

    state: CollectionState

    async def tell(self) -> None: ...
    async def unless_lost(self, work: Awaitable[T]) -> T: ...
    def suspect(self, address: str, why: str) -> None: ...
    def again(self) -> None: ...
    def alarm(self, text: str) -> None: ...


def entries_at(url: str, options: Mapping[str, Any]) -> list[Entry]:
    """All snapshots at a place, oldest first. Blocks.

    Raises
    ------
    SnapshotError
        The place cannot be read.
    """
    place = Place(url, options)
    found = [
        read_manifest(name.removesuffix(".json"), content)
        for name in place.names(FOLDER)
        if name.endswith(".json") and (content := place.read(f"{FOLDER}/{name}")) is not None
    ]
    return sorted(found, key=lambda entry: (entry.number, entry.snapshot))
