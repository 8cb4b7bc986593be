"""What a coordinator has its workers do before it can go on: one question to each of them, and what the answers say.

A round is given up when a member is lost meanwhile, for then writes wait for another placement.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster import planning
from headrace.cluster.attendance import Attendance
from headrace.cluster.calls import Call
from headrace.cluster.coordinator_settings import CoordinatorSettings
from headrace.cluster.snapshot_settings import Owner
from headrace.cluster.wire import floats_from_wire, offsets_from_wire
from headrace.gpu.errors import ClusterError, StaleEpoch

__all__ = ["Rounds"]

log = logging.getLogger("headrace.cluster")


class Rounds:
    """Asks the workers of one collection. Belongs to the scheduler's event loop.

    Parameters
    ----------
    owner : Owner
        The collection's coordinator.
    call : Call
    settings : CoordinatorSettings
    workers : Attendance
    """

    def __init__(self, owner: Owner, call: Call, settings: CoordinatorSettings, workers: Attendance) -> None:
        self._owner, self._call, self._settings, self._workers = owner, call, settings, workers
        self._counted = time.monotonic()

    async def send_rows_on(self) -> dict[str, dict[int, int]] | None:
        """Have rows sent to where they must be; the offsets below which joining workers are complete, or None if it
        must be tried again.
        """
        state = self._owner.state
        work = planning.moves(state)
        epoch, name, deadline = state.epoch, state.spec.name, self._settings.move_deadline
        if work:
            log.info("collection %r: %d workers send rows on", name, len(work))
        # Workers with nothing to send still say how far they are: no joining worker may claim more than its peers have.
        everyone = {worker: work.get(worker, []) for worker in state.active}
        sending = asyncio.gather(
            *(
                self._call(worker, "move", deadline=deadline, collection=name, epoch=epoch, cells=cells)
                for worker, cells in everyone.items()
            ),
            return_exceptions=True,
        )
        try:
            answers = await self._owner.unless_lost(sending)
        except ClusterError as error:
            log.info("collection %r: rows are sent on again later: %s", name, error)
            return None
        low: dict[int, int] | None = None
        for worker, answer in zip(everyone, answers, strict=True):
            if isinstance(answer, StaleEpoch):
                return None  # overtaken by a newer change
            if isinstance(answer, ClusterError):
                if worker not in self._workers.live:
                    return None
                self._owner.suspect(worker, str(answer))
                return None
            if isinstance(answer, BaseException):
                raise answer
            if answer["failed"]:
                for peer, why in answer["failed"]:
                    self._owner.suspect(peer, why)
                return None
            marks = offsets_from_wire(answer["watermarks"])
            low = marks if low is None else {tp: min(low.get(tp, 0), mark) for tp, mark in marks.items()}
        joining = [worker for worker, role in self._owner.state.members.items() if role == "joining"]
        return {worker: low or {} for worker in joining}

    async def count_rows(self) -> dict[int, int] | None:
        """Rows by cell; None while that is not due yet."""
        state, settings = self._owner.state, self._settings
        if time.monotonic() - self._counted < settings.survey:
            return None
        self._counted = time.monotonic()
        asking = asyncio.gather(
            *(
                self._call(worker, "status", deadline=settings.publish_deadline, collection=state.spec.name)
                for worker in state.active
            ),
            return_exceptions=True,  # who does not answer is noticed by `watching`
        )
        rows: dict[int, int] = {}
        for answer in await self._owner.unless_lost(asking):
            for cell, count in answer.get("cell_sizes", ()) if isinstance(answer, dict) else ():
                rows[cell] = max(rows.get(cell, 0), count)
        return rows

    async def train(self) -> npt.NDArray[np.float32] | None:
        """Centroids for the collection's first codebook, float32 (cells, dim); None while it needs none."""
        state, settings = self._owner.state, self._settings
        if state.codebook.generation or state.spec.cells < 2 or state.source is None or not state.active:
            return None
        trainer, name = state.serving[state.codebook.first][0], state.spec.name
        status = await self._ask(trainer, "status", deadline=settings.publish_deadline, collection=name)
        if status["rows"] < settings.min_rows:
            return None
        answer = await self._owner.unless_lost(
            self._ask(
                trainer,
                "train",
                deadline=settings.move_deadline,
                collection=name,
                cells=state.spec.cells,
                sample_rows=settings.sample_rows,
                iterations=settings.iterations,
            )
        )
        centroids = floats_from_wire(answer["centroids"])
        log.info("collection %r: codebook of %d cells trained on %d rows", name, len(centroids), answer["rows"])
        return centroids

    async def _ask(self, worker: str, op: str, *, deadline: float, **message: Any) -> dict[str, Any]:
        try:
            return await self._call(worker, op, deadline=deadline, **message)
        except ClusterError as error:
            self._owner.suspect(worker, str(error))
            raise
