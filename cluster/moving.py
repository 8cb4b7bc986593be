"""Rows on their way from one worker to others: by the same apply as new records, with the rows' own versions.

Workers that are not to hold a row hear nothing of it; they drop it when the move is settled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headrace.cluster.calls import Call
from headrace.cluster.fanout import Header, LocalApply, batch_of_rows, fan_out, held_by
from headrace.cluster.routing import Router
from headrace.cluster.state import CollectionState
from headrace.gpu.backend import Backend
from headrace.gpu.errors import ClusterError, StoreFull
from headrace.gpu.rows import Action, Batch
from headrace.gpu.store import StoredRow

__all__ = ["header_of_rows", "send_on"]


def header_of_rows(rows: Sequence[StoredRow], state: CollectionState, backend: Backend) -> Header:
    """Stored rows, read with their vectors, as a header; those of the older codebook get their cell by the newer."""
    vectors = np.stack([row.vector for row in rows if row.vector is not None])
    cells = np.array([row.cell for row in rows], dtype=np.int32)
    if state.previous is not None:
        old = np.isin(cells, list(state.previous.cells))
        cells = np.where(old, Router(state.codebook, backend).cells(vectors), cells)
    names = {name for row in rows for name in row.attributes}
    return Header(
        ids=[row.id for row in rows],
        topic_partitions=np.array([row.topic_partition for row in rows], dtype=np.int32),
        offsets=np.array([row.offset for row in rows], dtype=np.int64),
        timestamps=np.array([row.timestamp for row in rows], dtype=np.int64),
        cells=cells,
        vectors=vectors,
        vector_at=np.arange(len(rows), dtype=np.int64),
        attributes={name: [row.attributes.get(name) for row in rows] for name in names},
    )


async def send_on(
    call: Call, state: CollectionState, header: Header, *, me: str, local: LocalApply, deadline: float
) -> dict[str, str]:
    """Tell holders of a row its cell, then send the vectors to those that lack it.

    Copies that are complete hear of a row only where its cell has a new number. A move that was interrupted and begins
    again sends no vector twice.

    Returns
    -------
    dict of str to str
        Workers that did not answer, and why.

    Raises
    ------
    StoreFull
        A worker has no room for the rows.
    StaleEpoch
        As `fan_out`.
    """
    held = {worker: np.flatnonzero(_concerns(header, worker, state)) for worker in state.members}
    parts = {worker: _part(header, rows, Action.KEEP) for worker, rows in held.items() if len(rows)}
    failed: dict[str, str] = {}
    for _ in range(2):
        outcome = await fan_out(call, state, parts, me=me, local=local, deadline=deadline)
        for worker, answer in outcome.items():
            if isinstance(answer, StoreFull):
                raise answer
            if isinstance(answer, ClusterError):
                failed[worker] = str(answer)
        # What this worker itself lacks it has let go of for something newer meanwhile.
        parts = {
            worker: _part(header, held[worker][list(lacking)], Action.HOLD)
            for worker, lacking in outcome.items()
            if isinstance(lacking, tuple) and lacking and worker != me
        }
        if not parts:
            break
    return failed


def _concerns(header: Header, worker: str, state: CollectionState) -> npt.NDArray[np.bool_]:
    """Which rows `worker` has to hear of, bool (n,): those of its cells, but for what it has as it is to be."""
    holds = held_by(header, worker, state)
    if state.previous is not None:
        return holds
    complete = np.array([cell for cell, holders in state.serving.items() if worker in holders], dtype=np.int32)
    return holds & ~np.isin(header.cells, complete)


def _part(header: Header, rows: npt.NDArray[np.int64], action: Action) -> Batch:
    return batch_of_rows(header, rows, np.full(len(rows), action, dtype=np.uint8))
