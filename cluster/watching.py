"""Noticing who has stopped answering, also where nobody needs anything of it.

A write notices a worker that hangs, because it waits for all of them. While nothing is written nobody would, and a
worker that hangs and is the only one to read some topic partitions has just stopped the writes that would tell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from headrace.gpu.errors import ClusterError, HeadraceError

__all__ = ["silent", "watch"]

log = logging.getLogger("headrace.cluster")

Ask = Callable[[str, float], Awaitable[Any]]
"""``await ask(worker, seconds)``: something small; any answer will do, also an error of the worker's own."""

_ONCE_MORE = 0.25


async def silent(ask: Ask, worker: str, patience: float) -> str | None:
    """Why `worker` is held to have stopped: no answer in `patience` seconds, and none when asked once more.

    Once more, because it may be this process that had stalled and whose own clock ran out.
    """
    why = None
    for seconds in (patience, _ONCE_MORE * patience):
        try:
            await ask(worker, seconds)
        except ClusterError as error:
            why = why or str(error)
        except HeadraceError:
            return None
        else:
            return None
    return why


async def watch(
    workers: Callable[[], Collection[str]],
    ask: Ask,
    report: Callable[[str, str], None],
    *,
    every: float,
    patience: float,
) -> None:
    """Ask all `workers` every so many seconds, and `report` who is silent, with the reason; until cancelled."""
    looking: dict[str, asyncio.Task[None]] = {}

    async def look(worker: str) -> None:
        try:
            if why := await silent(ask, worker, patience):
                report(worker, why)
        except Exception:
            log.exception("asking whether %s answers failed; trying again", worker)
        finally:
            looking.pop(worker, None)

    try:
        while True:
            await asyncio.sleep(every)
            # One that hangs is asked one question at a time, and the others meanwhile as often as ever.
            for worker in set(workers()) - looking.keys():
                looking[worker] = asyncio.ensure_future(look(worker))
    finally:
        for task in looking.values():
            task.cancel()
