"""Whose a place is: the mark that its writer leaves there, by which two that begin at once find out about each other.

A mark is no lock, and nothing waits for one: it names the collection that began to write there last. Each writer puts
its own there before it looks what there is, and looks for it again before and after its manifest: of two that began at
once, the one whose mark is gone takes back what it has written. What has been written for good decides before marks do
(`snapshots.refusal`), so one that a crash has left behind keeps nobody away.

Everything here blocks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headrace.cluster.manifests import Entry
from headrace.cluster.snapshot_settings import entries_at
from headrace.cluster.snapshots import owner, refusal
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import SnapshotError
from headrace.gpu.snapshot_place import Place

__all__ = ["MARK", "Mark", "check_mark", "claim", "end", "folder_for", "read_mark"]

log = logging.getLogger("headrace.cluster")

MARK = "owner.json"


@dataclass(frozen=True, slots=True)
class Mark:
    """Who began to write at a place last.

    Attributes
    ----------
    uid, lineage, collection : str
        Of its creation; of its first one, see `Snapshots.lineage`; and its name.
    at : float
        Seconds since 1970.
    ended : bool
        It was dropped: it comes back only if somebody asks for it.
    """

    uid: str
    lineage: str
    collection: str
    at: float
    ended: bool = False


def read_mark(place: Place) -> Mark | None:
    """The mark at a place; None where there is none, or none that can be read.

    Raises
    ------
    SnapshotError
        The place cannot be read.
    """
    content = place.read(MARK)
    if content is None:
        return None
    try:
        return Mark(**json.loads(content))
    except (ValueError, TypeError, RecursionError) as error:
        log.warning("%s is no mark (%s): it is written anew with the next snapshot", place.shown(MARK), error)
        return None


def claim(url: str, options: Mapping[str, Any], state: CollectionState) -> list[Entry]:
    """Begin to write at a place: put the collection's mark there; answers what there is, oldest first.

    Raises
    ------
    SnapshotError
        It is another's, or cannot be read or written.
    """
    place = Place(url, options)
    entries = _allowed(place, options, url, state)
    mark = read_mark(place)
    if mark is not None and mark.uid == state.spec.uid and not mark.ended:
        return entries
    _put(place, state, ended=False)
    # Another may have finished between the two: it has not seen this mark, so this one must give way.
    return _allowed(place, options, url, state)


def _allowed(place: Place, options: Mapping[str, Any], url: str, state: CollectionState) -> list[Entry]:
    entries = entries_at(url, options)
    if why := refusal(entries, place.url, state):
        raise SnapshotError(why)
    return entries


def check_mark(place: Place, state: CollectionState) -> None:
    """Raise `SnapshotError` if the place is no longer this collection's."""
    mark = read_mark(place)
    if mark is None:
        raise SnapshotError(f"{place.shown(MARK)} has gone: nobody but Headrace may write to {place.url}; try again")
    if mark.uid != state.spec.uid:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(mark.at))
        raise SnapshotError(
            f"collection {mark.collection!r}, created under {mark.uid}, began to write to {place.url} at {at} UTC, and "
            "a place is for one collection: choose another folder"
        )
    if mark.ended:
        raise SnapshotError(f"collection {mark.collection!r} was dropped while its snapshot was written")


def end(url: str, options: Mapping[str, Any], state: CollectionState) -> bool:
    """Have the place say that its collection was dropped; False where it is not its, and nothing is changed."""
    place = Place(url, options)
    newest = owner(entries_at(url, options))
    mark = read_mark(place)
    mine = {state.spec.uid, state.snapshots.heir_of}
    if newest is None or newest.state.spec.uid not in mine or (mark is not None and mark.uid not in mine):
        return False
    _put(place, state, ended=True)
    return True


def _put(place: Place, state: CollectionState, *, ended: bool) -> None:
    mark = Mark(state.spec.uid, state.lineage, state.spec.name, time.time(), ended)
    place.write(MARK, json.dumps(asdict(mark), indent=1).encode())


def folder_for(url: str, options: Mapping[str, Any], state: CollectionState) -> str:
    """Where snapshots go that were to go to `url`: there, or beside it if it holds those of another collection.

    Such as one of the same name that was dropped: its snapshots stay, for whoever wants it back after all. A copy of
    the collection itself does not go elsewhere: it might be taken for the collection when all of them are restored.
    """
    newest = owner(entries_at(url, options))
    if newest is None or newest.lineage == state.lineage:
        return url
    above, slash, name = url.rpartition("/")
    return f"{above}{slash}{name.partition('~')[0]}~{state.lineage[:8]}"
