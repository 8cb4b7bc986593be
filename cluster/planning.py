"""What should change about a collection: from a state and the workers that live, to the next state. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from headrace.cluster.placement import assign_readers, place
from headrace.cluster.state import Codebook, CollectionState, Source

__all__ = ["Moves", "adopt_codebook", "attach_source", "membership", "moves", "settle"]

Moves = dict[str, list[int]]
"""Worker to the cells whose rows it is to send on."""


def membership(state: CollectionState, live: Collection[str], rows: Mapping[int, int] | None = None) -> CollectionState:
    """The state with `live` as its workers; the same object when nothing changes.

    A worker that is new joins: it is sent all writes from now on and copies of cells that lack some, and is not read
    until `settle`. If some cell has lost its last copy, the collection begins again from the log (a new incarnation).
    """
    if set(live) == set(state.members):
        return state
    active = [address for address in state.active if address in live]
    serving = {cell: tuple(a for a in holders if a in active) for cell, holders in state.serving.items()}
    lost = [cell for cell in state.cells if not serving.get(cell)]
    if lost:
        members = dict.fromkeys(sorted(live), "active")
        begun = state.source is not None and bool(state.members)
        copies = place(state.codebook.cells, list(live), state.spec.replicas)
        alarms = state.alarms
        if begun:
            alarms = (
                *alarms,
                f"the last copy of {len(lost)} cells was lost: the log was read again from its start",
            )
        return _with_readers(
            state.with_(
                epoch=state.epoch + 1,
                incarnation=state.incarnation + begun,
                members=members,
                previous=None,
                copies=copies,
                serving=copies,
                moving=False,
                alarms=alarms,
            )
        )
    members = {address: "active" if address in active else "joining" for address in sorted(live)}
    copies = place(state.codebook.cells, list(members), state.spec.replicas, rows=rows, current=state.copies)
    if state.previous:
        copies |= {cell: serving[cell] for cell in state.previous.cells}
    serving = {cell: tuple(a for a in copies[cell] if a in serving[cell]) for cell in copies}
    return _with_readers(
        state.with_(
            epoch=state.epoch + 1,
            members=members,
            copies=copies,
            serving=serving,
            moving=bool(state.previous) or copies != serving or "joining" in members.values(),
        )
    )


def adopt_codebook(state: CollectionState, centroids: npt.NDArray[np.float32]) -> CollectionState:
    """The state that routes writes by new centroids, float32 (cells, dim), while old rows wait to be relabelled.

    Raises
    ------
    ValueError
        The rows of the codebook before the current one still wait: `settle` first, or they would be lost.
    """
    if state.previous is not None:
        raise ValueError(
            f"collection {state.spec.name!r} still moves to codebook {state.codebook.generation}: settle first"
        )
    old = state.codebook
    book = Codebook(old.generation + 1, old.first + len(old.centroids), centroids)
    fresh = place(book.cells, state.active, state.spec.replicas)
    # A row gets a new cell's number only by an apply that goes to all of that cell's copies: they serve it at once.
    return state.with_(
        epoch=state.epoch + 1,
        codebook=book,
        previous=old,
        copies={**state.copies, **fresh},
        serving={**state.serving, **fresh},
        moving=True,
    )


def moves(state: CollectionState) -> Moves:
    """Who must send which cells' rows on: cells that wait for a new number, and those with an incomplete copy."""
    work: Moves = {}
    waiting = set(state.previous.cells) if state.previous else set()
    for cell, holders in state.copies.items():
        if cell in waiting or set(holders) != set(state.serving[cell]):
            work.setdefault(state.serving[cell][0], []).append(cell)
    return work


def settle(state: CollectionState) -> CollectionState:
    """The state once all `moves` are done: everybody is read, the old codebook is gone."""
    copies = {cell: state.copies[cell] for cell in state.codebook.cells}
    return _with_readers(
        state.with_(
            epoch=state.epoch + 1,
            members=dict.fromkeys(state.members, "active"),
            previous=None,
            copies=copies,
            serving=copies,
            moving=False,
        )
    )


def attach_source(state: CollectionState, source: Source) -> CollectionState:
    """The state with records coming from `source`."""
    return _with_readers(state.with_(epoch=state.epoch + 1, source=source))


def _with_readers(state: CollectionState) -> CollectionState:
    if state.source is None:
        return state
    return state.with_(readers=assign_readers(state.source.partitions, state.active, state.readers))
