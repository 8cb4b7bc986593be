"""What one reader of a topic has taken in, how fresh it was, and how long each step took."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from headrace.pipeline.clocks import Early
from headrace.pipeline.metrics import Histogram
from headrace.pipeline.micro_batch import MicroBatch

__all__ = ["STAGES", "Figures"]

STAGES = ("kafka", "decode", "encode", "apply", "acknowledge")


class Figures:
    """Counters and histograms. Not thread-safe: one owner."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(("records", "deletes", "dead_letters", "batches"), 0)
        self._freshness = Histogram()
        self._early = Early()
        self._stages = {stage: Histogram() for stage in STAGES}
        self._rate = _Rate()

    def account(self, batch: MicroBatch, now: float) -> None:
        """Count a batch that all copies have; `now` is the clock's that `MicroBatch.applied_at` was read from."""
        decoded = batch.decoded
        assert decoded is not None
        usable = len(decoded.ids)
        if usable:
            stamps = batch.raw.timestamps[decoded.rows].astype(np.float64)
            self._freshness.add_many(self._early.sift(batch.applied_at * 1e3 - stamps))
            batch.took["acknowledge"] = now - batch.applied_at
            for stage in STAGES:
                self._stages[stage].add(batch.took.get(stage, 0.0) * 1e3)
        deletes = int(decoded.deleted.sum())
        given_up = len(batch.given_up)
        self._counts["records"] += usable - deletes - given_up
        self._counts["deletes"] += deletes
        self._counts["dead_letters"] += len(decoded.refused) + given_up
        self._counts["batches"] += 1
        self._rate.add(usable)

    def dead_letter(self) -> None:
        """Count one record that was refused outside of any batch."""
        self._counts["dead_letters"] += 1

    def to_wire(self) -> dict[str, Any]:
        """Plain msgpack types, histograms as `Histogram.to_wire`."""
        return {
            **self._counts,
            "early": self._early.count,
            "skew_ms": self._early.skew,
            "rate": self._rate.now(),
            "freshness": self._freshness.to_wire(),
            "stages": {stage: histogram.to_wire() for stage, histogram in self._stages.items()},
        }


class _Rate:
    """Records a second over the last five seconds."""

    def __init__(self) -> None:
        self._seconds: dict[int, int] = {}

    def add(self, records: int) -> None:
        now = int(time.monotonic())
        self._seconds[now] = self._seconds.get(now, 0) + records
        for old in [second for second in self._seconds if second < now - 6]:
            del self._seconds[old]

    def now(self) -> float:
        now = int(time.monotonic())
        return sum(count for second, count in self._seconds.items() if now - 5 <= second < now) / 5
