"""Reading from copies: which workers to ask, what they must have applied, and what to do when one does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from headrace.cluster.calls import Call
from headrace.cluster.placement import cover
from headrace.cluster.state import CollectionState
from headrace.cluster.wire import offsets_from_wire, offsets_to_wire
from headrace.gpu.errors import (
    BrokerError,
    ClusterError,
    CollectionNotFound,
    ConfigError,
    ConsistencyTimeout,
    FilterError,
    HeadraceError,
    StaleEpoch,
)
from headrace.gpu.filters import Filter, parse
from headrace.pipeline import config
from headrace.pipeline.cuts import left_behind
from headrace.pipeline.hedging import Pace, hedged, let_go
from headrace.pipeline.results import Bounded, Consistency

__all__ = ["Router", "consistency_of"]

log = logging.getLogger("headrace.pipeline")

T = TypeVar("T")
Ask = Callable[[str], Awaitable[dict[str, Any]]]

_STATE_AGE = 1.0
_AVOID = 1.0
_PAUSE = 0.01
_TORN = 0.25
_GRACE = 0.5
"""Seconds beyond a read's deadline that an answer may be under way: a worker that waits keeps the deadline itself, and
says what was missing."""
_KAFKA_SHARE = 0.8
"""Of a deadline, what Kafka may take to say how far the topic goes: so a worker that waits for it can still say so."""


def consistency_of(given: Consistency) -> tuple[str, float]:
    """The level and, for "bounded", the staleness in seconds.

    Raises
    ------
    ConfigError
        There is no such level.
    """
    if isinstance(given, Bounded):
        return "bounded", given.staleness / 1e3
    if given == "bounded":
        return "bounded", float(config.get("search.bounded-staleness"))
    if given in ("strong", "session", "eventual"):
        return given, 0.0
    raise ConfigError(
        f"consistency {given!r} is not known: use 'strong', 'session', 'bounded', 'eventual' or headrace.bounded(500)"
    )


class Router:
    """One collection as a client sees it: its newest state and the workers that answer.

    Belongs to one event loop. `call_scheduler` and `call` are `cluster.calls.call` bound to a connection pool.
    """

    def __init__(self, name: str, call: Call, scheduler: str) -> None:
        self.name = name
        self._call, self._scheduler = call, scheduler
        self._state: CollectionState | None = None
        self._state_at = 0.0
        self._away = False
        self._probing: asyncio.Task[None] | None = None
        self._avoid: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._heard: dict[str, float] = {}
        self._turn = 0
        self._any_turn = 0
        self._looking: asyncio.Task[None] | None = None
        self._gone: CollectionNotFound | None = None

    async def state(self, *, newest: bool = False, deadline: float = 5.0) -> CollectionState:
        """The collection's state, at most a second old, or older while the scheduler is away; asked for now if
        `newest`.
        """
        if self._state is None or newest:
            await self._fetch(deadline)
        elif time.monotonic() - self._state_at > _STATE_AGE:
            if self._away and self._state_at > float("-inf"):
                return await self.known()  # it has been waited for once
            with contextlib.suppress(ClusterError):
                await self._fetch(deadline)
        assert self._state is not None
        return self._state

    @property
    def topic_id(self) -> str:
        """Kafka's id of the collection's topic, as far as it is known here; "" if it is not."""
        source = self._state.source if self._state is not None else None
        return "" if source is None else source.topic_id

    async def _fetch(self, deadline: float) -> None:
        epoch = -1 if self._state is None else self._state.epoch
        asked = {"collection": self.name, "epoch": epoch}
        answer: dict[str, Any] | None = None
        if not self._away:
            try:
                answer = await self._call(self._scheduler, "describe", deadline=deadline, **asked)
            except ClusterError:
                if self._state is None:
                    raise
                self._away = True
        if answer is None:
            if self._probing is None or self._probing.done():
                self._probing = asyncio.ensure_future(self._probe())
            answer = await self._told_by_workers(deadline, asked)
        if answer["state"] is not None:
            new = CollectionState.from_wire(answer["state"])
            if self._state is not None and new.spec.uid != self._state.spec.uid:
                raise CollectionNotFound(
                    f"collection {self.name!r} was dropped and another was made under its name: open it again with "
                    f"collection({self.name!r})"
                )
            # A new scheduler may know less than the one before it, until all workers have returned to it.
            if self._state is None or new.epoch >= self._state.epoch:
                self._state = new
        assert self._state is not None
        self._state = self._state.hearing(answer)
        self._state_at = time.monotonic()

    async def _probe(self) -> None:
        """Nobody waits for a scheduler that is away; this sees when it is back."""
        with contextlib.suppress(ClusterError):
            with contextlib.suppress(CollectionNotFound):  # the next to ask is told so
                await self._call(self._scheduler, "describe", deadline=5.0, collection=self.name, epoch=-1)
            self._away = False

    async def _told_by_workers(self, deadline: float, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Only the scheduler changes a state, and it tells all members: the newest that one of them knows counts."""
        assert self._state is not None
        answers = await asyncio.gather(
            *(self._call(worker, "describe", deadline=min(deadline, 1.0), **asked) for worker in self._state.members),
            return_exceptions=True,
        )
        known = [answer for answer in answers if isinstance(answer, dict)]
        if not known:
            raise ClusterError(f"neither the scheduler {self._scheduler} nor a worker of {self.name!r} answers")
        return max(known, key=lambda told: told["state"]["epoch"] if told["state"] else asked["epoch"])

    async def known(self) -> CollectionState:
        """The collection's state as far as it is known here: whoever reads waits for no scheduler.

        What is older than a second is looked at meanwhile, by one call for all. An older state does no harm: a worker
        that knows a newer one refuses the read, and then the newest is fetched.
        """
        if self._gone is not None:
            gone, self._gone = self._gone, None
            raise gone
        if self._state is None or self._state_at == float("-inf"):
            return await self.state()
        if self._looking is None and time.monotonic() - self._state_at > _STATE_AGE:
            self._looking = asyncio.ensure_future(self._look())
        return self._state

    async def _look(self) -> None:
        try:
            await self._fetch(5.0)
        except CollectionNotFound as error:
            self._gone = error  # the next read says so
        except HeadraceError as error:
            log.info("collection %r: its state is asked for again later: %s", self.name, error)
        finally:
            self._looking = None

    def close(self) -> None:
        """Ask for nothing any more."""
        for task in (self._looking, self._probing):
            if task is not None:
                task.cancel()

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
            return parse(text, (await self.known()).schema)
        if required:
            with contextlib.suppress(FilterError):
                return parse(text, (await self.state(newest=True)).schema)
            await self.wait_everywhere(required, max(0.001, until - time.monotonic()))
        return parse(text, (await self.state(newest=True)).schema)

    def forget(self) -> None:
        """Look at the scheduler's state again before anything else is done."""
        self._state_at = float("-inf")

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
        try:
            answer = await self.ask_any("offsets", deadline, max_age=staleness, deadline_s=_KAFKA_SHARE * deadline)
        except BrokerError as error:
            raise ConsistencyTimeout(
                f"collection {self.name!r}: consistency {level!r} needs to know how far the topic goes, and {error}; "
                "'session' and 'eventual' do not ask"
            ) from error
        ends = offsets_from_wire(answer["offsets"])
        if level == "strong":
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
            state = await self.known()
            workers = [worker for worker in state.active if worker not in self._avoided()] or list(state.active)
            self._any_turn += 1  # a count of its own: a search asks twice, and parity would tie each kind to one worker
            try:
                if not workers:
                    raise ClusterError(f"collection {self.name!r} has no active worker at the moment")
                turn = self._any_turn % len(workers)
                ask = self._asking(op, until, collection=self.name, **message)
                return await self._ask_first(op, [*workers[turn:], *workers[:turn]], ask)
            except (ClusterError, CollectionNotFound) as error:
                if time.monotonic() >= until:
                    self._missed(error, f"no worker answered '{op}'", deadline)
                await self._look_again(until)

    async def ask_cover(
        self, op: str, deadline: float, required: Mapping[int, int], *, waits: bool = True, **message: Any
    ) -> list[dict[str, Any]]:
        """Ask the fewest workers that together hold every cell; all answers are of one epoch and fit together (`cuts`).

        A worker that is slow or does not answer is stood in for by others that hold its share of the cells. Where a
        row was on its way between two that were asked, all are asked again; a read that is not to wait (`waits`) makes
        do with answers that do not fit together if one of them stays behind for longer than `_TORN` seconds.

        Raises
        ------
        ConsistencyTimeout
            A worker had not applied `required` in time, or no set of copies answered within `deadline` seconds.
        """
        until = time.monotonic() + deadline
        answers = await self._ask_cover(op, until, required, message)
        torn_until = until if waits else min(until, time.monotonic() + _TORN)
        while behind := left_behind([(_offsets(a, "applied"), _offsets(a, "moved")) for a in answers]):
            needed = {tp: max(offset, behind.get(tp, 0)) for tp, offset in ({**behind, **required}).items()}
            try:
                answers = await self._ask_cover(op, torn_until, needed, message)
            except ConsistencyTimeout:
                if waits:
                    raise
                break
        return answers

    async def _ask_cover(
        self, op: str, until: float, required: Mapping[int, int], message: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        wanted, deadline = offsets_to_wire(required), until - time.monotonic()
        while True:
            state = await self.known()
            self._turn += 1
            workers = self._cover(state, state.cells, frozenset()) or cover(
                state.cells, state.serving, avoid=frozenset(), turn=self._turn
            )
            try:
                if not workers:
                    raise ClusterError(f"some cells of collection {self.name!r} have no copy that can be read")
                ask = self._asking(
                    op,
                    until + (_GRACE if required else 0.0),
                    collection=self.name,
                    epoch=state.epoch,
                    required=wanted,
                    **message,
                    deadline_s=max(0.001, until - time.monotonic()),
                )
                shares = self._shares(state, workers)
                answers = await asyncio.gather(*(self._ask_share(op, w, shares[w], state, ask) for w in workers))
                return [answer for some in answers for answer in some]
            except (ClusterError, CollectionNotFound) as error:
                if time.monotonic() >= until:
                    self._missed(error, f"not all cells had a copy that answered '{op}'", deadline)
                await self._look_again(until)

    async def _ask_first(self, op: str, workers: Sequence[str], ask: Ask) -> dict[str, Any]:
        """The answer of the first of `workers`, or that of the second."""
        return await self._ask_or(op, workers[0], ask, lambda: ask(workers[1]) if len(workers) > 1 else None)

    async def _ask_share(
        self, op: str, worker: str, cells: Sequence[int], state: CollectionState, ask: Ask
    ) -> list[dict[str, Any]]:
        """The answer of `worker`, or those of others that hold the same `cells`."""

        async def one(worker: str) -> list[dict[str, Any]]:
            return [await ask(worker)]

        def others() -> Awaitable[list[dict[str, Any]]] | None:
            mine = frozenset([worker])
            # One that was slow a moment ago is better than nobody.
            instead = self._cover(state, cells, mine) or cover(cells, state.serving, avoid=mine, turn=self._turn)
            return asyncio.gather(*(ask(other) for other in instead)) if instead else None

        return await self._ask_or(op, worker, one, others)

    async def _ask_or(
        self, op: str, worker: str, ask: Callable[[str], Awaitable[T]], others: Callable[[], Awaitable[T] | None]
    ) -> T:
        pace = self._paces.setdefault(op, Pace())
        began = time.monotonic()

        def may_hedge() -> bool:
            # A worker that is busy answers others meanwhile; one that hangs, nobody: all that wait for it must go on.
            return time.monotonic() - self._heard.get(worker, 0.0) >= pace.patience or pace.may_hedge()

        answer, by_others = await hedged(lambda: ask(worker), others, pace.patience, may_hedge)
        if by_others:
            self._avoid[worker] = time.monotonic() + _AVOID
        else:
            pace.took(time.monotonic() - began)
        return answer

    def _cover(self, state: CollectionState, cells: Iterable[int], without: frozenset[str]) -> list[str]:
        return cover(cells, state.serving, avoid=self._avoided() | without, turn=self._turn)

    @staticmethod
    def _shares(state: CollectionState, workers: Sequence[str]) -> dict[str, list[int]]:
        """For each worker, the cells that no other one of `workers` is asked for."""
        shares: dict[str, list[int]] = {worker: [] for worker in workers}
        for cell in state.cells:
            shares[next(worker for worker in workers if worker in state.serving[cell])].append(cell)
        return shares

    async def ask_all(self, op: str, deadline: float, **message: Any) -> list[dict[str, Any]]:
        """Ask every member, joining ones too."""
        state = await self.state(newest=True)
        until = time.monotonic() + deadline
        return list(
            await asyncio.gather(
                *(self._ask(worker, op=op, until=until, collection=self.name, **message) for worker in state.members)
            )
        )

    async def wait_everywhere(self, required: Mapping[int, int], deadline: float) -> None:
        """Return once every copy that is read has applied `required`; copies that die meanwhile no longer count. Where
        no copy of some cell can be read, it waits for one.

        Raises
        ------
        ConsistencyTimeout
            A copy had not applied it in time, did not answer, or there was none.
        """
        until = time.monotonic() + deadline
        wanted = offsets_to_wire(required)
        newest = False
        while True:
            try:
                state = await self.state(newest=newest, deadline=max(0.05, until - time.monotonic()))
                self._check_readable(state)
                left = max(0.001, until - time.monotonic())
                ask = self._asking("wait", until + _GRACE, collection=self.name, required=wanted, deadline_s=left)
                answered = await self._all_that_count({w: asyncio.ensure_future(ask(w)) for w in state.active})
                # A copy that has begun to be read meanwhile has to have them too.
                after = await self.state(newest=True, deadline=max(0.05, until - time.monotonic()))
                self._check_readable(after)
                if answered.issuperset(after.active):
                    return
            except (ClusterError, CollectionNotFound) as error:
                if time.monotonic() >= until:
                    self._missed(error, "not every copy said that it had applied what was asked for", deadline)
                await self._look_again(until)
                newest = True

    def _check_readable(self, state: CollectionState) -> None:
        if not state.active or not all(state.serving.get(cell) for cell in state.cells):
            raise ClusterError(f"some cells of collection {self.name!r} have no copy that can be read")

    async def _all_that_count(self, asked: dict[str, asyncio.Future[dict[str, Any]]]) -> set[str]:
        """Return when all have answered but those that are read no longer: one that hangs never would; and who did."""
        answered = set()
        try:
            while asked:
                await asyncio.wait(asked.values(), timeout=_STATE_AGE, return_when=asyncio.FIRST_COMPLETED)
                for worker in [worker for worker, answer in asked.items() if answer.done()]:
                    asked.pop(worker).result()
                    answered.add(worker)
                if asked:
                    active = (await self.state()).active
                    for worker in asked.keys() - set(active):
                        let_go(asked.pop(worker))
        finally:
            for answer in asked.values():
                let_go(answer)
        return answered

    def _missed(self, error: HeadraceError, what: str, deadline: float) -> NoReturn:
        """A deadline has passed, and `error` is the last that was heard until then."""
        if not isinstance(error, ClusterError):
            raise error
        raise ConsistencyTimeout(
            f"collection {self.name!r}: {what} within {deadline:.3g} s: {error}; wait longer (deadline=), and see in "
            "status() who does not answer"
        ) from error

    def _asking(self, op: str, until: float, **message: Any) -> Ask:
        return lambda worker: self._ask(worker, op=op, until=until, **message)

    async def _ask(self, worker: str, *, op: str, until: float, **message: Any) -> dict[str, Any]:
        try:
            answer = await self._call(worker, op, deadline=max(0.001, until - time.monotonic()), **message)
            self._heard[worker] = time.monotonic()
            return answer
        except StaleEpoch:
            raise
        except ClusterError:
            self._avoid[worker] = time.monotonic() + _AVOID
            raise

    def _avoided(self) -> frozenset[str]:
        now = time.monotonic()
        self._avoid = {worker: until for worker, until in self._avoid.items() if until > now}
        return frozenset(self._avoid)

    async def _look_again(self, until: float) -> None:
        await asyncio.sleep(_PAUSE)
        if time.monotonic() < until:
            try:
                await self.state(newest=True, deadline=max(0.05, until - time.monotonic()))
            except ClusterError:
                if self._state is None:
                    raise
                # The scheduler is away: the copies that were known may still answer.


def _offsets(answer: Mapping[str, Any], name: str) -> dict[int, int]:
    return offsets_from_wire(answer.get(name, ()))
