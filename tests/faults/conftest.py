"""Clusters that may be broken, one for each module, and the waiting that follows a fault."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import headrace
from benchmarks.fault_cluster import SchedulerProcess
from benchmarks.fault_scenes import Scene
from headrace.pipeline.client import Collection, Database

log = logging.getLogger("tests.faults")

Quiet = Callable[..., dict[str, Any]]
Kept = Callable[[Scene], None]


@pytest.fixture(autouse=True)
def what_was_killed_is_forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dask leaves a socket to a scheduler that was killed to the collector, whose warning would hit another test."""
    yield
    if request.node.get_closest_marker("slow"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@pytest.fixture
def scheduler() -> Iterator[SchedulerProcess]:
    """One in a process of its own, without workers."""
    running = SchedulerProcess()
    try:
        running.wait()
        yield running
    finally:
        running.end()


@pytest.fixture
def kept() -> Kept:
    """Every promise of a scene was kept; its figures go into the log, whatever they are."""

    def check(scene: Scene) -> None:
        for name, figure in scene.figures.items():
            log.info("%s: %s: %s", scene.fault, name, figure)
        assert not scene.broken, "; ".join(scene.broken)

    return check


@pytest.fixture(scope="module")
def processes() -> Iterator[Database]:
    """Two worker processes, which Dask's nannies start again when they die."""
    with headrace.connect(workers=2, processes=True, backend="host") as db:
        yield db


@pytest.fixture(scope="session")
def until_quiet() -> Quiet:
    """Wait until nothing is under way and nothing is missing; gives the status then."""

    def wait(collection: Collection, *, workers: int, deadline: float = 60.0, ignore: bool = False) -> dict[str, Any]:
        """`ignore` alarms, which a collection keeps until it is dropped."""
        until = time.monotonic() + deadline
        while True:
            status = collection.status()
            active = [worker for worker in status["workers"] if worker["state"] == "active"]
            missing = status["notes"] or (status["alarms"] and not ignore)
            if len(active) == len(status["workers"]) == workers and not (
                missing or status["moving"] or status["ingest"]["lag"]
            ):
                return status
            assert time.monotonic() < until, f"not quiet after {deadline:g} s: {status}"
            time.sleep(0.05)

    return wait
