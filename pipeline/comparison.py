"""One comparison of the copies of a collection, while records go on being applied.

From coarse to fine: sums by cell, digests by row of the cells whose sums differ, then the ids themselves, about which
all copies are asked until it is certain that they differ (`headrace.cluster.compare`). Only the last step decides, and
while it lasts no copy forgets a deletion.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster.calls import Call
from headrace.cluster.compare import (
    Heard,
    Judgement,
    differing_cells,
    heard_from_wire,
    judge,
    newest,
    odd_digests,
)
from headrace.cluster.state import CollectionState
from headrace.cluster.wire import offsets_from_wire, offsets_to_wire, rows_from_wire
from headrace.gpu.ids import hash_ids, row_digests
from headrace.gpu.rows import Id
from headrace.gpu.store import StoredRow

__all__ = ["Comparison"]

_LOOKS = 3
"""Sums are compared this often before rows are: under load a cell is seldom the same on all copies at one moment."""

_PAUSE = 0.02
_AT_ONCE = 512
_MOST = 20_000
"""Ids of one cell that are looked at in one pass; after a repair there is another."""


class Comparison:
    """Compares all copies once, with a placement that holds still for it.

    Parameters
    ----------
    call : Call
    state : CollectionState
        Nothing moves in it.
    ends : async callable
        Where the log ends now, topic partition to offset; None if Kafka does not say.
    until : float
        When it must be over, by `time.monotonic`.
    deep : bool
        Compare vectors and attributes too.

    Attributes
    ----------
    found : dict of id to Judgement
        What differs.
    cells : dict of int to set of id
        The same by cell.
    content : set of id
        Of `found`, those whose vectors or attributes differ at the same version.
    strays : dict of str to set of id
        Of `found`, those of which a worker answers with a row that it does not know of.
    unclear : dict of id to str
        What could not be compared, and why.
    cut : bool
        There were more than were looked at.
    """

    def __init__(
        self,
        call: Call,
        state: CollectionState,
        ends: Callable[[], Awaitable[Mapping[int, int] | None]],
        until: float,
        *,
        deep: bool,
    ) -> None:
        self._call, self.state, self._ends, self._until, self._deep = call, state, ends, until, deep
        self.found: dict[Id, Judgement] = {}
        self.cells: dict[int, set[Id]] = {}
        self.content: set[Id] = set()
        self.strays: dict[str, set[Id]] = {}
        self.unclear: dict[Id, str] = {}
        self.cut = False

    async def run(self) -> None:
        """Fill in what is found.

        Raises
        ------
        StaleEpoch, CollectionNotFound, ClusterError, ConsistencyTimeout
            The placement has changed, or somebody did not answer.
        """
        state = self.state
        cells: set[int] | None = None
        for look in range(_LOOKS):
            if look:
                await asyncio.sleep(_PAUSE)
            answers = await self._everyone("digests", deep=self._deep)
            sums = {
                worker: {cell: (count, total) for cell, count, total in answer["digests"]}
                for worker, answer in answers.items()
            }
            now = set(differing_cells(state, sums))
            # Once equal is enough: then all copies held the same, at whatever each had applied.
            cells = now if cells is None else cells & now
            if not cells:
                return
        assert cells is not None
        for cell in sorted(cells):
            await self._compare_cell(cell)

    async def _compare_cell(self, cell: int) -> None:
        before = await self._odd(cell, deep=False)
        ids = dict.fromkeys(await self._ids_of(cell, before, deep=False))
        if self._deep:
            ids |= dict.fromkeys(await self._ids_of(cell, await self._odd(cell, deep=True), deep=True))
        self.cut |= any(len(some) == _MOST for some in before.values())
        await self._everyone("remember", seconds=self.left() + 1.0)
        wanted = [row_id for row_id in ids if row_id not in self.found]
        for start in range(0, len(wanted), _AT_ONCE):
            await self._judge(cell, wanted[start : start + _AT_ONCE])
        # A healthy copy may be odd all the while: first it is ahead of another, then behind it.
        after = await self._odd(cell, deep=False)
        for worker in before.keys() & after.keys():
            strays = await self._strays(cell, worker, np.intersect1d(before[worker], after[worker]))
            for row_id in strays.keys() - self.found.keys() - self.unclear.keys():
                self._find(cell, row_id, Judgement(faults={worker: strays[row_id]}, cell=cell))
                self.strays.setdefault(worker, set()).add(row_id)

    async def _strays(self, cell: int, worker: str, digests: npt.NDArray[np.uint64]) -> dict[Id, str]:
        """Ids of those rows, seen just now, that a copy still answers with although it does not know of them, and what
        is wrong.

        A copy's versions of an id only rise while its placement stands still, and no row changes its cell. So what it
        answered with before and answers with afterwards it must also know in between, at that very version and in that
        cell. And no view of it shows two rows of one id.
        """
        if not len(digests):
            return {}
        ids = await self._ids_of(cell, {worker: digests}, deep=False)
        twice = {row_id for row_id, times in Counter(ids).items() if times > 1}
        known = [digests[:0]]
        for start in range(0, len(ids), _AT_ONCE):
            asked = ids[start : start + _AT_ONCE]
            answer = await self.ask(worker, "heard", ids=asked, required=[], deadline_s=self.left())
            known.append(_known_digests(asked, heard_from_wire(answer["heard"]), cell, self.state.spec.ids))
        unknown = np.setdiff1d(digests, np.concatenate(known))
        astray = await self._ids_of(cell, {worker: unknown}, deep=False)
        return dict.fromkeys(twice, "answers with two rows of it") | dict.fromkeys(
            astray, "answers with a row of it that it does not know of"
        )

    async def _odd(self, cell: int, *, deep: bool) -> dict[str, npt.NDArray[np.uint64]]:
        """By worker, digests of rows of one cell that are not everywhere where they should be; the first 20,000."""
        answers = await self._everyone("row_digests", cell=cell, deep=deep)
        digests = {
            worker: np.frombuffer(answer["digests"], dtype="<u8").astype(np.uint64)
            for worker, answer in answers.items()
        }
        serving = [worker for worker in self.state.serving.get(cell, ()) if worker in self.state.active]
        allowed = {worker: some for worker, some in digests.items() if worker in serving or len(some)}
        return {worker: some[:_MOST] for worker, some in odd_digests(allowed, serving).items() if len(some)}

    async def _ids_of(self, cell: int, digests: Mapping[str, npt.NDArray[np.uint64]], *, deep: bool) -> list[Id]:
        found: list[Id] = []
        for worker, some in digests.items():
            if len(some):
                wanted = some.astype("<u8").tobytes()
                answer = await self.ask(worker, "ids_of_digests", cell=cell, digests=wanted, deep=deep)
                found += answer["ids"]
        return found

    async def _judge(self, cell: int, ids: Sequence[Id]) -> None:
        """Ask all copies about some ids until each is certain."""
        open_ids = list(ids)
        required: dict[int, int] = {}
        first: dict[Id, Heard] = {}
        while open_ids:
            answers = await self._everyone(
                "heard", ids=open_ids, required=offsets_to_wire(required), deadline_s=self.left()
            )
            marks = {worker: offsets_from_wire(answer["applied"]) for worker, answer in answers.items()}
            heard = {worker: heard_from_wire(answer["heard"]) for worker, answer in answers.items()}
            ends = await self._ends()
            waiting, agreed = [], []
            for at, row_id in enumerate(open_ids):
                here = {worker: each[at] for worker, each in heard.items()}
                judged = judge(here, marks, ends, self.state)
                if judged.faults:
                    self._find(cell, row_id, judged)
                elif not judged.wait_for or (row_id in first and _overtaken(here, first[row_id])):
                    agreed.append(row_id)
                else:
                    best = newest([each for each in here.values() if each is not None])
                    if best is not None:
                        first.setdefault(row_id, best)
                    waiting.append(row_id)
                    for tp, offset in judged.wait_for.items():
                        required[tp] = max(required.get(tp, 0), offset)
            if self._deep and agreed:
                await self._compare_content(cell, agreed)
            open_ids = waiting
            if waiting and time.monotonic() >= self._until:
                self.unclear |= dict.fromkeys(waiting, "records of it were under way all the time")
                return

    def _find(self, cell: int, row_id: Id, judged: Judgement) -> None:
        self.found[row_id] = judged
        self.cells.setdefault(cell if judged.cell is None else judged.cell, set()).add(row_id)

    async def _compare_content(self, cell: int, ids: Sequence[Id]) -> None:
        """Vectors and attributes of rows at equal versions; of texts that were encoded twice the last bits differ."""
        answers = await self._everyone("get", ids=list(ids), vectors=True, required=[], deadline_s=self.left())
        rows = {worker: rows_from_wire(answer["rows"]) for worker, answer in answers.items()}
        for at, row_id in enumerate(ids):
            here = {worker: each[at] for worker, each in rows.items()}
            by_version: dict[tuple[int, int], dict[str, StoredRow]] = {}
            for worker, row in here.items():
                if row is None:
                    continue
                by_version.setdefault((row.topic_partition, row.offset), {})[worker] = row
            for same in by_version.values():
                if faults := _contents(same):
                    self._find(cell, row_id, Judgement(faults=faults, cell=next(iter(same.values())).cell))
                    self.content.add(row_id)

    # -- asking --------------------------------------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds that it may still take."""
        return max(0.05, self._until - time.monotonic())

    async def ask(self, worker: str, op: str, **message: Any) -> dict[str, Any]:
        """Ask one worker at the comparison's epoch."""
        name, epoch = self.state.spec.name, self.state.epoch
        return await self._call(worker, op, deadline=self.left() + 0.5, collection=name, epoch=epoch, **message)

    async def _everyone(self, op: str, **message: Any) -> dict[str, dict[str, Any]]:
        active = self.state.active
        answers = await asyncio.gather(*(self.ask(worker, op, **message) for worker in active))
        return dict(zip(active, answers, strict=True))


