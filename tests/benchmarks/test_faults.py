"""What a scene of the fault benchmark holds to be kept, and what it only shows."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.fault_reads import One, Reads, vector
from benchmarks.fault_scenes import STEADY_MS, Scene
from benchmarks.fault_stage import Stage
from benchmarks.soak_faults import FAULTS, LEFT_ALONE, Breaker
from tests.history.events import FaultMark
from tests.history.recorder import Recorder


def reads(*ms: float, recall: float = 1.0, error: str = "") -> list[One]:
    return [One(float(at), took, recall, error) for at, took in enumerate(ms)]


def test_a_slow_read_breaks_the_promise_where_the_machine_was_steady() -> None:
    scene = Scene("fault")
    assert scene.reads(reads(5.0), reads(5.0, 250.0), slowest=200.0)
    assert scene.broken == ["fault: slowest read is 250.0 ms, not < 200"]


def test_where_it_was_not_steady_the_figure_is_shown_and_promises_nothing() -> None:
    scene = Scene("fault")
    assert not scene.reads(reads(STEADY_MS + 1), reads(250.0), slowest=200.0)
    assert scene.broken == []
    assert 250.0 in scene.figures.values()


def test_failed_reads_lost_recall_and_no_reads_at_all_are_broken_promises() -> None:
    failed, worse, none = Scene("a"), Scene("b"), Scene("c")
    failed.reads(reads(1.0), reads(1.0, error="gone"))
    worse.reads(reads(1.0), reads(1.0, recall=0.9))
    none.reads(reads(1.0), [])
    assert "failed reads is 1.0" in failed.broken[0]
    assert "recall@10 lost is 0.1" in worse.broken[0]
    assert "reads is 0.0" in none.broken[0]


def test_a_read_belongs_to_the_time_in_which_it_was_under_way() -> None:
    found = Reads()
    found.all = [One(1.0, 100.0, 1.0, ""), One(1.9, 500.0, 1.0, ""), One(3.0, 1.0, 1.0, "")]
    assert [one.began for one in found.between(2.0, 2.5)] == [1.9]
    assert [one.began for one in found.between(0.0, 3.0)] == [1.0, 1.9, 3.0]


def test_rows_that_stay_lie_apart_from_those_that_are_written() -> None:
    still = np.stack([vector(1, number, 32, still=True) for number in range(50)])
    moving = np.stack([vector(1, number, 32, still=False) for number in range(50)])
    assert (still @ moving.T < (still @ still.T).min()).all()


def test_where_the_index_is_exact_no_answer_may_lack_a_row() -> None:
    exact, graph = Scene("a"), Scene("b")
    exact.reads(reads(1.0), [*reads(*[1.0] * 99), *reads(1.0, recall=0.9)], exact=True)
    graph.reads(reads(1.0), [*reads(*[1.0] * 99), *reads(1.0, recall=0.9)])
    assert exact.broken == ["a: answers that lacked a row is 1.0 , not == 0"]
    assert graph.broken == []


def test_the_soak_breaks_nobody_while_a_copy_is_missing() -> None:
    """Nor does what it spares change what it does afterwards: the seed repeats a run."""
    stage = cast(Any, SimpleNamespace(whole=lambda workers: False))
    one, other = random.Random(3), random.Random(3)
    breaker = Breaker(cast(Stage, stage), cast(Any, None), 3, one)
    assert breaker.play() == LEFT_ALONE
    assert breaker.play("broker down") == LEFT_ALONE
    for _ in range(3):
        other.random()
    assert one.random() == other.random()


def test_the_first_faults_of_a_soak_are_played_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PEACE", 0.0)
    answers = iter([False, True, False, True, True])  # waited for, gone when it is looked at again, then there
    stage = cast(Any, SimpleNamespace(whole=lambda workers: next(answers), name="docs", recorder=Recorder()))
    played: list[str] = []
    monkeypatch.setitem(cast(Any, FAULTS), "broker down", (1.0, lambda breaker, which: played.append("broker down")))
    soak._surely(Breaker(stage, cast(Any, None), 3, random.Random(3)), "broker down")
    assert played == ["broker down"]
    assert next(answers, None) is None


def test_the_soak_plays_the_fault_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = cast(Any, SimpleNamespace(whole=lambda workers: True, name="docs", recorder=Recorder()))
    played: list[str] = []
    for name, (weight, _) in FAULTS.items():
        monkeypatch.setitem(cast(Any, FAULTS), name, (weight, lambda breaker, which, name=name: played.append(name)))
    breaker = Breaker(stage, cast(Any, None), 3, random.Random(3))
    assert [breaker.play(name) for name in FAULTS] == list(FAULTS) == played
    drawn = {breaker.play() for _ in range(100)}
    assert drawn == set(FAULTS)
    marks = [event for event in stage.recorder.history().events if isinstance(event, FaultMark)]
    assert len(marks) == 2 * len(played)
