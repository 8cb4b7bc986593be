"""Asking the workers that hold copies: who comes first, who stands in for one that is slow, and who is avoided."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from headrace.cluster.calls import Call
from headrace.cluster.placement import cover
from headrace.cluster.roles import may_hold
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import ClusterError, ConsistencyTimeout, HeadraceError, StaleEpoch
from headrace.pipeline.hedging import Pace, hedged

__all__ = ["Ask", "Copies", "missed", "shares_of"]

T = TypeVar("T")
Ask = Callable[[str], Awaitable[dict[str, Any]]]
"""Asks one worker, by its address."""

_AVOID = 1.0
_SILENT = 0.05


class Copies:
    """One collection's workers, and what has been learnt of them lately. Belongs to one event loop.

    Parameters
    ----------
    call : callable
        `cluster.calls.call` bound to a connection pool.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._avoid: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._heard: dict[str, float] = {}
        self._unheard: dict[str, float] = {}
        """When a worker was first asked since it was heard last; minus infinity where it could not be reached."""
        self._turn = 0
        self._any_turn = 0

    def in_turn(self, state: CollectionState) -> list[str]:
        """Active workers, another one first each time; those that were slow a moment ago only if there are no others.

        Those that only read the topic are left alone: what they are asked, such as to encode a query, holds it up.
        A count of turns of its own: a search asks twice, and parity would tie each kind of question to one worker.
        """
        active = may_hold(state.active, state.roles)
        kept = ([worker for worker in active if worker not in avoided] for avoided in self._avoided())
        workers = next(filter(None, kept), active)
        self._any_turn += 1
        turn = self._any_turn % max(1, len(workers))
        return [*workers[turn:], *workers[:turn]]

    def fewest(self, state: CollectionState) -> list[str]:
        """The fewest workers that together hold every cell, ties in turn; none where a cell has no copy to be read."""
        self._turn += 1
        return self._cover(state, state.cells, frozenset())

    def asking(self, op: str, until: float, **message: Any) -> Ask:
        """What asks a worker, until a moment (monotonic)."""
        return lambda worker: self.ask(worker, op=op, until=until, **message)

    async def ask(self, worker: str, *, op: str, until: float, **message: Any) -> dict[str, Any]:
        """The answer of one worker; one that gives none is avoided for a moment.

        Raises
        ------
        ClusterError
            It gave none until `until` (monotonic).
        HeadraceError
            Whatever it answered.
        """
        self._unheard.setdefault(worker, time.monotonic())
        try:
            answer = await self._call(worker, op, deadline=max(0.001, until - time.monotonic()), **message)
            self._heard[worker] = time.monotonic()
            self._unheard.pop(worker, None)
            return answer
        except StaleEpoch:
            self._unheard.pop(worker, None)
            raise
        except ClusterError:
            self._avoid[worker] = time.monotonic() + _AVOID
            self._unheard[worker] = float("-inf")
            raise

    async def ask_first(self, op: str, workers: Sequence[str], ask: Ask) -> dict[str, Any]:
        """The answer of the first of `workers`, or that of the second."""
        return await self._ask_or(op, workers[0], ask, lambda: ask(workers[1]) if len(workers) > 1 else None)

    async def ask_share(
        self, op: str, worker: str, cells: Sequence[int], state: CollectionState, ask: Ask
    ) -> list[dict[str, Any]]:
        """The answer of `worker`, or those of others that hold the same `cells`."""

        async def one(worker: str) -> list[dict[str, Any]]:
            return [await ask(worker)]

        def others() -> Awaitable[list[dict[str, Any]]] | None:
            mine = frozenset([worker])
            instead = self._cover(state, cells, mine)
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
        kept = (cover(cells, state.serving, avoid=some | without, turn=self._turn) for some in self._avoided())
        return next(filter(None, kept), [])

    def _avoided(self) -> tuple[frozenset[str], ...]:
        """Whom to leave alone, as far as that can be: who was slow or silent a moment ago; who is silent; nobody.

        When a worker dies the one that is left was often slow just before, or is now that it answers for both. A slow
        one is better than one that says nothing: to connect to an address where nobody listens takes a second to fail.
        """
        now = time.monotonic()
        self._avoid = {worker: until for worker, until in self._avoid.items() if until > now}
        slow = frozenset(self._avoid)
        return slow, frozenset(w for w in slow if now - self._unheard.get(w, now) > _SILENT), frozenset()


def shares_of(state: CollectionState, workers: Sequence[str]) -> dict[str, list[int]]:
    """For each worker, the cells that no other one of `workers` is asked for."""
    shares: dict[str, list[int]] = {worker: [] for worker in workers}
    for cell in state.cells:
        shares[next(worker for worker in workers if worker in state.serving[cell])].append(cell)
    return shares


def missed(name: str, error: HeadraceError, what: str, deadline: float) -> NoReturn:
    """A deadline has passed, and `error` is the last that was heard until then."""
    if not isinstance(error, ClusterError):
        raise error
    raise ConsistencyTimeout(
        f"collection {name!r}: {what} within {deadline:.3g} s: {error}; wait longer (deadline=), and see in "
        "status() who does not answer"
    ) from error
