"""Reading from copies: what they must have applied, whether their answers fit together, and when to try again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.cluster.calls import Call
from headrace.cluster.state import CollectionState
from headrace.cluster.wire import offsets_from_wire, offsets_to_wire
from headrace.gpu.errors import (
    BrokerError,
    ClusterError,
    CollectionNotFound,
    ConsistencyTimeout,
    FilterError,
    StaleEpoch,
)
from headrace.gpu.filters import Filter, parse
from headrace.pipeline.consistency import consistency_of
from headrace.pipeline.copies import Ask, Copies, missed, shares_of
from headrace.pipeline.cuts import ahead, common, left_behind
from headrace.pipeline.known_state import KnownState
from headrace.pipeline.results import Consistency
from headrace.pipeline.waiting import GRACE, wait_everywhere
from headrace.streams.topic_identity import another

__all__ = ["Router", "consistency_of"]

_TORN = 0.25
_BACK = frozenset({"search", "count"})
"""Calls that a worker can answer from a moment that has passed."""
_STEPS_BACK = 3
_KAFKA_SHARE = 0.8
"""Of a deadline, what Kafka may take to say how far the topic goes: so a worker that waits for it can still say so."""


class Router:
    """One collection as a client sees it: its newest state and the workers that answer. Belongs to one event loop.

    `KnownState` knows who there is, `Copies` asks them; here is what a read needs of both, and when it is over.

    Parameters
    ----------
    name : str
        The collection's.
    call : callable
        `cluster.calls.call` bound to a connection pool.
    scheduler : str
        Its address.
    """

    def __init__(self, name: str, call: Call, scheduler: str) -> None:
        self.name = name
        self._known = KnownState(name, call, scheduler)
        self._copies = Copies(call)

    # Not async: a read is not to go through one coroutine more for each of these.

    def state(self, *, newest: bool = False, deadline: float = 5.0) -> Coroutine[Any, Any, CollectionState]:
        """See `KnownState.get`."""
        return self._known.get(newest=newest, deadline=deadline)

    def known(self) -> Coroutine[Any, Any, CollectionState]:
        """See `KnownState.known`."""
        return self._known.known()

    def wait_everywhere(self, required: Mapping[int, int], deadline: float) -> Coroutine[Any, Any, None]:
        """See `waiting.wait_everywhere`."""
        return wait_everywhere(self._known, self._copies, required, deadline)

    @property
    def topic_id(self) -> str:
        """Kafka's id of the collection's topic, as far as it is known here; "" if it is not."""
        return self._known.topic_id

    def forget(self) -> None:
        """Look at the scheduler's state again before anything else is done."""
        self._known.forget()

    def close(self) -> None:
        """Ask for nothing any more."""
        self._known.close()

    async def filter(self, text: str | None, required: Mapping[int, int], deadline: float) -> Filter | None:
        """Read a filter by the columns that the collection has once `required` has been applied; None stays None.

        Raises
        ------
        FilterError
            It cannot be read. A column that is not known yet is asked for once more: a record may just have brought it.
        ConsistencyTimeout
            As `wait_everywhere`.
        """
        if text is None:
            return None
        until = time.monotonic() + deadline
        with contextlib.suppress(FilterError):
            return parse(text, (await self._known.known()).schema)
        if required:
            with contextlib.suppress(FilterError):
                return parse(text, (await self._known.get(newest=True)).schema)
            await self.wait_everywhere(required, max(0.001, until - time.monotonic()))
        return parse(text, (await self._known.get(newest=True)).schema)

    async def required(self, consistency: Consistency, session: Mapping[int, int], deadline: float) -> dict[int, int]:
        """The offsets that a read of this consistency must have applied.

        Raises
        ------
        ConsistencyTimeout
            Kafka did not say how far the topic goes, or no worker answered.
        """
        level, staleness = consistency_of(consistency)
        if level == "eventual":
            return {}
        if level == "session":
            return dict(session)
        topic_id = self.topic_id
        try:
            answer = await self.ask_any("offsets", deadline, max_age=staleness, deadline_s=_KAFKA_SHARE * deadline)
        except BrokerError as error:
            raise ConsistencyTimeout(
                f"collection {self.name!r}: consistency {level!r} needs to know how far the topic goes, and {error}; "
                "'session' and 'eventual' do not ask"
            ) from error
        ends = offsets_from_wire(answer["offsets"])
        if self._known.epoch < answer.get("epoch", 0):
            # Where the topic was made anew, an older state's copies would take its offsets for those of the old one.
            try:
                await self._known.get(newest=True, deadline=deadline)
            except ClusterError as error:
                missed(self.name, error, "the newest state was not told", deadline)
        if level == "strong" and not another(topic_id, self.topic_id):  # else the session was with the old one
            # Behind an open transaction the topic seems to end before what this client knows to be there.
            ends |= {tp: max(offset, ends.get(tp, 0)) for tp, offset in session.items()}
        return ends

    async def ask_any(self, op: str, deadline: float, **message: Any) -> dict[str, Any]:
        """Ask one active worker, another if it is slow or does not answer.

        Raises
        ------
        ConsistencyTimeout
            None answered within `deadline` seconds.
        """
        until = time.monotonic() + deadline
        while True:
            state = await self._known.known()
            workers = self._copies.in_turn(state)
            try:
                if not workers:
                    raise ClusterError(f"collection {self.name!r} has no active worker at the moment")
                ask = self._copies.asking(op, until, collection=self.name, **message)
                return await self._copies.ask_first(op, workers, ask)
            except (ClusterError, CollectionNotFound) as error:
                if time.monotonic() >= until:
                    missed(self.name, error, f"no worker answered '{op}'", deadline)
                await self._known.look_again(until)

    async def ask_cover(
        self,
        op: str,
        deadline: float,
        required: Mapping[int, int],
        *,
        waits: bool = True,
        complete: Callable[[list[dict[str, Any]]], bool] | None = None,
        **message: Any,
    ) -> list[dict[str, Any]]:
        """Ask the fewest workers that together hold every cell; all answers are of one epoch and fit together (`cuts`).

        A worker that is slow or does not answer is stood in for by others that hold its share of the cells. Where a
        row was on its way between two that were asked, who is ahead is asked for its answer of a moment ago; where that
        does not help, all are asked again. A read that is not to wait (`waits`) makes do with answers that do not fit
        together if one of them stays behind for longer than `_TORN` seconds.

        Parameters
        ----------
        complete : callable, optional
            Tells of answers that lack nothing: they need not fit together.

        Raises
        ------
        ConsistencyTimeout
            A worker had not applied `required` in time, or no set of copies answered within `deadline` seconds.
        """
        until = time.monotonic() + deadline
        cover = await self._ask_cover(op, until, required, message)
        torn_until = until if waits else min(until, time.monotonic() + _TORN)
        while left_behind(cover.offsets) and not (complete and complete(cover.all)):
            if op in _BACK:
                await self._step_back(cover, op, torn_until, required, message)
            if not (behind := left_behind(cover.offsets)):
                break
            needed = {tp: max(offset, behind.get(tp, 0)) for tp, offset in ({**behind, **required}).items()}
            try:
                cover = await self._ask_cover(op, torn_until, needed, message)
            except ConsistencyTimeout:
                if waits:
                    raise
                break
        return cover.all

    async def _step_back(
        self, cover: _Cover, op: str, until: float, required: Mapping[int, int], message: Mapping[str, Any]
    ) -> None:
        """Have those that are ahead of the others answer from a moment when they were not, as long as they know it."""
        for _ in range(_STEPS_BACK):
            cut = common(cover.offsets)
            some = [worker for worker in cover.answers if cover.is_ahead(worker, cut)]
            ask = self._asking(op, until, cover.state, required, {**message, "cut": offsets_to_wire(cut)})
            try:
                await self._ask_shares(cover, op, some, ask)
            except (ClusterError, CollectionNotFound, ConsistencyTimeout):
                return  # all are asked again, under the newest state
            if any(cover.is_ahead(worker, cut) for worker in some) or not left_behind(cover.offsets):
                return

    def _asking(
        self, op: str, until: float, state: CollectionState, required: Mapping[int, int], message: Mapping[str, Any]
    ) -> Ask:
        return self._copies.asking(
            op,
            until + (GRACE if required else 0.0),
            collection=self.name,
            epoch=state.epoch,
            incarnation=state.incarnation,
            required=offsets_to_wire(required),
            **message,
            deadline_s=max(0.001, until - time.monotonic()),
        )

    async def _ask_shares(self, cover: _Cover, op: str, workers: Sequence[str], ask: Ask) -> None:
        asked = (self._copies.ask_share(op, worker, cover.shares[worker], cover.state, ask) for worker in workers)
        answers = await asyncio.gather(*asked)
        cover.answers.update(zip(workers, answers, strict=True))
        # Who was lost is no matter of those that are left, so they answer: but the next read should not look for it.
        self._known.heard_of(max((answer.get("epoch", -1) for some in answers for answer in some), default=-1))

    async def _ask_cover(
        self, op: str, until: float, required: Mapping[int, int], message: Mapping[str, Any]
    ) -> _Cover:
        deadline, refused = until - time.monotonic(), False
        while True:
            state = await self._known.known()
            workers = self._copies.fewest(state)
            try:
                if not workers:
                    raise ClusterError(f"some cells of collection {self.name!r} have no copy that can be read")
                cover = _Cover(state, shares_of(state, workers), {})
                await self._ask_shares(cover, op, workers, self._asking(op, until, state, required, message))
                if (told := cover.newer_than_some) is None or time.monotonic() >= until:
                    return cover
                # Who has not heard of it may be one that was given up: stopped for a while, it lacks all since then.
                await self._known.renew(until)
                if self._known.epoch < told:
                    return cover
            except (ClusterError, CollectionNotFound) as error:
                if time.monotonic() >= until:
                    missed(self.name, error, f"not all cells had a copy that answered '{op}'", deadline)
                # Who refuses knows a newer state. Only once: a scheduler that has just begun may not know it yet.
                refused, at_once = isinstance(error, StaleEpoch), isinstance(error, StaleEpoch) and not refused
                await self._known.look_again(until, at_once=at_once)

    async def ask_all(self, op: str, deadline: float, **message: Any) -> list[dict[str, Any]]:
        """Ask every member, joining ones too."""
        state = await self._known.get(newest=True)
        until = time.monotonic() + deadline
        return list(
            await asyncio.gather(
                *(
                    self._copies.ask(worker, op=op, until=until, collection=self.name, **message)
                    for worker in state.members
                )
            )
        )


@dataclass(frozen=True, slots=True)
class _Cover:
    """Workers that were asked for all cells under one state: the share of each, and its answers, or others' for it."""

    state: CollectionState
    shares: Mapping[str, list[int]]
    answers: dict[str, list[dict[str, Any]]]

    @property
    def all(self) -> list[dict[str, Any]]:
        return [answer for some in self.answers.values() for answer in some]

    @property
    def offsets(self) -> list[tuple[dict[int, int], dict[int, int]]]:
        return [(_offsets(answer, "applied"), _offsets(answer, "moved")) for answer in self.all]

    @property
    def newer_than_some(self) -> int | None:
        """An epoch newer than was asked for that some of the workers go by, and some do not; None if there is none."""
        epochs = {answer.get("epoch", self.state.epoch) for answer in self.all}
        return max(epochs) if len(epochs) > 1 and max(epochs) > self.state.epoch else None

    def is_ahead(self, worker: str, cut: Mapping[int, int]) -> bool:
        return any(ahead(_offsets(answer, "moved"), cut) for answer in self.answers[worker])


def _offsets(answer: Mapping[str, Any], name: str) -> dict[int, int]:
    return offsets_from_wire(answer.get(name, ()))
