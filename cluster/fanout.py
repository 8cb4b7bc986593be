"""Sending one header to every worker of a collection, the vectors only to those that hold the cells.

Used by the ingest graph for new records and by workers for rows that move: there is one write path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster.calls import Call
from headrace.cluster.state import CollectionState
from headrace.cluster.wire import batch_to_wire, offsets_to_wire
from headrace.gpu.errors import ClusterError, StaleEpoch, StoreFull
from headrace.gpu.rows import Action, Batch, Id
from headrace.gpu.versions import Versions

__all__ = ["Header", "LocalApply", "Outcome", "batch_of_rows", "fan_out", "held_by", "part_for"]

LocalApply = Callable[[Batch | None, Mapping[int, tuple[int, int]], Mapping[int, int], int], Any]
"""`Replica.apply` of the sender's own worker."""

_DROP_OR_HOLD = np.array([Action.DROP, Action.HOLD], dtype=np.uint8)

Outcome = tuple[int, ...] | ClusterError | StoreFull
"""Positions of the rows that a worker lacks; or why it could not be asked; or that its memory limit is reached."""


@dataclass(frozen=True, slots=True)
class Header:
    """Routed records, before they are cut to what each worker needs.

    Attributes
    ----------
    ids : sequence of str or int, (n,)
    topic_partitions, offsets, timestamps : arrays (n,)
    cells : int32 (n,)
        `DELETED` where the record deletes.
    vectors : float32 (v, dim)
    vector_at : int64 (n,)
        Row of `vectors` for each record; not looked at where it deletes.
    attributes : dict of str to list, each (n,)
    """

    ids: Sequence[Id]
    topic_partitions: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    timestamps: npt.NDArray[np.int64]
    cells: npt.NDArray[np.int32]
    vectors: npt.NDArray[np.float32]
    vector_at: npt.NDArray[np.int64]
    attributes: Mapping[str, Sequence[Any]]


def part_for(header: Header, worker: str, state: CollectionState) -> Batch:
    """What `worker` is sent of new records: all of the header, and the vectors of the cells that it holds."""
    holds = held_by(header, worker, state)
    with_vector = np.flatnonzero(holds)
    return Batch(
        ids=header.ids,
        topic_partitions=header.topic_partitions,
        offsets=header.offsets,
        timestamps=header.timestamps,
        cells=header.cells,
        actions=_DROP_OR_HOLD[holds.view(np.uint8)],
        vectors=header.vectors[header.vector_at[with_vector]],
        attributes={name: [values[row] for row in with_vector.tolist()] for name, values in header.attributes.items()},
    )


def batch_of_rows(
    header: Header,
    rows: npt.NDArray[np.int64],
    actions: npt.NDArray[np.uint8],
    instead: Versions | None = None,
) -> Batch:
    """Some of the header's rows, with the vectors and attributes of those that are to be held."""
    held = rows[actions == Action.HOLD]
    columns = header.attributes.items() if len(held) else ()
    return Batch(
        ids=[header.ids[row] for row in rows.tolist()],
        topic_partitions=header.topic_partitions[rows],
        offsets=header.offsets[rows],
        timestamps=header.timestamps[rows],
        cells=header.cells[rows],
        actions=actions,
        vectors=header.vectors[header.vector_at[held]],
        attributes={name: [values[row] for row in held.tolist()] for name, values in columns},
        instead=instead,
    )


def held_by(header: Header, worker: str, state: CollectionState) -> npt.NDArray[np.bool_]:
    """Which of the header's records `worker` is to hold, bool (n,)."""
    copies = state.copies
    # A header has few rows: quicker than any table that would be made of the placement first.
    found = (worker in copies.get(cell, ()) for cell in header.cells.tolist())
    return np.fromiter(found, dtype=np.bool_, count=len(header.cells))


async def fan_out(
    call: Call,
    state: CollectionState,
    parts: Mapping[str, Batch | None],
    *,
    me: str,
    local: LocalApply,
    deadline: float,
    ranges: Mapping[int, tuple[int, int]] | None = None,
    stable: Mapping[int, int] | None = None,
) -> dict[str, Outcome]:
    """Apply each worker's part there, all at once.

    Returns
    -------
    dict of str to Outcome
        For each worker, the rows of its part that it lacks, or why it did not answer, or that it has no room.

    Raises
    ------
    StaleEpoch
        Some worker knows a newer epoch: fetch the state, route again, send again.
    """
    ranges, stable = ranges or {}, stable or {}
    shared = {
        "collection": state.spec.name,
        "epoch": state.epoch,
        "incarnation": state.incarnation,
        "ranges": [[partition, low, high] for partition, (low, high) in ranges.items()],
        "stable": offsets_to_wire(stable),
    }

    async def one(worker: str, part: Batch | None) -> Outcome:
        if worker == me:
            try:
                applied = local(part, ranges, stable, state.epoch)
            except StoreFull as error:
                return error
            if applied is None:
                raise StaleEpoch(f"epoch {state.epoch} of {state.spec.name!r} is no longer the newest")
            return tuple(applied.missing)
        try:
            answer = await call(
                worker, "apply", deadline=deadline, batch=None if part is None else batch_to_wire(part), **shared
            )
        except StaleEpoch:
            raise
        except (ClusterError, StoreFull) as error:
            return error
        return tuple(answer["missing"])

    # The others are at work already while this one does its own part.
    workers = sorted(parts, key=lambda worker: worker == me)
    answers = await asyncio.gather(*(one(worker, parts[worker]) for worker in workers), return_exceptions=True)
    outcome: dict[str, Outcome] = {}
    for worker, answer in zip(workers, answers, strict=True):
        if isinstance(answer, ClusterError | StoreFull | tuple) and not isinstance(answer, StaleEpoch):
            outcome[worker] = answer
        elif isinstance(answer, BaseException):
            raise answer
    return outcome
