"""Comparing the copies of a collection, and having them mended: `verify`, as a client does it.

From coarse to fine: sums by cell, digests by row of the cells whose sums differ, then the ids themselves, about which
all copies are asked until it is certain that they differ (`headrace.cluster.compare`). Records go on being applied all
the while; only the last step decides, and while it lasts no copy forgets a deletion.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from headrace.gpu.errors import ClusterError, CollectionNotFound, ConsistencyTimeout, HeadraceError, StaleEpoch
from headrace.gpu.ids import hash_ids, row_digests
from headrace.gpu.rows import Id
from headrace.gpu.store import StoredRow
from headrace.pipeline.reads import Router
from headrace.pipeline.results import Difference, Verification

__all__ = ["Verifier"]

_SHOWN = 100
_LOOKS = 3
"""Sums are compared this often before rows are: under load a cell is seldom the same on all copies at one moment."""

_PAUSE = 0.02
_AT_ONCE = 512
_MOST = 20_000
"""Ids of one cell that are looked at in one pass; after a repair there is another."""

_MEND = 256
_MEND_TEXTS = 32
_NEVER_MENDED = 3


class _Unsettled(Exception):
    """The copies could not be compared; why, in one sentence."""


@dataclass(slots=True)
class _Pass:
    """What one comparison has found."""

    state: CollectionState
    found: dict[Id, Judgement] = field(default_factory=dict)
    cells: dict[int, set[Id]] = field(default_factory=dict)
    content: set[Id] = field(default_factory=set)
    unclear: dict[Id, str] = field(default_factory=dict)
    odd: set[int] = field(default_factory=set)
    cut: bool = False


class Verifier:
    """One call of `verify`.

    Parameters
    ----------
    call : Call
    router : Router
    name : str
        Of the collection.
    deep : bool
        Compare vectors and attributes too.
    """

    def __init__(self, call: Call, router: Router, name: str, *, deep: bool) -> None:
        self._call, self._router, self._name, self._deep = call, router, name, deep
        self._until = 0.0

    async def verify(self, *, repair: bool, deadline: float) -> Verification:
        self._until = time.monotonic() + deadline
        all_found: dict[Id, Difference] = {}
        why_not: dict[Id, str] = {}
        tries: dict[Id, int] = {}
        while True:
            try:
                one = await self._compared()
            except _Unsettled as why:
                state = await self._router.state()
                return Verification(
                    False,
                    len(state.cells),
                    0,
                    [f"not compared within {deadline:g} s: {why}"],
                    list(all_found.values())[:_SHOWN],
                    len(all_found),
                )
            for row_id, judged in one.found.items():
                all_found.setdefault(row_id, Difference(row_id, judged.cell, dict(judged.faults)))
            hopeful = [row_id for row_id in one.found if tries.get(row_id, 0) < _NEVER_MENDED and row_id not in why_not]
            if not repair or not hopeful or time.monotonic() >= self._until:
                return self._told(one, all_found, why_not, repair=repair)
            for row_id in hopeful:
                tries[row_id] = tries.get(row_id, 0) + 1
            why_not |= await self._mend(one, hopeful)

    def _told(
        self, one: _Pass, all_found: Mapping[Id, Difference], why_not: Mapping[Id, str], *, repair: bool
    ) -> Verification:
        state = one.state
        copies = sum(len(state.serving[cell]) for cell in state.cells)
        sentences = []
        for cell, ids in sorted(one.cells.items()):
            first = next(iter(ids))
            at_least = "at least " if one.cut else ""
            each = ", ".join(f"{worker} {fault}" for worker, fault in one.found[first].faults.items())
            left = f"; not mended: {why_not[first]}" if first in why_not else ""
            sentences.append(f"cell {cell} differs in {at_least}{len(ids)} ids (of {first!r}: {each}{left})")
        sentences += [
            f"cell {cell} differs in rows that a copy answers with and does not know of: restart its worker"
            for cell in sorted(one.odd)
        ]
        if one.unclear:
            first, why = next(iter(one.unclear.items()))
            sentences.append(f"{len(one.unclear)} ids could not be compared (of {first!r}: {why})")
        repaired = sum(row_id not in one.found and row_id not in one.unclear for row_id in all_found) if repair else 0
        return Verification(
            not sentences,
            len(state.cells),
            copies,
            sentences,
            list(all_found.values())[:_SHOWN],
            len(all_found),
            repaired,
        )

    # -- comparing -----------------------------------------------------------------------------------------------------

    async def _compared(self) -> _Pass:
        """One comparison with a placement that held still for it."""
        why = "rows are on the move"
        while True:
            state = await self._router.state(newest=True)
            if not state.moving and state.active:
                try:
                    return await self._compare(state)
                except (StaleEpoch, CollectionNotFound) as error:
                    why = str(error)
                except ClusterError as error:
                    why = str(error)
                except ConsistencyTimeout as error:
                    raise _Unsettled(str(error)) from error
            if time.monotonic() >= self._until:
                raise _Unsettled(why)
            await asyncio.sleep(_PAUSE)

    async def _compare(self, state: CollectionState) -> _Pass:
        one = _Pass(state)
        cells: set[int] | None = None
        for look in range(_LOOKS):
            if look:
                await asyncio.sleep(_PAUSE)
            answers = await self._everyone(state, "digests", deep=self._deep)
            sums = {
                worker: {cell: (count, total) for cell, count, total in answer["digests"]}
                for worker, answer in answers.items()
            }
            now = set(differing_cells(state, sums))
            # Once equal is enough: then all copies held the same, at whatever each had applied.
            cells = now if cells is None else cells & now
            if not cells:
                return one
        assert cells is not None
        for cell in sorted(cells):
            await self._compare_cell(one, cell)
        return one

    async def _compare_cell(self, one: _Pass, cell: int) -> None:
        state = one.state
        before = await self._odd(state, cell, deep=False)
        ids = dict.fromkeys(await self._ids_of(state, cell, before, deep=False))
        if self._deep:
            ids |= dict.fromkeys(await self._ids_of(state, cell, await self._odd(state, cell, deep=True), deep=True))
        one.cut |= any(len(some) == _MOST for some in before.values())
        await self._everyone(state, "remember", seconds=self._left() + 1.0)
        wanted = [row_id for row_id in ids if row_id not in one.found]
        for start in range(0, len(wanted), _AT_ONCE):
            await self._judge(one, cell, wanted[start : start + _AT_ONCE])
        # A healthy copy may be odd all the while: first it is ahead of another, then behind it.
        after = await self._odd(state, cell, deep=False)
        same = {worker: np.intersect1d(some, after[worker]) for worker, some in before.items() if worker in after}
        strays = await self._unknown(state, cell, {worker: some for worker, some in same.items() if len(some)})
        if strays - one.found.keys() - one.unclear.keys():
            one.odd.add(cell)

    async def _unknown(
        self, state: CollectionState, cell: int, digests: Mapping[str, npt.NDArray[np.uint64]]
    ) -> set[Id]:
        """Ids of those rows, seen just now, that their copies still answer with although they do not know of them.

        A copy's versions of an id only rise while its placement stands still. So what it answered with before and
        answers with afterwards it must also know in between, at that very version.
        """
        strays: set[Id] = set()
        for worker, some in digests.items():
            ids = await self._ids_of(state, cell, {worker: some}, deep=False)
            known = [some[:0]]
            for start in range(0, len(ids), _AT_ONCE):
                asked = ids[start : start + _AT_ONCE]
                answer = await self._ask(worker, "heard", state, ids=asked, required=[], deadline_s=self._left())
                known.append(_known_digests(asked, heard_from_wire(answer["heard"]), state.spec.ids))
            unknown = np.setdiff1d(some, np.concatenate(known))
            strays |= set(await self._ids_of(state, cell, {worker: unknown}, deep=False))
        return strays

    async def _odd(self, state: CollectionState, cell: int, *, deep: bool) -> dict[str, npt.NDArray[np.uint64]]:
        """By worker, digests of rows of one cell that are not everywhere where they should be; the first 20,000."""
        answers = await self._everyone(state, "row_digests", cell=cell, deep=deep)
        digests = {
            worker: np.frombuffer(answer["digests"], dtype="<u8").astype(np.uint64)
            for worker, answer in answers.items()
        }
        serving = [worker for worker in state.serving.get(cell, ()) if worker in state.active]
        allowed = {worker: some for worker, some in digests.items() if worker in serving or len(some)}
        return {worker: some[:_MOST] for worker, some in odd_digests(allowed, serving).items() if len(some)}

    async def _ids_of(
        self, state: CollectionState, cell: int, digests: Mapping[str, npt.NDArray[np.uint64]], *, deep: bool
    ) -> list[Id]:
        found: list[Id] = []
        for worker, some in digests.items():
            if len(some):
                wanted = some.astype("<u8").tobytes()
                answer = await self._ask(worker, "ids_of_digests", state, cell=cell, digests=wanted, deep=deep)
                found += answer["ids"]
        return found

    async def _judge(self, one: _Pass, cell: int, ids: Sequence[Id]) -> None:
        """Ask all copies about some ids until each is certain."""
        state = one.state
        open_ids = list(ids)
        required: dict[int, int] = {}
        first: dict[Id, Heard] = {}
        while open_ids:
            answers = await self._everyone(
                state, "heard", ids=open_ids, required=offsets_to_wire(required), deadline_s=self._left()
            )
            marks = {worker: offsets_from_wire(answer["applied"]) for worker, answer in answers.items()}
            heard = {worker: heard_from_wire(answer["heard"]) for worker, answer in answers.items()}
            ends = await self._ends()
            waiting, agreed = [], []
            for at, row_id in enumerate(open_ids):
                here = {worker: each[at] for worker, each in heard.items()}
                judged = judge(here, marks, ends, state)
                if judged.faults:
                    self._found(one, cell, row_id, judged)
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
                await self._compare_content(one, cell, agreed)
            open_ids = waiting
            if waiting and time.monotonic() >= self._until:
                one.unclear |= dict.fromkeys(waiting, "records of it were under way all the time")
                return

    @staticmethod
    def _found(one: _Pass, cell: int, row_id: Id, judged: Judgement) -> None:
        one.found[row_id] = judged
        one.cells.setdefault(cell if judged.cell is None else judged.cell, set()).add(row_id)

    async def _compare_content(self, one: _Pass, cell: int, ids: Sequence[Id]) -> None:
        """Vectors and attributes of rows at equal versions; of texts that were encoded twice the last bits differ."""
        answers = await self._everyone(
            one.state, "get", ids=list(ids), vectors=True, required=[], deadline_s=self._left()
        )
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
                    self._found(one, cell, row_id, Judgement(faults=faults, cell=next(iter(same.values())).cell))
                    one.content.add(row_id)

    async def _ends(self) -> dict[int, int] | None:
        """Where the log ends now; None if Kafka does not say."""
        try:
            return await self._router.required("strong", {}, min(2.0, self._left()))
        except HeadraceError:
            return None

    # -- mending -------------------------------------------------------------------------------------------------------

    async def _mend(self, one: _Pass, ids: Sequence[Id]) -> dict[Id, str]:
        """Have some ids mended; those that cannot be, and why. A placement that changes meanwhile ends it."""
        state = one.state
        readers = sorted(set(state.readers.values()) & set(state.active))
        if not readers:
            return dict.fromkeys(ids, "nobody reads the topic")
        step = _MEND_TEXTS if state.spec.encoder else _MEND
        by_text = {str(row_id): row_id for row_id in ids}
        failed: dict[Id, str] = {}
        for number, start in enumerate(range(0, len(ids), step)):
            if time.monotonic() >= self._until:
                break
            some = list(ids[start : start + step])
            anew = [row_id in one.content for row_id in some]
            worker = readers[number % len(readers)]
            try:
                answer = await self._ask(worker, "mend", state, ids=some, anew=anew, deadline_s=self._left())
            except StaleEpoch:
                await asyncio.sleep(_PAUSE)
                break
            failed |= {by_text[str(row_id)]: why for row_id, why in answer["failed"]}
        return failed

    # -- asking --------------------------------------------------------------------------------------------------------

    def _left(self) -> float:
        return max(0.05, self._until - time.monotonic())

    async def _ask(self, worker: str, op: str, state: CollectionState, **message: Any) -> dict[str, Any]:
        return await self._call(
            worker, op, deadline=self._left() + 0.5, collection=self._name, epoch=state.epoch, **message
        )

    async def _everyone(self, state: CollectionState, op: str, **message: Any) -> dict[str, dict[str, Any]]:
        answers = await asyncio.gather(*(self._ask(worker, op, state, **message) for worker in state.active))
        return dict(zip(state.active, answers, strict=True))


def _overtaken(here: Mapping[str, Heard | None], first: Heard) -> bool:
    """Has every copy applied something newer than what was in doubt? Then that is gone, whatever it was."""
    return all(one is not None and one.newer_than(first) for one in here.values())


def _known_digests(ids: Sequence[Id], heard: Sequence[Heard | None], kind: str) -> npt.NDArray[np.uint64]:
    """The digests of those rows that a copy knows of."""
    live = [(row_id, one) for row_id, one in zip(ids, heard, strict=True) if one is not None and one.live]
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
