"""Random faults under writes and reads of all consistency levels from several clients, judged by the history checker.

Something breaks (`soak_faults`): a worker process is killed or stands still, the scheduler is killed and another takes
its place, the broker is away. At first several of these, one as soon as what the one before broke is whole again; then
every five seconds with probability 0.3. It goes on in rounds, each with a collection of its own, so that what the
embedded broker keeps always holds all of a round; after each round everything is looked at and judged.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import headrace
from benchmarks.fault_cluster import running_cluster
from benchmarks.fault_scenes import Scene
from benchmarks.fault_stage import Stage, Writer, until
from benchmarks.report import Report, show
from benchmarks.soak_clients import Clients
from benchmarks.soak_faults import FAULTS, LEFT_ALONE, Breaker
from tests.history.checker import LEVELS
from tests.history.report import Report as Verdict

__all__ = ["main", "soak"]

EVERY = 5.0
PROBABILITY = 0.3
PEACE = 1.0
ROUND = 60.0
BASE = 600
CELLS = 8
MIN_ROWS = 500
AT_LEAST = 3
"""Faults of a soak, however short: one that played none has shown nothing."""


def soak(seconds: float, seed: int, *, workers: int = 3, keep: str | None = None, each: bool = False) -> Scene:
    """Run rounds for about `seconds`, and for as long as `AT_LEAST` faults take.

    Parameters
    ----------
    seed : int
        Of what is broken, written and read.
    workers : int
        Processes; every cell has two copies.
    keep : str, optional
        A folder for the histories of rounds that broke a promise.
    each : bool
        Whether every fault is played once at first, in some order, however long it takes.
    """
    scene = Scene("soak")
    command = f"python -m benchmarks.soak --seconds {seconds:g} --seed {seed}{' --each' * each}"
    print(f"seed {seed}; run again: {command}", flush=True)
    counts: Counter[str] = Counter(dict.fromkeys(("rounds", *FAULTS, LEFT_ALONE, "calls", "writes"), 0))
    levels: Counter[str] = Counter()
    broken = 0
    end = time.monotonic() + seconds
    settings = {"codebook.min-rows": MIN_ROWS}
    with headrace.EmbeddedBroker() as broker, running_cluster(workers, settings) as (db, scheduler):
        for number in itertools.count():
            if number and time.monotonic() > end - EVERY:
                break
            with Stage(
                db, broker, f"soak-{number}", seed=seed + number, command=command, base=BASE, cells=CELLS
            ) as stage:
                breaker = Breaker(stage, scheduler, workers, random.Random(f"{seed} {number}"))
                first = breaker.chance.sample(list(FAULTS), len(FAULTS) if each else AT_LEAST) if not number else []
                verdict = _round(breaker, end, counts, first)
                if keep and not verdict.ok:
                    stage.recorder.save(Path(keep) / f"{stage.name}-seed-{seed}.jsonl")
            counts["rounds"] += 1
            broken += len(verdict.violations)
            levels.update({name: int(n) for name, n in verdict.figures.items() if name.partition("_")[0] in LEVELS})
            if not verdict.ok:
                print(f"round {number}: {verdict}")
    scene.figures |= {name: float(count) for name, count in (counts + levels).items()}
    scene.promise("faults", float(sum(counts[name] for name in FAULTS)), "", f">= {AT_LEAST}")
    scene.promise("broken promises and failed reads", float(broken), "", "== 0")
    scene.promise("writes", float(counts["writes"]), "", "> 0")
    for level in LEVELS:
        scene.promise(f"answers, {level}", float(levels[f"{level}_answers"]), "", "> 0")
    return scene


def _round(breaker: Breaker, end: float, counts: Counter[str], first: Sequence[str]) -> Verdict:
    """One round: faults under writes and reads, those that come `first` in any case; then quiet, then the verdict."""
    stage, chance = breaker.stage, breaker.chance
    end = min(end, time.monotonic() + ROUND)
    with (
        stage.recorder.sampling(stage.collection, every=0.2, ends=stage.ends),
        Writer(stage, rows=20, pause=0.1).running() as writer,
        Clients(stage).running() as clients,
    ):
        for name in first:
            _surely(breaker, name)
            counts[name] += 1
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(EVERY, left))
            if chance.random() < PROBABILITY and time.monotonic() < end:
                counts[breaker.play()] += 1
    stage.quiet(breaker.workers)
    counts["calls"] += clients.calls
    counts["writes"] += writer.calls
    for error in clients.errors[:3]:
        print(f"{stage.name}: of {len(clients.errors)} errors: {error}")
    return stage.judge()


def _surely(breaker: Breaker, name: str) -> None:
    """Play that fault, as soon as nothing is missing."""
    played = LEFT_ALONE
    while played == LEFT_ALONE:  # something may begin to move while it is left in peace
        until("all copies are there", lambda: breaker.stage.whole(breaker.workers), 90.0)
        time.sleep(PEACE)
        played = breaker.play(name)


def main(argv: Sequence[str]) -> int:
    """Run the soak; 0 if every promise was held, else 1."""
    parser = argparse.ArgumentParser(
        prog="headrace bench soak",
        description="Random faults under writes and reads of several clients, judged by the history checker.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help=f"about how long, {AT_LEAST} faults at least")
    parser.add_argument("--seed", type=int, default=None, help="of what is broken, written and read; default: any")
    parser.add_argument("--workers", type=int, default=3, help="worker processes")
    parser.add_argument("--each", action="store_true", help="play every fault once at first")
    parser.add_argument("--keep", metavar="FOLDER", help="write the histories of rounds that broke a promise there")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    asked = parser.parse_args(argv)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # that workers die is the point
    seed = random.SystemRandom().randrange(1 << 16) if asked.seed is None else asked.seed
    scene = soak(asked.seconds, seed, workers=asked.workers, keep=asked.keep, each=asked.each)
    report = Report.of("soak", seed, {"soak": scene.figures}, scene.criteria)
    show(report, Console())
    if asked.json:
        report.write(asked.json)
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
