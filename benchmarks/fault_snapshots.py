"""Faults after which rows come back from a snapshot and the log: how many, how soon, and all of them?"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import headrace
from benchmarks.fault_cluster import running_cluster
from benchmarks.fault_reads import vector
from benchmarks.fault_scenes import Scene
from benchmarks.fault_stage import DIM, Stage, Writer, until

__all__ = ["all_killed", "restored", "up_again"]


def restored(stage: Stage, *, rows: int = 35_000) -> Scene:
    """A collection is dropped, and comes back from its snapshot and what was written since."""
    scene = Scene("a collection restored from its snapshot")
    _fill(stage, rows)
    with tempfile.TemporaryDirectory() as place:
        taken = stage.collection.snapshot(place)
        again = stage.collection.snapshot(place)
        with Writer(stage).running() as writer:
            writer.more(40)
        scene.figures |= {
            "snapshot, s": taken.seconds,
            "snapshot, MB": taken.bytes / 1e6,
            "the next one, s": again.seconds,
            "the next one, MB written": again.bytes_written / 1e6,
        }
        stage.db.drop_collection(stage.name)
        began = time.monotonic()
        told = stage.db.restore(place)
        took = time.monotonic() - began
    _open(stage, stage.db)
    _recovery(scene, told)
    scene.figures["restored, whole call, s"] = took
    _checked(scene, stage)
    return scene


def all_killed(stage: Stage) -> Scene:
    """SIGKILL of all workers at once, under writes, with a snapshot every second."""
    scene = Scene("kill -9 of all workers")
    workers = dict(stage.db.workers)
    with tempfile.TemporaryDirectory() as place:
        with Writer(stage).running() as writer:
            writer.more(10)
            stage.collection.snapshot(place, every=1.0, keep=3)
            writer.more(40)
            with stage.recorder.fault(scene.fault):
                fault = time.monotonic()
                for pid in workers.values():
                    os.kill(pid, signal.SIGKILL)
                until("the old workers are gone", lambda: not set(stage.db.workers) & set(workers), 60.0)
                until("all copies are there again", lambda: stage.whole(len(workers)), 120.0)
            scene.figures["all copies there again, s"] = time.monotonic() - fault
            writer.more(10, deadline=120.0)
        stage.quiet(len(workers))
        scene.figures["everything read again, s"] = time.monotonic() - fault
        stage.collection.snapshot(place, every=0)
    begun = [alarm for alarm in stage.collection.status()["alarms"] if "read again from its start" in alarm]
    scene.promise("the log read from its start", float(len(begun)), "", "== 0")
    _checked(scene, stage)
    return scene


def up_again(stage: Stage) -> Scene:
    """Scheduler and workers all die; another cluster is started on the same folder of snapshots, as `up` does it."""
    scene = Scene("the whole cluster killed, up again")
    workers = len(stage.db.workers)
    with tempfile.TemporaryDirectory() as place:
        settings: dict[str, object] = {"snapshots.url": place, "snapshots.every": "1s"}
        name = f"{stage.name}-kept"
        with running_cluster(workers, settings) as (db, scheduler):
            kept = Stage(db, stage.broker, name, seed=stage.seed, command=f"headrace bench faults --seed {stage.seed}")
            kept.__enter__()
            until("a snapshot was taken", lambda: kept.collection.status()["snapshots"]["last"])
            with Writer(kept).running() as writer:
                writer.more(40)
            pids = list(db.workers.values())
            scheduler.kill()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        with kept.recorder.fault(scene.fault):
            began = time.monotonic()
            with running_cluster(workers, settings) as (db, _):
                scene.figures["processes started, s"] = time.monotonic() - began
                told = db.restore(str(Path(place) / name), take_over=True)
                _open(kept, db)
                kept.quiet(workers)
                scene.figures["everything back, s"] = time.monotonic() - began
                _recovery(scene, told)
                _checked(scene, kept)
    return scene


def _fill(stage: Stage, rows: int) -> None:
    """More rows that never change."""
    for begin in range(0, rows, 1000):
        some = range(begin, min(begin + 1000, rows))
        stage.recorded.upsert(
            [{"id": f"more-{n}", "vector": vector(stage.seed, stage.base + n, DIM, still=True)} for n in some],
            wait="searchable",
            deadline=60.0,
        )
    stage.quiet()
    until("full segments are sealed", lambda: all(_sealed(worker) for worker in stage.collection.status()["workers"]))


def _sealed(worker: Mapping[str, Any]) -> bool:
    """Every segment but the one that grows has an index, and there is one."""
    kinds = [segment["kind"] for segment in worker["segment_sizes"]]
    return "sealed" in kinds and kinds.count("growing") == 1


def _open(stage: Stage, db: headrace.Database) -> None:
    """From now on the stage is the collection that has come back."""
    stage.db, stage.collection = db, db.collection(stage.name)
    stage.recorded = stage.recorder.wrap(stage.collection, "after")


def _recovery(scene: Scene, told: headrace.Restoration) -> None:
    """The recovery table in one line."""
    scene.figures |= {
        "rows in the snapshot": float(told.snapshot.rows),
        "rows loaded, all copies": float(sum(one.rows for one in told.workers)),
        "loaded, MB": sum(one.bytes for one in told.workers) / 1e6,
        "segments adopted": float(sum(one.adopted for one in told.workers)),
        "segments rebuilt": float(sum(one.rebuilt for one in told.workers)),
        "loaded, s": told.seconds,
        "records read from the log": float(told.replayed),
        "read from the log, s": told.catch_up_seconds,
    }


def _checked(scene: Scene, stage: Stage) -> None:
    scene.promise("copies that differ", float(not stage.collection.verify(deadline=60.0).ok), "", "== 0")
    scene.judged(stage, lost_copies=True)
