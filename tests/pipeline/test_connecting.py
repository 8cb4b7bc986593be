"""Coming to a cluster whose scheduler goes while it greets, and where nothing can listen."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client, Scheduler
from distributed.comm.core import CommClosedError
from tornado.iostream import StreamClosedError

import headrace
from headrace.gpu.errors import ClusterError, ConfigError
from headrace.pipeline import client_async, config, connecting, encryption
from headrace.pipeline.client_async import AsyncDatabase
from headrace.pipeline.dask_client import PatientClient, connections_may_close
from headrace.pipeline.launch import cannot_listen, dashboard_address

pytestmark = pytest.mark.timeout(120)


class Cutter:
    """Stands before a scheduler, and cuts connections: the first after one piece of what a client says, the next after
    two, and so on up to `pieces`.
    """

    def __init__(self, port: int, cuts: int, pieces: int) -> None:
        self.cuts = 0
        self._port, self._most, self._pieces, self._seen = port, cuts, pieces, 0
        self._tasks: set[asyncio.Task[None]] = set()

    def come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left: float = float("inf")
        if self._seen < self._most:
            self._seen += 1
            left = min(self._seen, self._pieces)
        there, back = await asyncio.open_connection("127.0.0.1", self._port)

        async def answers() -> None:
            while data := await there.read(1 << 16):
                writer.write(data)
            writer.close()

        answering = asyncio.create_task(answers())
        try:
            while left and (data := await reader.read(1 << 16)):
                back.write(data)
                left -= 1
            self.cuts += not left
        finally:
            answering.cancel()
            for side in (writer, back):
                side.transport.abort()
            await asyncio.gather(answering, return_exceptions=True)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def cutting(cuts: int, pieces: int) -> AsyncIterator[tuple[str, Cutter]]:
    config.apply_dask_defaults()
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler:
        cutter = Cutter(int(scheduler.address.rpartition(":")[2]), cuts, pieces)
        server = await asyncio.start_server(cutter.come, "127.0.0.1", 0)
        try:
            yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", cutter
        finally:
            server.close()
            await cutter.end()


async def test_a_scheduler_that_goes_while_it_greets_is_waited_for() -> None:
    async with cutting(6, 6) as (address, cutter), headrace.connect_async(address, timeout=100.0) as db:
        assert await db.collections() == []
        assert cutter.cuts >= 3, "nothing was cut"


async def test_one_that_always_goes_is_told_in_time() -> None:
    async with cutting(1_000_000, 1) as (address, _):
        with pytest.raises(ClusterError, match="no Dask scheduler answers"):
            await headrace.connect_async(address, timeout=0.5)


class Going:
    """As much of a client as plugins are registered with, while its scheduler goes `times` times."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error = times, error
        self.registered: list[str] = []

    async def register_plugin(self, plugin: str) -> None:
        if self.times and plugin == "worker's":
            self.times -= 1
            raise self.error
        self.registered.append(plugin)


@pytest.mark.parametrize("error", [CommClosedError("gone"), OSError("Timed out trying to connect")])
async def test_a_scheduler_that_goes_while_headrace_is_put_on_it(error: Exception) -> None:
    plugins = ["scheduler's", "worker's"]
    client = Going(2, error)
    await connecting._put_on(client, plugins, "tcp://h:1", time.monotonic() + 3600)
    assert client.registered == ["scheduler's", "scheduler's", *plugins]
    with pytest.raises(ClusterError, match="no Dask scheduler answers at tcp://h:1"):
        await connecting._put_on(Going(2, error), plugins, "tcp://h:1", time.monotonic())


@pytest.mark.parametrize("error", [ClusterError("no"), FileNotFoundError("no"), ConfigError("no")])
async def test_what_a_plugin_itself_says_is_not_tried_again(error: Exception) -> None:
    client = Going(1, error)
    with pytest.raises(type(error), match="no"):
        await connecting._put_on(client, ["worker's"], "tcp://h:1", time.monotonic() + 3600)
    assert not client.times


