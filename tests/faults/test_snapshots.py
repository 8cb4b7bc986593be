"""Rows 18 and 19: snapshots that cannot be written, and snapshots that have been damaged; and all workers killed."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.config
import distributed  # noqa: F401  # else its own defaults would go again with SETTINGS
import pytest

import headrace
from headrace.gpu.errors import HeadraceError, SnapshotError
from headrace.pipeline.client import Collection, Database
from headrace.streams.broker import EmbeddedBroker
from tests.faults.test_worker_killed import DIM, SEED, Quiet, Writer, judge, searchable, vector
from tests.history.recorder import Recorder

pytestmark = pytest.mark.slow

log = logging.getLogger("tests.faults")

COMMAND = "pytest tests/faults/test_snapshots.py"
SETTINGS = {
    # Dask would take a worker that is killed again within this time for one that does not come back.
    "distributed.deploy.lost-worker-timeout": "1h",
    "headrace.store.seal-rows": 300,
    "headrace.codebook.min-rows": 800,
    "headrace.store.settle-after": "1h",
}


@pytest.fixture(scope="module")
def small() -> Iterator[Database]:
    """Two worker processes that seal segments of few rows."""
    with dask.config.set(SETTINGS), headrace.connect(workers=2, processes=True, backend="host") as db:
        yield db


def held(collection: Collection) -> dict[Any, tuple[int, int]]:
    # The lag in status is of what has been fetched; the last records may not have been.
    collection.count(consistency="strong", deadline=60.0)
    return {row.id: (row.topic_partition, row.offset) for row in collection.scan()}


def kill_all(db: Database) -> None:
    """SIGKILL every worker process; returns when as many others have come."""
    pids = dict(db.workers)
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while set(db.workers.values()) & set(pids.values()) or len(db.workers) < len(pids):
        assert time.monotonic() < until, "the workers did not come back"
        time.sleep(0.05)


def clean_run(db: Database, broker: EmbeddedBroker, topic: str) -> dict[Any, tuple[int, int]]:
    """What a collection holds that has read the whole topic and knows of no snapshot."""
    clean = db.create_collection(f"{topic}-clean", dim=DIM, replicas=1)
    clean.ingest(broker.bootstrap, topic)
    found = held(clean)
    db.drop_collection(f"{topic}-clean")
    return found


@contextmanager
def files_no_larger_than(size: int, pids: list[int]) -> Iterator[None]:
    """No file of these processes can grow beyond `size` bytes: they are told as if the disk were full."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="another process's limits can be set on Linux only")
def test_disk_full(small: Database, broker: EmbeddedBroker, topic: str, until_quiet: Quiet, tmp_path: Path) -> None:
    collection = small.create_collection(topic, dim=DIM, replicas=2, cells=4)
    collection.ingest(broker.bootstrap)
    recorder = Recorder(seed=SEED, command=COMMAND)
    recorded = recorder.wrap(collection, "only")
    with recorder.sampling(collection), Writer(recorded).running() as writer:
        writer.wait_for(20)
        first = collection.snapshot(str(tmp_path))
        files = {file: file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()}
        with recorder.fault("disk full"), files_no_larger_than(4096, list(small.workers.values())):
            written = writer.writes
            for _ in range(3):
                with pytest.raises(SnapshotError) as refused:
                    collection.snapshot(str(tmp_path))
                assert str(tmp_path) in str(refused.value)
                recorded.search(vector(3), limit=5, consistency="strong", deadline=20.0)
            writer.wait_for(written + 20)
            assert searchable(recorded, "full", 1)[0] < 10.0
            assert [one.name for one in collection.snapshots()] == [first.name]
            assert all(file.stat().st_size == size for file, size in files.items()), "the one before was touched"
            leftovers = {file for file in tmp_path.rglob("*") if file.is_file()} - set(files)
            whole = [file for file in leftovers if "segments" not in file.parts]
            assert not whole, "something is left of a snapshot that failed"
            told = small.restore(str(tmp_path), f"{topic}-again", deadline=120.0)
            assert told.snapshot.name == first.name
            assert not told.passed_over
            small.drop_collection(f"{topic}-again")
            assert "the last snapshot failed" in " ".join(collection.status()["notes"])
        second = collection.snapshot(str(tmp_path))
    assert second.name > first.name
    until_quiet(collection, workers=2)
    judge(recorder, recorded, collection, replicas=2, required="I1 I2 I3 I5 promise")
    small.drop_collection(topic)


