"""Faults, played on a collection under writes and reads: what each did to them, and whether it kept its promise.

The rows are those of the project's list of what must survive; each scene is a test too (``tests/faults``), shorter.
Times are promises only where the same run was steady before the fault (`STEADY_MS`): on a machine that stalls by
itself they say nothing, are shown, and count as kept.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from confluent_kafka import KafkaError

from benchmarks.fault_lag import loop_lags
from benchmarks.fault_reads import One, reading
from benchmarks.fault_stage import Stage, Writer, until
from benchmarks.report import Criterion, criterion, quantiles

__all__ = ["Scene", "broker_away", "joins_and_leaves", "leader_moves", "unread_hangs", "worker_lost"]

STEADY_MS = 20.0


@dataclass
class Scene:
    """What one fault did: figures, and the promises that hold or not."""

    fault: str
    figures: dict[str, float | None] = field(default_factory=dict)
    criteria: list[Criterion] = field(default_factory=list)

    def promise(self, name: str, figure: float | None, unit: str, aim: str) -> None:
        """Hold `figure` against the promise of this fault."""
        self.figures[f"{name}, {unit}" if unit else name] = figure
        self.criteria.append(criterion(f"{self.fault}: {name}", figure, unit, aim))

    def timed(self, name: str, figure: float | None, unit: str, aim: str, *, steady: bool) -> None:
        """As `promise` where the machine was steady; else a figure."""
        if steady:
            self.promise(name, figure, unit, aim)
        else:
            self.figures[f"{name} (no promise: not steady), {unit}"] = figure

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        return [f"{one.name} is {one.figure} {one.unit}, not {one.aim}" for one in self.criteria if not one.held]

    def judged(self, stage: Stage, *, lost_copies: bool = False) -> None:
        """The verdict on the history: nothing acknowledged lost, the last writer wins, no ghosts, honest watermarks."""
        report = stage.judge(lost_copies=lost_copies)
        if not report.ok:
            print(report)
        self.promise("broken invariants", float(len(report.violations)), "", "== 0")

    def reads(
        self,
        before: Sequence[One],
        during: Sequence[One],
        *,
        exact: bool = False,
        slowest: float | None = None,
        times: float | None = None,
    ) -> bool:
        """What reads were like; `slowest` (ms), or p99 as so many `times` that before, is the promise of the fault.

        An `exact` index misses nothing by itself, so that no answer may lack a row.
        """
        usual, then = quantiles([one.ms for one in before]), quantiles([one.ms for one in during])
        steady = usual["p99"] is not None and usual["p99"] < STEADY_MS
        errors = [one.error for one in (*before, *during) if one.error]
        if errors:
            print(f"{self.fault}: {len(errors)} reads failed, the first: {errors[0]}")
        self.promise("failed reads", float(len(errors)), "", "== 0")
        self.promise("reads", then["count"], "", "> 0")
        good = [sum(one.recall for one in some if not one.error) / max(1, len(some)) for some in (before, during)]
        self.figures["recall@10 before"] = round(good[0], 4)
        self.promise("recall@10 lost", round(max(0.0, good[0] - good[1]), 4), "", "<= 0.01")
        lacking = [sum(one.recall < 1 for one in some if not one.error) for some in (before, during)]
        self.figures["answers that lacked a row before"] = float(lacking[0])
        if exact:
            self.promise("answers that lacked a row", float(sum(lacking)), "", "== 0")
        else:
            self.figures["answers that lacked a row, by the index's recall"] = float(lacking[1])
        self.figures |= {"p99 before, ms": usual["p99"], "slowest before, ms": usual["max"], "p99, ms": then["p99"]}
        if slowest is not None:
            self.timed("slowest read", then["max"], "ms", f"< {slowest:g}", steady=steady)
        if usual["p99"] and then["p99"] is not None and times is None:
            self.figures["p99 against before, times"] = then["p99"] / usual["p99"]
        elif times is not None and usual["p99"] and then["p99"] is not None:
            self.timed("p99 against before", then["p99"] / usual["p99"], "times", f"< {times:g}", steady=steady)
        return steady


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still (SIGSTOP) for the time of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def worker_lost(stage: Stage, *, hangs: float | None = None, rate: float = 200.0, before: float = 4.0) -> Scene:
    """Rows 1 to 3: a worker that is read and written to dies (SIGKILL), or `hangs` for so many seconds (SIGSTOP)."""
    scene = Scene("2 kill -9 of a worker that is read" if hangs is None else f"3 SIGSTOP of a worker, {hangs:g} s")
    workers = len(stage.db.workers)
    victim, pid = min(stage.db.workers.items())
    with stage.recorder.sampling(stage.collection), reading(stage.asked(rate)) as reads:
        with Writer(stage).running() as writer:
            writer.more(10)
            usual = max(stage.searchable(number) for number in range(20))
            begin = time.monotonic()
            time.sleep(before)
            fault = time.monotonic()
            with stage.recorder.fault(scene.fault), contextlib.ExitStack() as pausing:
                if hangs is None:
                    os.kill(pid, signal.SIGKILL)
                else:
                    pausing.enter_context(stopped(pid))
                back = stage.searchable(1000)
                if hangs is not None:
                    time.sleep(max(0.0, fault + hangs - time.monotonic()))
            healed = time.monotonic()
            until(
                "all copies are there again",
                lambda: (hangs is not None or victim not in stage.db.workers) and stage.whole(workers),
                90.0,
            )
            end = time.monotonic()
            writer.more(10)
        stage.quiet(workers)
    steady = scene.reads(reads.between(begin, fault), reads.between(fault, end), exact=stage.exact, slowest=200.0)
    scene.figures["written and searchable before, slowest of 20, s"] = usual
    # Who is dead says so by its connection; who hangs is waited for as long as the option says.
    scene.timed("written and searchable again", back, "s", "< 1" if hangs is None else "< 5", steady=steady)
    scene.promise("all copies restored", end - healed, "s", "< 30")
    scene.judged(stage)
    return scene


def unread_hangs(stage: Stage, *, hangs: float = 8.0, rate: float = 200.0, before: float = 4.0) -> Scene:
    """Row 3 while nothing is written: nobody waits for the worker, and still it is noticed and reads avoid it."""
    scene = Scene(f"3 SIGSTOP of a worker, nothing written, {hangs:g} s")
    workers = len(stage.db.workers)
    victim, pid = min(stage.db.workers.items())
    with reading(stage.asked(rate)) as reads:
        begin = time.monotonic()
        time.sleep(before)
        fault = time.monotonic()
        with stage.recorder.fault(scene.fault), stopped(pid):
            noticed = until("it is noticed", lambda: victim not in _holders(stage), hangs + 10)
            time.sleep(max(0.0, fault + hangs - time.monotonic()))
        healed = time.monotonic()
        until("all copies are there again", lambda: stage.whole(workers), 90.0)
        end = time.monotonic()
    steady = scene.reads(reads.between(begin, fault), reads.between(fault, end), exact=stage.exact, slowest=200.0)
    scene.timed("left the placement after", noticed, "s", "< 5", steady=steady)
    scene.promise("all copies restored", end - healed, "s", "< 30")
    scene.judged(stage)
    return scene


def _holders(stage: Stage) -> set[str]:
    placement: Mapping[int, Sequence[str]] = stage.collection.status()["placement"]
    return {holder for holders in placement.values() for holder in holders}


def broker_away(stage: Stage, *, away: float, hangs: bool = False) -> Scene:
    """Rows 5 and 6: the broker breaks all connections and takes none, or stands still; its records stay."""
    scene = Scene(f"6 broker hangs, {away:g} s" if hangs else f"5 broker down, {away:g} s")
    with loop_lags(stage.db) as lags, Writer(stage).running() as writer:
        writer.more(10)
        steady = max(lags.calm(1.0)) * 1e3 < STEADY_MS
        with stage.recorder.fault(scene.fault), lags.counting():
            if hangs:
                with stopped(stage.broker.pid):
                    time.sleep(away)
            else:
                stage.broker.down()
                time.sleep(away)
                stage.broker.up()
        returned = time.monotonic()
        writer.more(1)
        written = writer.last - returned
        again = stage.searchable(1)
        writer.more(10)
    stage.quiet()
    scene.figures["longest write, s"] = writer.longest
    scene.timed("delivered after its return", written, "s", "< 1", steady=steady)
    scene.timed("written and searchable after that", again, "s", "< 1", steady=steady)
    scene.timed("longest stall of an event loop meanwhile", lags.longest * 1e3, "ms", "< 50", steady=steady)
    scene.promise("records missing or twice in the log", float(_misplaced(stage, writer)), "", "== 0")
    scene.judged(stage)
    return scene


def leader_moves(stage: Stage, *, moves: int = 12, brokers: int = 3) -> Scene:
    """Row 8: leaders move under writes, and the broker answers some of these with passing errors."""
    scene = Scene("8 leader moves, produce errors")
    passing = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.REQUEST_TIMED_OUT, KafkaError.NOT_ENOUGH_REPLICAS)
    with Writer(stage, pause=0.01).running() as writer:
        writer.more(10)
        with stage.recorder.fault(scene.fault):
            for move in range(moves):
                stage.broker.move_leader(stage.name, move % 4, 1 + move % brokers)
                stage.broker.fail_requests("produce", passing)
                writer.more(3)
        writer.more(10)
        failed = writer.error is not None
    stage.quiet()
    scene.promise("errors that reached the user", float(failed), "", "== 0")
    scene.figures["longest write, s"] = writer.longest
    scene.promise("records missing or twice in the log", float(_misplaced(stage, writer)), "", "== 0")
    scene.promise("ids whose records changed places", float(_disordered(stage)), "", "== 0")
    scene.judged(stage)
    return scene


def _misplaced(stage: Stage, writer: Writer) -> int:
    numbers = [number for _, number in stage.log()]
    return len(set(range(writer.upserts)) - set(numbers)) + len(numbers) - len(set(numbers))


def _disordered(stage: Stage) -> int:
    last: dict[str, int] = {}
    wrong = set()
    for id_, number in stage.log():
        if number < last.get(id_, -1):
            wrong.add(id_)
        last[id_] = number
    return len(wrong)


def joins_and_leaves(stage: Stage, *, rate: float = 50.0, before: float = 4.0, times: float | None = 2.0) -> Scene:
    """Row 23: a worker joins and one leaves while records come as fast as they go.

    Reads may take so many `times` what they took while nothing changed (p99); None: that is shown, and promised by
    nobody. Nothing changes before the worker joins and again once it serves, and the slower of the two counts: one
    process more at full ingest on the same cores is slower whoever joins whom (of two cores, with nothing moving: p99
    41 to 150 ms with three workers, 22 to 43 with two), and is no cost of its coming.
    """
    scene = Scene("23 a worker joins, one leaves, full ingest")
    cluster, workers = stage.db.dask.cluster, len(stage.db.workers)
    with stage.recorder.sampling(stage.collection), reading(stage.asked(rate)) as reads:
        with Writer(stage, rows=100, pause=0.0).running() as writer:
            writer.more(10)
            begin = time.monotonic()
            time.sleep(before)
            calls, fault = writer.calls, time.monotonic()
            with stage.recorder.fault(scene.fault):
                cluster.scale(workers + 1)
                joined = until("it serves", lambda: len(stage.db.workers) > workers and stage.whole(workers + 1), 90.0)
                served = time.monotonic()
                agree = stage.collection.verify(deadline=30.0).ok
                settled = time.monotonic()
                time.sleep(before)
                left = time.monotonic()
                cluster.scale(workers)
                until("it has left", lambda: len(stage.db.workers) == workers and stage.whole(workers), 90.0)
            end = time.monotonic()
        stage.quiet(workers)
    scene.figures["upserts/s before"] = 100 * calls / (fault - begin)
    scene.figures["upserts/s meanwhile"] = 100 * (writer.calls - calls) / (end - fault)
    scene.figures |= {"joined after, s": joined, "left after, s": end - left}
    scene.promise("copies that differ once it serves", float(not agree), "", "== 0")
    calm = [reads.between(begin, fault), reads.between(settled, left)]
    p99 = [quantiles([one.ms for one in some])["p99"] or 0.0 for some in calm]
    scene.figures |= {"p99 with as many workers, ms": p99[0], "p99 with one more, nothing moving, ms": p99[1]}
    changing = [*reads.between(fault, served), *reads.between(left, end)]
    scene.reads(calm[p99.index(max(p99))], changing, exact=stage.exact, times=times)
    scene.judged(stage)
    return scene
