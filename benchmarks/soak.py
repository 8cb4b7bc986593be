"""Random kills and stops of workers under writes and reads of all consistency levels, judged by the history checker.

Every five seconds, with probability 0.3, a worker process chosen at random is killed (SIGKILL) or stands still for some
seconds (SIGSTOP, SIGCONT). A worker is left alone while a copy of something is missing, because to lose the last one is
another fault with another promise. It goes on in rounds, each with a collection of its own, so that what the embedded
broker keeps always holds all of a round; after each round everything is looked at and judged.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import headrace
from benchmarks.fault_scenes import Scene, stopped
from benchmarks.fault_stage import DIM, IDS, Stage, Writer
from benchmarks.report import Report, show

__all__ = ["main", "soak"]

EVERY = 5.0
PROBABILITY = 0.3
ROUND = 60.0
LONGEST_STOP = 6.0
DEADLINE = 30.0


class Readers:
    """Gets and searches at all levels, each client in a thread of its own; a failure ends the round."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stop = threading.Event()
        self.errors: list[str] = []
        self.reads = 0

    def _read(self, number: int) -> None:
        stage = self._stage
        recorded = stage.recorder.wrap(stage.db.collection(stage.name), f"reader-{number}")
        chosen = random.Random(f"{stage.seed} {number}")
        levels: list[Any] = ["strong", "session", headrace.bounded(500), "eventual"]
        while not self._stop.wait(0.05):
            level = chosen.choice(levels)
            try:
                ids = [f"w{chosen.randrange(IDS)}" for _ in range(5)]
                recorded.get(ids, consistency=level, deadline=DEADLINE)
                vector = [chosen.gauss(0, 1) for _ in range(DIM)]
                recorded.search(vector, limit=10, consistency=level, deadline=DEADLINE)
            except headrace.HeadraceError as error:
                self.errors.append(f"{level}: {type(error).__name__}: {error}")
            self.reads += 2

    @contextlib.contextmanager
    def running(self, count: int = 2) -> Iterator[Readers]:
        """Read with so many clients while the block runs."""
        threads = [threading.Thread(target=self._read, args=(number,), name="reader") for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()


def soak(seconds: float, seed: int, *, workers: int = 3, keep: str | None = None) -> Scene:
    """Run rounds for about `seconds`; `keep` names a folder for the histories of rounds that broke a promise."""
    scene = Scene("soak")
    command = f"python -m benchmarks.soak --seconds {seconds:g} --seed {seed}"
    print(f"seed {seed}; run again: {command}", flush=True)
    counts = dict.fromkeys(("rounds", "kills", "stops", "left alone", "reads", "writes"), 0)
    failed = broken = 0
    until = time.monotonic() + seconds
    with headrace.EmbeddedBroker() as broker, headrace.connect(workers=workers, processes=True) as db:
        for number in itertools.count():
            if number and time.monotonic() > until - EVERY:
                break
            name, chance = f"soak-{number}", random.Random(f"{seed} {number}")
            with Stage(db, broker, name, seed=seed + number, command=command, base=500) as stage:
                end = min(until, time.monotonic() + ROUND)
                with (
                    stage.recorder.sampling(stage.collection, every=0.2),
                    Writer(stage, rows=20, pause=0.1).running() as writer,
                    Readers(stage).running() as readers,
                ):
                    while (left := end - time.monotonic()) > 0:
                        time.sleep(min(EVERY, left))
                        if chance.random() < PROBABILITY and time.monotonic() < end:
                            counts[_break(stage, chance, workers)] += 1
                stage.quiet(workers)
                report = stage.judge()
            counts["rounds"] += 1
            counts["reads"] += readers.reads
            counts["writes"] += writer.calls
            failed, broken = failed + len(readers.errors), broken + len(report.violations)
            for error in readers.errors[:3]:
                print(f"round {number}: a read failed: {error}")
            if not report.ok:
                print(f"round {number}: {report}")
            if keep and (readers.errors or not report.ok):
                stage.recorder.save(Path(keep) / f"{name}-seed-{seed}.jsonl")
    scene.figures |= {name: float(count) for name, count in counts.items()}
    scene.promise("failed reads", float(failed), "", "== 0")
    scene.promise("broken invariants", float(broken), "", "== 0")
    scene.promise("writes", float(counts["writes"]), "", "> 0")
    return scene


def _break(stage: Stage, chance: random.Random, workers: int) -> str:
    """Kill or stop one worker, unless something is missing already; what was done."""
    kind, share, wait = chance.random(), chance.random(), chance.uniform(1.0, LONGEST_STOP)
    if not stage.whole(workers):
        return "left alone"
    alive = sorted(stage.db.workers.items())
    victim, pid = alive[int(share * len(alive))]
    what = "SIGKILL" if kind < 0.5 else f"SIGSTOP for {wait:.1f} s"
    print(f"{time.strftime('%H:%M:%S')} {stage.name}: {what} of {victim}", flush=True)
    with stage.recorder.fault(what):
        if kind < 0.5:
            os.kill(pid, signal.SIGKILL)
            return "kills"
        with stopped(pid):
            time.sleep(wait)
    return "stops"


def main(argv: Sequence[str]) -> int:
    """Run the soak; 0 if every promise was held, else 1."""
    parser = argparse.ArgumentParser(
        prog="headrace bench soak",
        description="Random kills and stops of workers under writes and reads, judged by the history checker.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long; an hour is 3600")
    parser.add_argument("--seed", type=int, default=None, help="of what is broken, written and read; default: any")
    parser.add_argument("--workers", type=int, default=3, help="worker processes")
    parser.add_argument("--keep", metavar="FOLDER", help="write the histories of rounds that broke a promise there")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    asked = parser.parse_args(argv)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # that workers die is the point
    seed = random.SystemRandom().randrange(1 << 16) if asked.seed is None else asked.seed
    scene = soak(asked.seconds, seed, workers=asked.workers, keep=asked.keep)
    report = Report.of("soak", seed, {"soak": scene.figures}, scene.criteria)
    show(report, Console())
    if asked.json:
        report.write(asked.json)
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
