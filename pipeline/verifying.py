"""`verify`, as a client does it: comparing the copies of a collection, having them mended, and comparing again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from headrace.cluster.calls import Call
from headrace.gpu.errors import ClusterError, CollectionNotFound, ConsistencyTimeout, HeadraceError, StaleEpoch
from headrace.gpu.rows import Id
from headrace.pipeline.comparison import Comparison
from headrace.pipeline.reads import Router
from headrace.pipeline.results import Difference, Verification

__all__ = ["Verifier"]

_SHOWN = 100
_PAUSE = 0.02
_AT_ONCE = 512
_MEND = 256
_MEND_TEXTS = 32
_NEVER_MENDED = 3


class _Unsettled(Exception):
    """The copies could not be compared; why, in one sentence."""


class Verifier:
    """One call of `verify`.

    Parameters
    ----------
    call : Call
    router : Router
    deep : bool
        Compare vectors and attributes too.
    """

    def __init__(self, call: Call, router: Router, *, deep: bool) -> None:
        self._call, self._router, self._deep = call, router, deep
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
            astray = {row_id for ids in one.strays.values() for row_id in ids}
            await self._drop_strays(one)
            why_not |= await self._mend(one, [row_id for row_id in hopeful if row_id not in astray])

    def _told(
        self, one: Comparison, all_found: Mapping[Id, Difference], why_not: Mapping[Id, str], *, repair: bool
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

    async def _compared(self) -> Comparison:
        """One comparison with a placement that held still for it."""
        why = "rows are on the move"
        while True:
            state = await self._router.state(newest=True)
            if not state.moving and state.active:
                try:
                    one = Comparison(self._call, state, self._ends, self._until, deep=self._deep)
                    await one.run()
                    return one
                except (CollectionNotFound, ClusterError) as error:
                    why = str(error)
                except ConsistencyTimeout as error:
                    raise _Unsettled(str(error)) from error
            if time.monotonic() >= self._until:
                raise _Unsettled(why)
            await asyncio.sleep(_PAUSE)

    async def _ends(self) -> dict[int, int] | None:
        """Where the log ends now; None if Kafka does not say."""
        try:
            return await self._router.required("strong", {}, min(2.0, max(0.05, self._until - time.monotonic())))
        except HeadraceError:
            return None

    # -- mending -------------------------------------------------------------------------------------------------------

    async def _drop_strays(self, one: Comparison) -> None:
        """Rid copies of rows that they do not know of; what they lack then is found by the next comparison."""
        for worker, ids in one.strays.items():
            some = list(ids)
            for start in range(0, len(some), _AT_ONCE):
                try:
                    await one.ask(worker, "drop_strays", ids=some[start : start + _AT_ONCE])
                except StaleEpoch:
                    return  # compared again, and found again

    async def _mend(self, one: Comparison, ids: Sequence[Id]) -> dict[Id, str]:
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
                answer = await one.ask(worker, "mend", ids=some, anew=anew, deadline_s=one.left())
            except StaleEpoch:
                await asyncio.sleep(_PAUSE)
                break
            failed |= {by_text[str(row_id)]: why for row_id, why in answer["failed"]}
        return failed
