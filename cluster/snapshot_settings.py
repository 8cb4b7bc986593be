"""What the two halves of a coordinator's work on snapshots have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from headrace.cluster.manifests import FOLDER, Entry, read_manifest
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import SnapshotError
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
    pause : float
        Seconds after which a restore that has failed, and whose asker has gone with its scheduler, is tried again.
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
    pause: float = 5.0
    gather: float = 5.0


class Owner(Protocol):
    """What a `Keeper` needs of its coordinator."""

    state: CollectionState

    async def tell(self) -> None: ...
    async def unless_lost(self, work: Awaitable[T], of: Collection[str] | None = None) -> T: ...
    def suspect(self, address: str, why: str) -> None: ...
    def again(self) -> None: ...
    def alarm(self, text: str) -> None: ...


def entries_at(url: str, options: Mapping[str, Any], without: Collection[str] = ()) -> list[Entry]:
    """All snapshots at a place, but for some that need not be read, oldest first. Blocks.

    A manifest that cannot be read is told as such, like one that is damaged, as long as another can be.

    Raises
    ------
    SnapshotError
        The place cannot be read.
    """
    place = Place(url, options)
    found: list[Entry] = []
    unread: SnapshotError | None = None
    for file in place.names(FOLDER):
        name = file.removesuffix(".json")
        if name == file or name in without:
            continue
        try:
            content = place.read(f"{FOLDER}/{file}")
        except SnapshotError as error:
            unread = error
            found.append(Entry(name, problem=str(error), foreign=True, unread=True))
            continue
        if content is not None:
            found.append(read_manifest(name, content))
    if unread is not None and not any(entry.manifest for entry in found):
        raise unread  # the place is away rather than that one file
    return sorted(found, key=lambda entry: (entry.number, entry.snapshot))
