"""What should change about a collection: from a state and the workers that live, to the next state. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from headrace.cluster.layout import near_order
from headrace.cluster.placement import assign_readers, place
from headrace.cluster.roles import BOTH, may_hold, may_ingest
from headrace.cluster.snapshot_state import Restoring
from headrace.cluster.state import Codebook, CollectionState, Source, first_codebook
from headrace.gpu.errors import CollectionError, TopicError
from headrace.streams.topic_identity import another, made_anew

__all__ = [
    "Moves",
    "adopt_codebook",
    "attached",
    "begun_anew",
    "lost_cells",
    "membership",
    "moves",
    "rebalanced",
    "restored",
    "settle",
    "topic_found",
]

Moves = dict[str, list[int]]
"""Worker to the cells whose rows it is to send on."""


def membership(
    state: CollectionState,
    live: Collection[str],
    rows: Mapping[int, int] | None = None,
    leaving: Collection[str] = (),
    roles: Mapping[str, str] | None = None,
) -> CollectionState:
    """The state with `live` as its workers, of which `leaving` are to be emptied; the same object when nothing changes.

    A worker that is new joins: it is sent all writes from now on and its share of the cells, and is not read until
    `settle`. A copy that is given up is kept and read until then too. If some cell has lost its last copy, the
    collection begins again from the log (a new incarnation). By their `roles`, some workers are given no cells and some
    no topic partitions; where none may hold rows there is no member at all, for nobody may read what nobody keeps.
    """
    roles = roles or {}
    if not may_hold(live, roles):
        live = ()
    going = tuple(sorted(set(live) & set(leaving)))
    roles = {address: roles[address] for address in sorted(live) if roles.get(address, BOTH) != BOTH}
    if set(live) == set(state.members) and going == state.leaving and roles == state.roles:
        return state
    if not live:
        # What that means is decided when somebody comes.
        nobody: dict[int, tuple[str, ...]] = dict.fromkeys(state.codebook.cells if state.copies else (), ())
        return state.with_(
            epoch=state.epoch + 1,
            members={},
            previous=None,
            copies=nobody,
            serving=nobody,
            surplus={},
            leaving=(),
            roles={},
            moving=False,
            readers={},
        )
    state = state.with_(roles=roles)
    active = [address for address in state.active if address in live]
    serving = {cell: tuple(a for a in holders if a in active) for cell, holders in state.serving.items()}
    if lost_cells(state, live):
        return begun_anew(state, live, going)
    members = {address: "active" if address in active else "joining" for address in sorted(live)}
    return _with_readers(_placed(state.with_(members=members, leaving=going, serving=serving), rows))


def begun_anew(state: CollectionState, live: Collection[str], leaving: Collection[str] = ()) -> CollectionState:
    """The state in which `live` workers begin with nothing and read the log from its start, if there is one."""
    if state.source is None or not state.copies:
        return _begun(state, live, leaving, state.codebook)
    cells = len(lost_cells(state, live))
    alarm = f"the last copy of {cells} cells was lost: the log was read again from its start"
    anew = state.with_(incarnation=state.incarnation + 1, alarms=(*state.alarms, alarm))
    return _begun(anew, live, leaving, state.codebook)


def _begun(
    state: CollectionState,
    live: Collection[str],
    leaving: Collection[str],
    book: Codebook,
    rows: Mapping[int, int] | None = None,
    restoring: Restoring | None = None,
) -> CollectionState:
    """The next epoch, in which `live` workers hold the cells of `book`, and nothing in them but what they load."""
    going = tuple(sorted(set(live) & set(leaving)))
    holding = _staying(may_hold(live, state.roles), going)
    copies = place(book.cells, holding, state.spec.replicas, rows=rows, near=_near(book)) if live else {}
    loads = restoring is not None
    return _with_readers(
        state.with_(
            epoch=state.epoch + 1,
            members=dict.fromkeys(sorted(live), "joining" if loads else "active"),
            codebook=book,
            previous=None,
            copies=copies,
            serving=dict.fromkeys(copies, ()) if loads else copies,
            surplus={},
            leaving=going,
            moving=loads,
            restoring=restoring,
        )
    )


def lost_cells(state: CollectionState, live: Collection[str]) -> list[int]:
    """Cells of which no worker in `live` has a complete copy."""
    readable = set(state.active) & set(live)
    return [cell for cell in state.cells if readable.isdisjoint(state.serving.get(cell, ()))]


def restored(
    state: CollectionState,
    kept: CollectionState,
    restoring: Restoring,
    live: Collection[str],
    rows: Mapping[int, int],
    leaving: Collection[str] = (),
) -> CollectionState:
    """The state in which all of `live` load a snapshot: nobody is read and nothing is written before `settle`.

    Parameters
    ----------
    kept : CollectionState
        As the snapshot has it: its codebook and schema are taken over.
    rows : mapping of int to int
        Rows by cell in the snapshot.
    """
    anew = state.with_(incarnation=state.incarnation + 1, schema={**kept.schema, **state.schema})
    return _begun(anew, live, leaving, kept.codebook, rows, restoring)


def rebalanced(state: CollectionState, rows: Mapping[int, int]) -> CollectionState:
    """The state with cells on their way from workers that hold too many of the `rows` (by cell) to those that hold too
    few; the same object when the difference is not worth it, or something moves already.
    """
    if state.moving:
        return state
    new = _placed(state, rows)
    return new if new.surplus else state


def _placed(state: CollectionState, rows: Mapping[int, int] | None) -> CollectionState:
    """The next epoch: cells go where `place` wants them, and every complete copy is kept until they are there."""
    wanted = {cell: [a for a in h if a not in state.surplus.get(cell, ())] for cell, h in state.copies.items()}
    target = place(
        state.codebook.cells,
        _staying(may_hold(state.members, state.roles), state.leaving),
        state.spec.replicas,
        rows=rows,
        current=wanted,
        near=_near(state.codebook),
    )
    surplus = {
        cell: extra for cell in target if (extra := tuple(a for a in state.serving[cell] if a not in target[cell]))
    }
    copies = {cell: (*holders, *surplus.get(cell, ())) for cell, holders in target.items()}
    if state.previous:
        copies |= {cell: state.serving[cell] for cell in state.previous.cells}
    serving = {cell: tuple(a for a in copies[cell] if a in state.serving[cell]) for cell in copies}
    joining = "joining" in state.members.values()
    return state.with_(
        epoch=state.epoch + 1,
        copies=copies,
        serving=serving,
        surplus=surplus,
        moving=bool(state.previous) or bool(surplus) or copies != serving or joining,
    )


def _staying(members: Collection[str], leaving: Collection[str]) -> list[str]:
    """Who may be given something: everybody, where all are to be emptied."""
    return [address for address in members if address not in leaving] or list(members)


def _near(codebook: Codebook) -> list[int]:
    return [codebook.first + at for at in near_order(codebook.centroids)]


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
    holding = _staying(may_hold(state.active, state.roles), state.leaving)
    fresh = place(book.cells, holding, state.spec.replicas, near=_near(book))
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
    """The state once all `moves` are done: everybody is read, the old codebook and surplus copies are gone."""
    copies = {
        cell: tuple(a for a in state.copies[cell] if a not in state.surplus.get(cell, ()))
        for cell in state.codebook.cells
    }
    return _with_readers(
        state.with_(
            epoch=state.epoch + 1,
            members=dict.fromkeys(state.members, "active"),
            previous=None,
            copies=copies,
            serving=copies,
            surplus={},
            moving=False,
            restoring=None,
        )
    )


def attached(state: CollectionState, source: Source) -> CollectionState:
    """The state with records coming from `source`; the same object where they do already.

    Raises
    ------
    CollectionError
        The collection reads from another topic.
    TopicError
        The topic has another number of topic partitions than when the collection was made.
    """
    old = state.source
    if old is None:
        return _with_readers(state.with_(epoch=state.epoch + 1, source=source))
    if (old.bootstrap, old.topic, old.format) == (source.bootstrap, source.topic, source.format):
        if another(old.topic_id, source.topic_id):
            return topic_found(state, source)
        if old.partitions == source.partitions:
            return state
    if old.topic == source.topic and old.partitions != source.partitions:
        raise TopicError(
            f"topic {source.topic!r} has {source.partitions} topic partitions and the collection was built on "
            f"{old.partitions}: ids would map to others; build a new collection from the topic instead"
        )
    raise CollectionError(
        f"collection {state.spec.name!r} reads topic {old.topic!r} from {old.bootstrap} already; "
        "one topic feeds one collection: create another collection for another topic"
    )


def topic_found(state: CollectionState, source: Source) -> CollectionState:
    """The state once the topic's id is known to be that of `source`.

    Where another was known, the topic was deleted and made anew. Offsets of two topics do not compare, so nothing of
    the old one may stay: a new incarnation begins empty, with the workers there are, and reads the new topic.
    """
    old = state.source
    if old is None or not another(old.topic_id, source.topic_id):
        known = source if old is None else replace(old, topic_id=source.topic_id)
        return state.with_(epoch=state.epoch + 1, source=known)
    sentence = made_anew(source.topic, old.topic_id, source.topic_id)
    alarms = state.alarms if sentence in state.alarms else (*state.alarms, sentence)
    anew = state.with_(incarnation=state.incarnation + 1, source=source, alarms=alarms)
    return _begun(anew, state.members, state.leaving, first_codebook(state.spec.dim))


def _with_readers(state: CollectionState) -> CollectionState:
    if state.source is None:
        return state
    reading = _staying(may_ingest(state.active, state.roles), state.leaving)
    return state.with_(readers=assign_readers(state.source.partitions, reading, state.readers))
