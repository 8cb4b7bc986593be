"""The faults of the soak: each breaks one thing and heals it again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.fault_cluster import SchedulerProcess
from benchmarks.fault_scenes import stopped
from benchmarks.fault_stage import Stage

__all__ = ["FAULTS", "LEFT_ALONE", "Breaker"]

LEFT_ALONE = "left alone"
STOPS = 3.0
SCHEDULER_AWAY = 2.0
BROKER_AWAY = 2.0


@dataclass
class Breaker:
    """Breaks one thing of a cluster at a time, chosen by `chance`.

    A cluster is left alone while a copy of something is missing: to lose the last one is another fault, with another
    promise.
    """

    stage: Stage
    scheduler: SchedulerProcess
    workers: int
    chance: random.Random

    def play(self, name: str | None = None) -> str:
        """Play the fault of that name, or any; what was done."""
        names = list(FAULTS)
        name = name or self.chance.choices(names, [weight for weight, _ in FAULTS.values()])[0]
        which = self.chance.random()
        if not self.stage.whole(self.workers):
            return LEFT_ALONE
        print(f"{time.strftime('%H:%M:%S')} {self.stage.name}: {name}", flush=True)
        with self.stage.recorder.fault(name):
            FAULTS[name][1](self, which)
        return name

    def _victim(self, which: float) -> int:
        alive = sorted(self.stage.db.workers.items())
        return alive[int(which * len(alive))][1]

    def _kill(self, which: float) -> None:
        os.kill(self._victim(which), signal.SIGKILL)  # whoever started it starts another, which joins

    def _stop(self, which: float) -> None:
        with stopped(self._victim(which)):
            time.sleep(STOPS)

    def _scheduler(self, _: float) -> None:
        self.scheduler.kill()
        time.sleep(SCHEDULER_AWAY)
        self.scheduler.start()
        self.scheduler.wait()

    def _broker(self, _: float) -> None:
        self.stage.broker.down()
        try:
            time.sleep(BROKER_AWAY)
        finally:
            self.stage.broker.up()


FAULTS: Mapping[str, tuple[float, Callable[[Breaker, float], None]]] = {
    "SIGKILL of a worker": (0.35, Breaker._kill),
    "SIGSTOP of a worker": (0.35, Breaker._stop),
    "SIGKILL of the scheduler": (0.15, Breaker._scheduler),
    "broker down": (0.15, Breaker._broker),
}
"""How often each is drawn, and what it does."""