def _overtaken(here: Mapping[str, Heard | None], first: Heard) -> bool:
    """Has every copy applied something newer than what was in doubt? Then that is gone, whatever it was."""
    return all(one is not None and one.newer_than(first) for one in here.values())


def _known_digests(ids: Sequence[Id], heard: Sequence[Heard | None], cell: int, kind: str) -> npt.NDArray[np.uint64]:
    """The digests of those rows that a copy knows of in this cell."""
    live = [(row_id, one) for row_id, one in zip(ids, heard, strict=True) if one is not None and one.cell == cell]
    partitions = np.array([one.topic_partition for _, one in live], dtype=np.int32)
    offsets = np.array([one.offset for _, one in live], dtype=np.int64)
    return row_digests(hash_ids([row_id for row_id, _ in live], kind), partitions, offsets)


def _contents(same: Mapping[str, StoredRow]) -> dict[str, str]:
    """By worker, how its row differs from the first one's."""
    first, *rest = same.items()
    faults = {}
    for worker, row in rest:
        if row.attributes != first[1].attributes:
            faults[worker] = f"has other attributes than {first[0]}"
        elif row.vector is not None and first[1].vector is not None and not _alike(row.vector, first[1].vector):
            faults[worker] = f"has another vector than {first[0]}"
    return faults


def _alike(left: Any, right: Any) -> bool:
    """Finite, and as near as two encodings of one text are: a cosine of 0.9999 and lengths within one in a hundred."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return False
    far = float(np.linalg.norm(left - right))
    return far <= 0.0142 * max(float(np.linalg.norm(left)), float(np.linalg.norm(right)))