class Refused(PatientClient):
    """One that cannot connect."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass


async def test_a_certificate_that_is_refused_does_not_become_better(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def refuse(*_: object, **__: object) -> None:
        asked.append(1)
        raise CommClosedError("closed") from StreamClosedError(ssl.SSLError(1, "certificate has expired"))

    monkeypatch.setattr(Client, "_ensure_connected", refuse)
    with pytest.raises(CommClosedError) as caught:
        await Refused()._ensure_connected(timeout=3600)
    assert "expired" in encryption.refusal(caught.value)
    assert len(asked) == 1


async def test_a_scheduler_that_has_answered_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(*_: object, **__: object) -> dict[str, Any]:
        return {"names": []}

    monkeypatch.setattr(client_async, "call", answer)
    scheduler = SimpleNamespace(address="tcp://h:1")
    client = SimpleNamespace(status="connecting", losses=1, scheduler=scheduler, rpc=SimpleNamespace())
    db = AsyncDatabase(client)
    for losses in (1, 2):  # Dask's client has not found the next one yet
        client.losses = losses
        with pytest.raises(ClusterError, match="is lost"):
            await db.call("tcp://h:1", "describe", deadline=1)
        assert await db.collections() == []
        await db.call("tcp://h:1", "describe", deadline=1)


def test_connections_that_end_with_a_cluster_are_not_told() -> None:
    dask_log = logging.getLogger("distributed.batched")

    def told(level: int = logging.INFO) -> bool:
        return bool(dask_log.filter(dask_log.makeRecord(dask_log.name, level, __file__, 1, "closed", (), None)))

    with ExitStack() as first, ExitStack() as second:
        first.enter_context(connections_may_close())
        second.enter_context(connections_may_close())
        first.close()
        assert not told()
        assert told(logging.WARNING)
        dask_log.setLevel(logging.INFO)
        try:
            assert told(), "whoever asks for it is told"
        finally:
            dask_log.setLevel(logging.NOTSET)
    assert told()


def test_a_program_that_ends_without_closing_ends_in_order() -> None:
    program = """
import headrace
broker = headrace.EmbeddedBroker(topics={"t": 1})
broker.start()
db = headrace.connect(workers=1, backend="host")
docs = db.create_collection("t", dim=2)
docs.ingest(broker.bootstrap)
docs.upsert({"id": "a", "vector": [1, 2]}, wait="searchable")
print(docs.count())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_why_nothing_can_listen() -> None:
    taken = OSError(errno.EADDRINUSE, "in use")
    hidden = RuntimeError("Scheduler failed to start.")
    hidden.__cause__ = taken
    for error in (taken, hidden):
        assert str(cannot_listen("scheduler", "127.0.0.1", 1, error)).endswith("in use): is the port taken?")
    nobody = str(cannot_listen("cluster", "127.0.0.1", 0, RuntimeError("Nanny failed to start worker process")))
    assert "if __name__ == '__main__'" in nobody
    other = str(cannot_listen("scheduler", "127.0.0.1", 1, RuntimeError("encryption required")))
    assert other == "no scheduler can listen at 127.0.0.1:1 (encryption required)"
    assert "no such address" in str(cannot_listen("x", "1.1.1.1", 1, OSError(errno.EADDRNOTAVAIL, "cannot")))


def test_a_dashboard_s_port_alone_is_for_this_machine() -> None:
    assert dashboard_address(":8787", "127.0.0.1") == "127.0.0.1:8787"
    assert dashboard_address(None, "127.0.0.2") == "127.0.0.2:0"
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1"):
        dashboard_address("10.0.0.1:80", "127.0.0.1")
    for wrong in ("abc", ":abc", ":65536", "127.0.0.1:", ":-1", ":²"):
        with pytest.raises(ConfigError, match="cannot be: give a port"):
            dashboard_address(wrong, "127.0.0.1")


@pytest.mark.parametrize("address", [3, "", "x", "tcp://", "tcp://x", "tcp://h:port", "tcp://h:1/x"])
def test_what_is_no_address(address: object) -> None:
    with pytest.raises(ConfigError, match="no scheduler's address"):
        headrace.connect(address)  # type: ignore[arg-type]
