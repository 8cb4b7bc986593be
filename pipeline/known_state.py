"""A collection's state as a client knows it: asked of the scheduler, or of the workers while that is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from headrace.cluster.calls import Call
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import ClusterError, CollectionNotFound, HeadraceError

__all__ = ["STATE_AGE", "KnownState"]

log = logging.getLogger("headrace.pipeline")

STATE_AGE = 1.0
"""Seconds after which a state is looked at again."""
_PAUSE = 0.01
_FETCH_SECONDS = 5.0


class KnownState:
    """The newest state of one collection that this client has heard of. Belongs to one event loop.

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
        self._call, self._scheduler = call, scheduler
        self._state: CollectionState | None = None
        self._state_at = 0.0
        self._away = False
        self._probing: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._gone: CollectionNotFound | None = None

    async def get(self, *, newest: bool = False, deadline: float = 5.0) -> CollectionState:
        """The collection's state, at most a second old, or older while the scheduler is away; asked for now if
        `newest`.
        """
        if self._state is None or newest:
            await self._fetch(deadline)
        elif time.monotonic() - self._state_at > STATE_AGE:
            if self._away and self._state_at > float("-inf"):
                return await self.known()  # it has been waited for once
            with contextlib.suppress(ClusterError):
                await self._fetch(deadline)
        assert self._state is not None
        return self._state

    async def known(self) -> CollectionState:
        """The collection's state as far as it is known here: whoever reads waits for no scheduler.

        What is older than a second is looked at meanwhile, by one call for all. An older state does no harm: a worker
        that knows a newer one says so, and refuses the read where it lacks what an older one promises; then the newest
        is fetched.
        """
        if self._gone is not None:
            gone, self._gone = self._gone, None
            raise gone
        if self._state is None or self._state_at == float("-inf"):
            return await self.get()
        if time.monotonic() - self._state_at > STATE_AGE:
            self._look_soon()
        return self._state

    def heard_of(self, epoch: int) -> None:
        """A worker goes by this epoch: a newer one than is known here is looked at meanwhile."""
        if self._state is not None and epoch > self._state.epoch:
            self._look_soon()

    def _look_soon(self) -> None:
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._look())

    @property
    def epoch(self) -> int:
        """Of the state that is known here; -1 while there is none."""
        return -1 if self._state is None else self._state.epoch

    @property
    def topic_id(self) -> str:
        """Kafka's id of the collection's topic, as far as it is known here; "" if it is not."""
        source = self._state.source if self._state is not None else None
        return "" if source is None else source.topic_id

    def forget(self) -> None:
        """Look at the scheduler's state again before anything else is done."""
        self._state_at = float("-inf")

    def close(self) -> None:
        """Ask for nothing any more."""
        for task in (self._looking, self._probing, self._fetching):
            if task is not None:
                task.cancel()

    async def look_again(self, until: float, *, at_once: bool = False) -> None:
        """Something did not answer: have the newest state after a moment, unless it is past `until` (monotonic).

        `at_once` is for whoever has been told that there is a newer one.
        """
        if not at_once:
            await asyncio.sleep(_PAUSE)
        if time.monotonic() < until:
            await self.renew(until)

    async def renew(self, until: float) -> None:
        """Ask for the newest state, until a moment (monotonic); where nobody tells, what was known is all there is.

        All that ask at the same time share one call: when a placement changes, every read that is under way would ask
        the scheduler, just when it has most to do.
        """
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.ensure_future(self._fetch(_FETCH_SECONDS))
            self._fetching.add_done_callback(lambda done: done.cancelled() or done.exception())
        task = self._fetching
        await asyncio.wait({task}, timeout=max(0.05, until - time.monotonic()))
        error = task.exception() if task.done() and not task.cancelled() else None
        # Where the scheduler is away, the copies that were known may still answer.
        if error is not None and (self._state is None or not isinstance(error, ClusterError)):
            raise error

    async def _fetch(self, deadline: float) -> None:
        asked = {"collection": self.name, "epoch": self.epoch}
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

    async def _look(self) -> None:
        try:
            await self._fetch(_FETCH_SECONDS)
        except CollectionNotFound as error:
            self._gone = error  # the next read says so
        except HeadraceError as error:
            log.info("collection %r: its state is asked for again later: %s", self.name, error)
        finally:
            self._looking = None
