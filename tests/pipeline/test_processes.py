"""A cluster's processes end when they are told to, also while they are still starting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from headrace.gpu.errors import ClusterError
from headrace.pipeline import processes

pytestmark = pytest.mark.timeout(120)


class Nanny:
    """As much of Dask's as is touched: one whose worker process is never up, because no scheduler answers it."""

    spawned: asyncio.Event

    def __init__(self, *_: object, **__: object) -> None:
        self.process = None
        self.gone = asyncio.Event()

    def __await__(self):  # type: ignore[no-untyped-def]
        return self._start().__await__()

    async def _start(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.process = SimpleNamespace(status=SimpleNamespace(name="starting"), pid=child.pid)
        type(self).spawned.set()
        while child.poll() is None:
            await asyncio.sleep(0.02)
        self.process = None
        self.gone.set()
        raise RuntimeError("Nanny failed to start.")

    async def close(self) -> None:
        await self.gone.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_workers_that_are_still_starting_end(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    Nanny.spawned = asyncio.Event()
    monkeypatch.setattr(distributed, "Nanny", Nanny)
    running = asyncio.create_task(processes.run_workers("tcp://127.0.0.1:1", 2, "127.0.0.1"))
    await Nanny.spawned.wait()
    os.kill(os.getpid(), number)
    await asyncio.wait_for(running, 60)


async def test_a_worker_that_ends_while_it_starts_is_told_apart_from_a_scheduler_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import distributed

    Nanny.spawned = asyncio.Event()
    monkeypatch.setattr(distributed, "Nanny", Nanny)
    monkeypatch.setattr(Nanny, "_start", failing(RuntimeError("it ended")))
    with pytest.raises(ClusterError, match="its process ended"):
        await processes.run_workers("tcp://127.0.0.1:1", 1, "127.0.0.1")
    monkeypatch.setattr(Nanny, "_start", failing(OSError("nobody")))
    with pytest.raises(ClusterError, match="is its scheduler running"):
        await processes.run_workers("tcp://127.0.0.1:1", 1, "127.0.0.1")


def failing(cause: Exception):  # type: ignore[no-untyped-def]
    async def start(self: Nanny) -> None:
        self.gone.set()
        raise RuntimeError("Nanny failed to start.") from cause

    return start


def test_a_process_that_does_not_end_in_order_when_its_parent_has_gone_ends_by_force() -> None:
    program = (
        "import signal, time; from headrace.pipeline import processes; processes._END_SECONDS = 0.2;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); processes.end_with_parent(); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    try:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(60) == 1
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill -9", "its terminal is closed"])
def test_up_that_ends_while_it_starts_leaves_nobody(how: str) -> None:
    import psutil

    up = subprocess.Popen(
        [sys.executable, "-m", "headrace.pipeline.cli", "up", "--port", "0", "--dashboard", ":0"],
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # Who runs the tests by nohup has their children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    everybody: list[psutil.Process] = []
    try:
        end = time.monotonic() + 90
        while not any("spawn_main" in " ".join(argv) for argv in map(arguments, everybody)):
            assert time.monotonic() < end, "no worker process was started"
            time.sleep(0.05)
            everybody = psutil.Process(up.pid).children(recursive=True)
        if how == "kill -9":
            up.kill()
        else:
            os.killpg(up.pid, signal.SIGHUP)
        up.wait()
        _, left = psutil.wait_procs(everybody, timeout=90)
        assert not left, f"{how} left processes behind"
    finally:
        up.kill()
        up.wait()
        for process in everybody:
            if process.is_running():
                process.kill()


def arguments(process: object) -> list[str]:
    import psutil

    assert isinstance(process, psutil.Process)
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
