"""Dynamic batching: single queries that come while the device is busy are searched together.

One search of 32 queries costs far less than 32 searches of one: the calls, the copies and the locks are paid once, and
an index library shares what it reads among the queries of a batch. Waiting for company would cost a lone query its
time, so nothing waits while the device is free: what collects while it is busy is the next batch. The busier it is, the
larger they get.

Queries that may be searched together are, one batch after the other: two halves side by side came to fewer queries/s
than one whole, on two cores too, where the library has threads of its own. Only what cannot be searched together runs
at the same time, so that a slow filter does not hold up all others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["GatherSettings", "Gatherer"]

K = TypeVar("K", bound=Hashable)
A = TypeVar("A")

Queries = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GatherSettings:
    """How queries are gathered.

    Attributes
    ----------
    at_once : int
        Searches that run at the same time, of different keys.
    most : int
        Queries in one batch, at most. A call that brings as many is searched by itself. 1: nothing is gathered.
    window : float
        Seconds that a query which came while the device was busy waits for others at least, unless `most` have come
        before. One that came while it was free never waits.
    """

    at_once: int = 2
    most: int = 64
    window: float = 0.0


@dataclass(frozen=True, slots=True)
class _Kind(Generic[K]):
    """What queries of one batch have in common; calls that are batches themselves have nobody wait for them."""

    key: K
    dim: int
    whole: bool


@dataclass(slots=True)
class _Waiting(Generic[A]):
    queries: Queries
    answer: asyncio.Future[Sequence[A]]


@dataclass(slots=True)
class _Group(Generic[A]):
    not_before: float
    members: deque[_Waiting[A]]


class Gatherer(Generic[K, A]):
    """Gathers the queries of many callers into batches of equal keys.

    Parameters
    ----------
    search : callable
        ``await search(key, queries)`` with float32 (q, dim) gives a sequence of q answers.
    settings : GatherSettings, optional

    Attributes
    ----------
    searches, queries : int
        Searches that have begun, and the queries in them.

    Notes
    -----
    Belongs to one event loop. Whoever has waited longest decides which key comes next, so that no key starves; within
    a key the order is that of coming. A caller that is cancelled leaves the others alone; an error reaches those
    whose queries were searched together, and nobody else.
    """

    def __init__(
        self, search: Callable[[K, Queries], Awaitable[Sequence[A]]], settings: GatherSettings | None = None
    ) -> None:
        self._search, self._settings = search, settings or GatherSettings()
        self._groups: dict[_Kind[K], _Group[A]] = {}
        self._running: set[_Kind[K]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.searches = self.queries = 0

    async def search(self, key: K, queries: Queries) -> Sequence[A]:
        """The answers to `queries`, float32 (q, dim); raises what the search raises.

        Parameters
        ----------
        key : hashable
            Only queries with equal keys, of equal length, are searched together.
        """
        waiting: _Waiting[A] = _Waiting(queries, asyncio.get_running_loop().create_future())
        kind = _Kind(key, queries.shape[1], len(queries) >= self._settings.most)
        group = self._groups.get(kind)
        if group is None:
            free = self._may_begin(kind)
            group = self._groups[kind] = _Group(0.0 if free else self._now() + self._settings.window, deque())
        group.members.append(waiting)
        self._go_on()
        return await waiting.answer

    @property
    def waiting(self) -> int:
        """Calls that no search has begun for."""
        return sum(len(group.members) for group in self._groups.values())

    def _go_on(self) -> None:
        """Begin as many searches as may run."""
        for kind, group in list(self._groups.items()) if self._room else ():
            if not self._may_begin(kind):
                continue
            wait = group.not_before - self._now()
            if wait > 0 and sum(len(member.queries) for member in group.members) < self._settings.most:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(wait, self._time_is_up)
                continue
            del self._groups[kind]
            batch = self._take(group)
            if group.members:  # behind those that came before what is left of it
                self._groups[kind] = _Group(0.0, group.members)
            if batch:
                self._begin(kind, batch)

    @property
    def _room(self) -> bool:
        return len(self._tasks) < self._settings.at_once

    def _may_begin(self, kind: _Kind[K]) -> bool:
        """Is the device free for a search of this kind? Single queries wait for the batch that is under way."""
        return self._room and (kind.whole or kind not in self._running)

    def _begin(self, kind: _Kind[K], batch: list[_Waiting[A]]) -> None:
        self._running.add(kind)
        task = asyncio.get_running_loop().create_task(self._run(kind.key, batch))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._finished(kind, task))

    def _take(self, group: _Group[A]) -> list[_Waiting[A]]:
        """The next batch of a group; those that were cancelled while they waited are left out."""
        batch: list[_Waiting[A]] = []
        size = 0
        while group.members:
            member = group.members[0]
            if not member.answer.done():
                if batch and size + len(member.queries) > self._settings.most:
                    break
                batch.append(member)
                size += len(member.queries)
            group.members.popleft()
        return batch

    async def _run(self, key: K, batch: list[_Waiting[A]]) -> None:
        together = batch[0].queries if len(batch) == 1 else np.concatenate([member.queries for member in batch])
        self.searches += 1
        self.queries += len(together)
        try:
            answers = await self._search(key, together)
            if len(answers) != len(together):
                raise RuntimeError(f"{len(together)} queries got {len(answers)} answers")
        except asyncio.CancelledError:
            for member in batch:
                member.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 (it is handed to those who asked)
            for member in batch:
                if not member.answer.done():
                    member.answer.set_exception(error)
            return
        first = 0
        for member in batch:
            if not member.answer.done():
                member.answer.set_result(answers[first : first + len(member.queries)])
            first += len(member.queries)

    def _finished(self, kind: _Kind[K], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._running.discard(kind)  # of a kind that runs twice nobody asks
        self._go_on()

    def _time_is_up(self) -> None:
        self._timer = None
        self._go_on()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
