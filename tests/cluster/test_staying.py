"""Workers that outlive their scheduler: what is asked of Dask, and what becomes of a worker that waits in vain.

That they do outlive it is shown with real processes, in `tests/faults/test_scheduler_killed.py`.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from types import SimpleNamespace
from typing import Any

from headrace.cluster.staying import Staying, unsupported


class Status(Enum):
    running = 1
    closed = 2


class Worker:
    """As much of Dask's as is touched."""

    def __init__(self) -> None:
        self.address, self.status = "tcp://10.0.0.1:4000", Status.running
        self.scheduler = SimpleNamespace(address="tcp://127.0.0.1:1")
        self.plugins: dict[str, str] = {}
        self.connection_args: dict[str, Any] = {}
        self.periodic_callbacks = {name: SimpleNamespace(stop=lambda: None) for name in ("heartbeat", "keep-alive")}
        self.state, self.data = SimpleNamespace(tasks={}), {}
        self.handlers = {"plugin-add": self.plugin_add, "terminate": self.close}
        self.stream_handlers = {"close": self.close}
        self.closed: list[str] = []

    async def close(self, reason: str = "") -> str:
        self.status = Status.closed
        self.closed.append(reason)
        return "OK"

    async def plugin_add(self, plugin: Any, name: str | None = None) -> dict[str, str]:
        self.plugins[str(name)] = plugin
        return {"status": "OK"}


async def nothing() -> None:
    """There is nobody to return to."""


LOST = "worker-handle-scheduler-connection-broken"


def test_a_dask_that_works_otherwise_is_told() -> None:
    assert "distributed 20" in unsupported(Worker())


def test_a_worker_in_its_schedulers_process_has_nothing_to_outlive() -> None:
    worker = Worker()
    worker.address = "inproc://10.0.0.1/1/2"
    assert unsupported(worker) == ""


async def test_it_waits_and_ends_when_its_patience_is_over() -> None:
    worker = Worker()
    staying = Staying(worker, "headrace", nothing, patience=0.3)
    await worker.close(reason=LOST)
    await asyncio.sleep(0.05)
    assert staying.away
    assert not worker.closed
    await worker.close(reason="worker-heartbeat-missing")
    assert not worker.closed
    await asyncio.sleep(0.5)
    assert worker.closed == ["headrace-no-scheduler"]


async def test_who_asks_it_to_close_ends_the_wait() -> None:
    worker = Worker()
    staying = Staying(worker, "headrace", nothing)
    await worker.close(reason=LOST)
    await asyncio.sleep(0.05)
    await worker.handlers["terminate"](reason="nanny-close")
    await asyncio.sleep(0.05)
    assert worker.closed == ["nanny-close"]
    assert not staying.away
    assert worker.stream_handlers["close"] == worker.close


async def test_a_plugin_that_is_handed_out_again_is_not_set_up_again() -> None:
    worker = Worker()
    await worker.plugin_add("first", name="headrace")
    Staying(worker, "headrace", nothing)
    await worker.plugin_add(plugin="second", name="headrace")
    await worker.handlers["plugin-add"](plugin="other", name="other")
    assert worker.plugins == {"headrace": "first", "other": "other"}