def _truncate(place: Path, newest: str) -> None:
    names = [
        {segment["uid"] for part in _manifest(file)["parts"] for segment in part["segments"]} for file in _all(place)
    ]
    newer = names[-1] - names[0]
    assert newer, "nothing has been sealed since the first: there is nothing to truncate that it does not need"
    files = [file for file in (place / "segments" / newer.pop()).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def _all(place: Path) -> list[Path]:
    return sorted((place / "snapshots").iterdir())


def _manifest(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found


def _flip(place: Path, newest: str) -> None:
    moment = next((place / "moments" / newest).iterdir())
    content = bytearray(moment.read_bytes())
    content[len(content) // 2] ^= 1
    moment.write_bytes(content)


def _flip_manifest(place: Path, newest: str) -> None:
    file = place / "snapshots" / f"{newest}.json"
    content = bytearray(file.read_bytes())
    content[content.index(b'"offsets"') + 40] ^= 1
    file.write_bytes(content)


def _of_another(place: Path, newest: str) -> None:
    other = place.parent / "other"
    for moment in (place / "moments" / newest).iterdir():
        shutil.copy(next((other / "moments").rglob("*.npz")), moment)


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, _flip_manifest, _of_another], ids=lambda damage: damage.__name__[1:]
)
def test_damaged(
    damage: Callable[[Path, str], None],
    small: Database,
    broker: EmbeddedBroker,
    topic: str,
    until_quiet: Quiet,
    tmp_path: Path,
) -> None:
    """All workers die, and the newest snapshot is damaged: what comes back is what a clean run holds."""
    collection = small.create_collection(topic, dim=DIM, replicas=2, cells=4)
    collection.ingest(broker.bootstrap)
    recorder = Recorder(seed=SEED, command=COMMAND)
    recorded = recorder.wrap(collection, "only")
    place = tmp_path / "docs"
    other = small.create_collection(f"{topic}-other", dim=DIM, replicas=1)
    other.snapshot(str(tmp_path / "other"))
    small.drop_collection(f"{topic}-other")
    with Writer(recorded).running() as writer:
        writer.wait_for(30)
        first = collection.snapshot(str(place))
        writer.wait_for(60)
        second = collection.snapshot(str(place))
        writer.wait_for(70)
    known = {file.name for file in (place / "segments").iterdir()}
    assert known, "nothing has been sealed: there is little to damage"
    damage(place, second.name)
    with recorder.fault(f"all workers killed, snapshot damaged: {damage.__name__[1:]}"):
        kill_all(small)
        killed = time.monotonic()
        _until_back(collection)
    log.info("back, with everything read, s: %s", round(time.monotonic() - killed, 2))
    status = until_quiet(collection, workers=2, ignore=True)
    alarms = " ".join(status["alarms"])
    assert second.name in alarms
    assert f"{first.name} was loaded instead" in alarms
    assert held(collection) == clean_run(small, broker, topic)
    assert collection.verify().ok
    judge(recorder, recorded, collection, replicas=2, required="I1 I2 I3 promise")
    small.drop_collection(topic)


def _until_back(collection: Collection, deadline: float = 120.0) -> None:
    until = time.monotonic() + deadline
    while True:
        try:
            if collection.status()["alarms"]:
                collection.count(consistency="strong", deadline=10.0)
                return
        except HeadraceError as error:
            log.info("not back yet: %s", error)
        assert time.monotonic() < until, collection.status()
        time.sleep(0.1)


def test_all_workers_killed_under_writes(
    small: Database, broker: EmbeddedBroker, topic: str, until_quiet: Quiet, tmp_path: Path
) -> None:
    collection = small.create_collection(topic, dim=DIM, replicas=2, cells=4)
    collection.ingest(broker.bootstrap)
    recorder = Recorder(seed=SEED, command=COMMAND)
    recorded = recorder.wrap(collection, "only")
    with Writer(recorded).running() as writer:
        writer.wait_for(30)
        collection.snapshot(str(tmp_path), every=0.5, keep=2)
        writer.wait_for(60)
        with recorder.fault("all workers killed"):
            kill_all(small)
            _until_back(collection)
        writer.wait_for(writer.writes + 20, deadline=60.0)
    status = until_quiet(collection, workers=2, ignore=True)
    assert "was loaded, and the log read from there" in " ".join(status["alarms"])
    assert "read again from its start" not in " ".join(status["alarms"])
    assert held(collection) == clean_run(small, broker, topic)
    judge(recorder, recorded, collection, replicas=2, required="I1 I2 I3 promise")
    small.drop_collection(topic)
