"""More workers or fewer: those that go are emptied first, and those that come are waited for until they are read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from headrace.gpu.errors import ClusterError, ConfigError

__all__ = ["check", "still_held", "to_close", "until_scaled"]

Status = Mapping[str, Any]
_LOOK = 0.2


def check(cluster: Any, workers: object) -> int:
    """The number of workers that is asked for.

    Raises
    ------
    ConfigError
        It is no whole number, or less than 1.
    ClusterError
        `cluster` is not one that this program started.
    """
    if cluster is None or not hasattr(cluster, "worker_spec"):
        raise ClusterError(
            "only the program that started a cluster can scale it: start more with 'headrace worker ADDRESS', or drain "
            "workers and stop them where they run"
        )
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ConfigError(f"a cluster cannot be scaled to {workers!r} workers: give a whole number, 1 or more")
    return workers


def to_close(cluster: Any, workers: int) -> list[Any]:
    """Dask's names of those that are too many, the newest ones."""
    return list(cluster.worker_spec)[workers:]


def still_held(states: Collection[Status], workers: Collection[str]) -> int | None:
    """Rows that `workers`, which are being drained, still hold in all collections; None once they can go."""
    shares = [share for state in states for share in state["workers"] if share["address"] in workers]
    done = all(share["state"] == "drained" for share in shares) and not any(state["moving"] for state in states)
    return None if done else sum(share.get("rows", 0) for share in shares)


async def until_scaled(
    workers: Callable[[], Awaitable[Collection[str]]],
    states: Callable[[], Awaitable[Collection[Status]]],
    count: int,
    until: float,
) -> None:
    """Return once there are `count` workers and every collection has settled on them.

    Raises
    ------
    ClusterError
        It was not so at `until` (monotonic).
    """
    while True:
        there = set(await workers())
        if len(there) == count and all(_settled(state, there) for state in await states()):
            return
        if time.monotonic() >= until:
            raise ClusterError(f"there are {len(there)} of {count} workers, or rows are on the move; that goes on")
        await asyncio.sleep(_LOOK)


def _settled(state: Status, there: Collection[str]) -> bool:
    members = {share["address"]: share["state"] for share in state["workers"]}
    return members == dict.fromkeys(there, "active") and not state["moving"]
