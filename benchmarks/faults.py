"""What do faults cost? Workers, broker and scaling are broken on purpose, and every promise is held against a figure.

Each scene writes and reads while the fault is there, writes down what was acknowledged and answered, and has the
history checked afterwards. The scenes are in ``fault_scenes.py`` and ``fault_snapshots.py``; tests play shorter ones.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

import headrace
from benchmarks.fault_scenes import Scene, broker_away, joins_and_leaves, leader_moves, unread_hangs, worker_lost
from benchmarks.fault_snapshots import all_killed, restored, up_again
from benchmarks.fault_stage import Stage
from benchmarks.report import Report, show

__all__ = ["SCENES", "main"]

SCENES: Mapping[str, Callable[[Stage], Scene]] = {
    "worker-killed": worker_lost,
    "worker-hangs": lambda stage: worker_lost(stage, hangs=10.0),
    "worker-hangs-unwritten": unread_hangs,
    "broker-down": lambda stage: broker_away(stage, away=10.0),
    "broker-hangs": lambda stage: broker_away(stage, away=5.0, hangs=True),
    "leader-moves": leader_moves,
    "join-and-leave": joins_and_leaves,
    "restored": restored,
    "all-killed": all_killed,
    "up-again": up_again,
}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0 if every promise was held, else 1."""
    asked = _arguments().parse_args(argv)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # that workers die is the point
    console = Console()
    scenes: list[Scene] = []
    with console.status("starting") as state:
        for name in asked.only or SCENES:
            state.update(name)
            scenes.append(_play(name, asked))
    results: dict[str, Any] = {"settings": {"workers": asked.workers, "load_before": round(os.getloadavg()[0], 2)}}
    results |= {scene.fault: scene.figures for scene in scenes}
    report = Report.of("faults", asked.seed, results, [one for scene in scenes for one in scene.criteria])
    show(report, console)
    if asked.json:
        report.write(asked.json)
    return 0 if report.held else 1


def _play(name: str, asked: argparse.Namespace) -> Scene:
    """One scene on a cluster of its own: what one has broken, the next must not feel."""
    command = f"headrace bench faults --only {name} --seed {asked.seed}"
    with (
        headrace.EmbeddedBroker(brokers=3 if name == "leader-moves" else 1) as broker,
        headrace.connect(workers=asked.workers, processes=True) as db,
        Stage(db, broker, name, seed=asked.seed, command=command) as stage,
    ):
        return SCENES[name](stage)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace bench faults",
        description="Faults under writes and reads: what each cost, and whether its promise was held.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=list(SCENES), help="this scene; may be given again")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--seed", type=int, default=0, help="of vectors and of what is written")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
