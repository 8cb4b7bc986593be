"""Reading from copies: which workers to ask, what they must have applied, and what to do when one does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

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
    StaleEpoch,
)
from headrace.gpu.filters import Filter, parse
from headrace.pipeline import config
from headrace.pipeline.hedging import Pace, hedged, let_go
from headrace.pipeline.results import Bounded, Consistency

__all__ = ["Router", "consistency_of"]

T = TypeVar("T")
Ask = Callable[[str], Awaitable[dict[str, Any]]]

_STATE_AGE = 1.0
_AVOID = 1.0
_PAUSE = 0.01


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
        self._avoid: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._turn = 0
        self._any_turn = 0

    async def state(self, *, newest: bool = False, deadline: float = 5.0) -> CollectionState:
        """The collection's state, at most a second old; asked for now if `newest`."""
        if self._state is None or newest or time.monotonic() - self._state_at > _STATE_AGE:
            epoch = -1 if self._state is None else self._state.epoch
            try:
                answer = await self._call(
                    self._scheduler, "describe", deadline=deadline, collection=self.name, epoch=epoch
                )
            except ClusterError:
                if self._state is None or newest:
                    raise
                return self._state  # reads go on while the scheduler is away
            if answer["state"] is not None:
                new = CollectionState.from_wire(answer["state"])
                if self._state is not None and new.spec.uid != self._state.spec.uid:
                    raise CollectionNotFound(
                        f"collection {self.name!r} was dropped and another was made under its name: open it again with "
                        f"collection({self.name!r})"
                    )
                self._state = new
            assert self._state is not None
            self._state = self._state.with_(schema=dict(answer["schema"]), alarms=tuple(answer["alarms"]))
            self._state_at = time.monotonic()
        assert self._state is not None
        return self._state

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
            return parse(text, (await self.state()).schema)
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
            Kafka did not say how far the topic goes.
        """
        level, staleness = consistency_of(consistency)
        if level == "eventual":
            return {}
        if level == "session":
            return dict(session)
        try:
            answer = await self.ask_any("offsets", deadline, max_age=staleness)
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
        """Ask one active worker, another if it is slow or does not answer."""
        until = time.monotonic() + deadline
        while True:
            state = await self.state()
            workers = [worker for worker in state.active if worker not in self._avoided()] or list(state.active)
            self._any_turn += 1  # a count of its own: a search asks twice, and parity would tie each kind to one worker
            try:
                if not workers:
                    raise ClusterError(f"collection {self.name!r} has no active worker at the moment")
                turn = self._any_turn % len(workers)
                ask = self._asking(op, until, collection=self.name, **message)
                return await self._ask_first(op, [*workers[turn:], *workers[:turn]], ask)
            except (ClusterError, CollectionNotFound):
                if time.monotonic() >= until:
                    raise
                await self._look_again(until)

    async def ask_cover(
        self, op: str, deadline: float, required: Mapping[int, int], **message: Any
    ) -> list[dict[str, Any]]:
        """Ask the fewest workers that together hold every cell; all answers are of one epoch.

        A worker that is slow or does not answer is stood in for by others that hold its share of the cells.

        Raises
        ------
        ConsistencyTimeout
            A worker had not applied `required` in time.
        ClusterError
            No set of copies answered within `deadline` seconds.
        """
        until = time.monotonic() + deadline
        wanted = offsets_to_wire(required)
        while True:
            state = await self.state()
            self._turn += 1
            workers = self._cover(state, state.cells, frozenset()) or cover(
                state.cells, state.serving, avoid=frozenset(), turn=self._turn
            )
            try:
                if not workers:
                    raise ClusterError(f"some cells of collection {self.name!r} have no copy that can be read")
                ask = self._asking(
                    op,
                    until + 0.5,  # the worker itself keeps the deadline, and says what was missing
                    collection=self.name,
                    epoch=state.epoch,
                    required=wanted,
                    **message,
                    deadline_s=max(0.001, until - time.monotonic()),
                )
                shares = self._shares(state, workers)
                answers = await asyncio.gather(*(self._ask_share(op, w, shares[w], state, ask) for w in workers))
                return [answer for some in answers for answer in some]
            except (ClusterError, CollectionNotFound):
                if time.monotonic() >= until:
                    raise
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
            instead = self._cover(state, cells, frozenset([worker]))
            return asyncio.gather(*(ask(other) for other in instead)) if instead else None

        return await self._ask_or(op, worker, one, others)

    async def _ask_or(
        self, op: str, worker: str, ask: Callable[[str], Awaitable[T]], others: Callable[[], Awaitable[T] | None]
    ) -> T:
        pace = self._paces.setdefault(op, Pace())
        began = time.monotonic()
        answer, by_others = await hedged(lambda: ask(worker), others, pace.patience, pace.may_hedge)
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
        """Return once every copy that is read has applied `required`; copies that die meanwhile no longer count.

        Raises
        ------
        ConsistencyTimeout
            As `ask_cover`.
        ClusterError
            The workers could not be asked within `deadline` seconds.
        """
        until = time.monotonic() + deadline
        wanted = offsets_to_wire(required)
        newest = False
        while True:
            state = await self.state(newest=newest)
            left = max(0.001, until - time.monotonic())
            try:
                ask = self._asking("wait", until + 0.5, collection=self.name, required=wanted, deadline_s=left)
                await self._all_that_count({worker: asyncio.ensure_future(ask(worker)) for worker in state.active})
            except (ClusterError, CollectionNotFound):
                if time.monotonic() >= until:
                    raise
                await self._look_again(until)
                newest = True
                continue
            # A copy that has begun to be read meanwhile has to have them too.
            after = await self.state(newest=True)
            if set(after.active) <= set(state.active):
                return

    async def _all_that_count(self, asked: dict[str, asyncio.Future[dict[str, Any]]]) -> None:
        """Return when all have answered but those that are read no longer: one that hangs never would."""
        try:
            while asked:
                await asyncio.wait(asked.values(), timeout=_STATE_AGE, return_when=asyncio.FIRST_COMPLETED)
                for worker in [worker for worker, answer in asked.items() if answer.done()]:
                    asked.pop(worker).result()
                if asked:
                    active = (await self.state()).active
                    for worker in asked.keys() - set(active):
                        let_go(asked.pop(worker))
        finally:
            for answer in asked.values():
                let_go(answer)

    def _asking(self, op: str, until: float, **message: Any) -> Ask:
        return lambda worker: self._ask(worker, op=op, until=until, **message)

    async def _ask(self, worker: str, *, op: str, until: float, **message: Any) -> dict[str, Any]:
        try:
            return await self._call(worker, op, deadline=max(0.001, until - time.monotonic()), **message)
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
