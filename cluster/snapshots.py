"""Which snapshot to write, to load and to give up: from what is at a place to what is to be done. Pure."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from headrace.cluster.manifests import Entry, Manifest
from headrace.cluster.placement import cover
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import SnapshotError
from headrace.gpu.snapshot_wire import Part
from headrace.streams.topic_identity import another

__all__ = ["choose", "expired", "lineage_of", "next_id", "owner", "refusal", "shares", "writers"]


# -- writing -----------------------------------------------------------------------------------------------------------


def next_id(entries: Iterable[Entry], now: float, extra: str) -> str:
    """A name that no snapshot at the place has, and that sorts behind all of them whatever clocks say."""
    number = max((entry.number for entry in entries), default=0) + 1
    return f"{max(1, number):06d}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{extra}"


def writers(state: CollectionState, before: Sequence[str] = ()) -> list[str]:
    """Workers that together hold every cell; those of the snapshot `before` where they still do, for what they have
    sealed is written already.
    """
    others = frozenset(state.members) - frozenset(before)
    same = cover(state.cells, state.serving, avoid=others, turn=0)
    return same or cover(state.cells, state.serving, avoid=frozenset(), turn=0)


def owner(entries: Iterable[Entry]) -> Manifest | None:
    """Whose place it is: that of the collection that wrote the newest snapshot there which can be read."""
    there = [entry.manifest for entry in entries if entry.manifest is not None]
    return max(there, key=lambda manifest: (Entry(manifest.snapshot).number, manifest.snapshot), default=None)


def refusal(entries: Sequence[Entry], url: str, state: CollectionState) -> str:
    """Why a collection may not write to a place; empty if it may.

    One place is for one collection, and for one cluster: retention in the one would delete what the other has just
    written. So no lock is needed that a crash could leave behind: who wrote last owns it, by the uid of its creation. A
    collection that was restored has another uid, and is let in if it was to take over what that one had.
    """
    newest = owner(entries)
    if newest is None:
        return ""
    uid = newest.state.spec.uid
    if newest.lineage != state.lineage:
        return (
            f"{url} holds snapshots of another collection ({newest.state.spec.name}, created as {newest.lineage}): "
            "choose another folder"
        )
    if uid in (state.spec.uid, state.snapshots.heir_of):
        return ""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(newest.created))
    return (
        f"{url} belongs to collection {newest.state.spec.name!r} as created under {uid}, which took snapshot "
        f"{newest.snapshot} there at {at} UTC; this one, created under {state.spec.uid}, was restored from it or it "
        "from this one: choose another folder, or, if that one is to write there no longer, restore with "
        "take_over=True (--take-over)"
    )


# -- reading -----------------------------------------------------------------------------------------------------------


def lineage_of(entries: Sequence[Entry]) -> str:
    """Whose snapshots these are: most of them, or the oldest ones; empty if none can be read."""
    found = Counter(
        entry.manifest.lineage for entry in sorted(entries, key=lambda entry: entry.number) if entry.manifest
    )
    return found.most_common(1)[0][0] if found else ""


def choose(
    entries: Sequence[Entry],
    *,
    lineage: str = "",
    topic_id: str = "",
    wanted: str | None = None,
    without: Mapping[str, str] | None = None,
) -> tuple[Manifest, list[str]]:
    """The snapshot to load: the newest that is good, or the one that is wanted.

    Parameters
    ----------
    entries : sequence of Entry
        All that is at the place.
    lineage : str
        Of the collection that is to come back; default: of most snapshots there.
    topic_id : str
        Of the topic that is read on behind the snapshot, if it is known: offsets of another do not compare with it.
    wanted : str, optional
        This one, and no other instead.
    without : mapping of str to str, optional
        Snapshots that were found damaged when they were loaded, and what was wrong.

    Returns
    -------
    manifest : Manifest
    passed_over : list of str
        A sentence for each newer snapshot that cannot be used.

    Raises
    ------
    SnapshotError
        There is none; says what is wrong with those that are there.
    """
    lineage, without = lineage or lineage_of(entries), without or {}
    passed_over: list[str] = []
    newest_first = sorted(entries, key=lambda entry: (entry.number, entry.snapshot), reverse=True)
    if wanted is not None:
        newest_first = [entry for entry in newest_first if entry.snapshot == wanted]
        if not newest_first:
            known = ", ".join(entry.snapshot for entry in entries) or "none"
            raise SnapshotError(f"there is no snapshot {wanted!r} (there are: {known})")
    for entry in newest_first:
        problem = without.get(entry.snapshot) or entry.problem
        if not problem and entry.manifest is not None:
            problem = _foreign(entry.manifest, lineage, topic_id)
            if not problem:
                return entry.manifest, passed_over
        passed_over.append(f"snapshot {entry.snapshot} cannot be used: {problem}")
    raise SnapshotError("; ".join(passed_over) or "there is no snapshot: check the URL, or take one first")


def _foreign(manifest: Manifest, lineage: str, topic_id: str) -> str:
    name, source = manifest.state.spec.name, manifest.state.source
    if manifest.lineage != lineage:
        return f"it is of another collection ({name!r}, created as {manifest.lineage}, not {lineage})"
    if source is not None and another(topic_id, source.topic_id):
        return f"it is of another topic (id {source.topic_id}, now {topic_id}), which has been deleted since"
    return ""


def shares(parts: Sequence[Part], cells: Iterable[int]) -> list[tuple[Part, frozenset[int]]]:
    """Which cells to read from which part: each from one only, and from few parts.

    A cell that is in several is the same everywhere up to each part's stamp, and the log is read from the lowest.
    """
    left = set(cells)
    found: list[tuple[Part, frozenset[int]]] = []
    remaining = list(parts)
    while remaining and left:
        best = max(remaining, key=lambda part: (sum(part.rows.get(cell, 0) for cell in left), part.name))
        remaining.remove(best)
        if mine := frozenset(cell for cell in left if best.rows.get(cell)):
            found.append((best, mine))
            left -= mine
    return found


# -- giving up ---------------------------------------------------------------------------------------------------------


def expired(entries: Sequence[Entry], keep: int, lineage: str) -> list[str]:
    """Snapshots to delete so that the newest `keep` good ones of the collection stay, oldest first; 0 keeps all.

    What is damaged goes once it is older than those that stay. What is of another collection, or of a format that is
    not known here, is never touched.
    """
    mine = sorted(
        (entry for entry in entries if entry.manifest and entry.manifest.lineage == lineage and not entry.problem),
        key=lambda entry: entry.number,
    )
    if not keep or len(mine) <= keep:
        return []
    oldest = mine[-keep].number
    gone = [entry for entry in entries if entry.number < oldest and not entry.foreign]
    return [
        entry.snapshot
        for entry in sorted(gone, key=lambda entry: entry.number)
        if entry.manifest is None or entry.manifest.lineage == lineage
    ]
