"""The benchmark of the store: its own measures, and one quick run of all of it."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import store, vectors
from benchmarks.report import Report, criterion
from benchmarks.store_ingest import due_times
from benchmarks.store_setup import Part, Setup
from benchmarks.store_timing import alternate, rates, ratios
from benchmarks.store_upkeep import Maintainer, counting
from headrace.gpu.backend import resolve
from headrace.gpu.errors import ConfigError
from headrace.gpu.index_spec import IndexSpec, build_params

FINDING = ("recall", "runbook: ", "sustained: ", "memory: ")
"""Criteria that hold on any machine, however busy; the others are about time."""


def test_both_are_timed_by_turns() -> None:
    calls: list[str] = []
    found = alternate([lambda: calls.append("a"), lambda: calls.append("b")], 3, least_seconds=0.0)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(seconds) for seconds in found] == [3, 3]


def test_a_round_is_long_enough_to_be_timed() -> None:
    quick: list[float] = []
    slow: list[float] = []
    alternate([lambda: quick.append(time.sleep(0.001) or 0.0), lambda: slow.append(time.sleep(0.05) or 0.0)], 1)
    assert len(quick) > len(slow) > 1
    assert len(slow) <= 1 + 6  # each by what it takes itself: 0.3 seconds of a call of 0.05


def test_twice_as_long_is_half_as_fast() -> None:
    assert ratios([2.0, 4.0, 6.0], [1.0, 2.0, 6.0]) == {"median": 0.5, "min": 0.5, "max": 1.0}
    assert rates([0.5, 0.25], 100) == {"median": 300.0, "min": 200.0, "max": 400.0}


@given(st.floats(20.0, 500.0), st.integers(0, 1000))
def test_queries_are_due_at_random_but_at_the_rate(rate: float, seed: int) -> None:
    times = due_times(rate, 10.0, seed)
    assert (np.diff(times) > 0).all()
    assert times[0] > 0
    assert times[-1] < 10.0
    # Six standard deviations of a Poisson count.
    assert abs(len(times) - rate * 10) < 6 * np.sqrt(rate * 10)
    np.testing.assert_array_equal(times, due_times(rate, 10.0, seed))


class _Jobs:
    """A store that wants maintenance so many times; the last job takes a moment."""

    def __init__(self, jobs: int, error: Exception | None = None) -> None:
        self.jobs, self.error = jobs, error
        self.threads: set[int] = set()
        self._lock, self._rewriting, self.done = threading.Lock(), 0, 0

    def statistics(self) -> dict[str, int]:
        return {"rewriting": self._rewriting}

    def wants_maintenance(self) -> bool:
        return self.jobs > 0

    def maintain(self) -> bool:
        if self.error is not None:
            raise self.error
        with self._lock:
            if not self.jobs:
                return False
            self.jobs -= 1
            self._rewriting += 1
        self.threads.add(threading.get_ident())
        time.sleep(0.02)
        with self._lock:
            self._rewriting -= 1
            self.done += 1
        return True


def test_the_maintainer_does_what_is_wanted_in_a_thread_of_its_own() -> None:
    jobs: Any = _Jobs(5)
    with Maintainer(jobs) as maintainer:
        maintainer.wait()
        assert jobs.done == 5, "it waits for what is under way, too"
    assert jobs.threads.isdisjoint({threading.get_ident()})


def test_what_fails_in_the_maintainer_fails_the_run() -> None:
    jobs: Any = _Jobs(1, RuntimeError("no room"))
    with pytest.raises(RuntimeError, match="no room"), Maintainer(jobs) as maintainer:
        maintainer.wait()


def test_builds_are_counted_from_outside() -> None:
    backend, counted = counting(resolve("host"))
    rows = np.eye(32, dtype=np.float32)
    params = build_params(IndexSpec("flat"), 32, 32)
    index = backend.kinds["flat"].build(rows, "cosine", params)
    backend.kinds["flat"].build(rows[:8], "cosine", params)
    assert (counted.builds, counted.rows) == (2, 40)
    assert counted.seconds > 0
    assert backend.kinds["flat"].search(index, None, rows[:1], 1, effort=0)[1].tolist() == [[0]]


def test_a_missing_file_leaves_its_search_out_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ConfigError("no vectors here: fetch them")

    monkeypatch.setattr(vectors, "glove", missing)
    monkeypatch.setattr(store.store_search, "run", lambda setup: Part({"search": {}}, [criterion("x", 1, "", "> 0")]))
    setup = Setup(resolve("host"), 2000, 0, quick=False, threads=1, cache=tmp_path)
    part = store.PARTS["search"](setup)
    assert part.results["search, GloVe-like"] == {"left out": "no vectors here: fetch them"}
    assert len(part.criteria) == 1
    assert "left out: no vectors here" in capsys.readouterr().err


def test_another_benchmarks_results_become_a_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = criterion("ids: find", 2.0, "M/s", "> 1")
    module = SimpleNamespace(run=lambda count, seed: {"find/s": count, "seed": seed, "criteria": [own]})
    monkeypatch.setitem(sys.modules, "benchmarks.ids", module)
    part = store.PARTS["ids"](Setup(resolve("host"), 2000, 7, quick=True, threads=1, cache=tmp_path))
    assert part.results == {"ids": {"find/s": store.QUICK_IDS, "seed": 7}}
    assert part.criteria == [own]


def test_what_is_nested_becomes_one_table() -> None:
    spread = {"median": 1.0, "min": 0.5, "max": 2.0}
    found = {"count": 3, "string": {"bytes": 9, "find": {"1": {"p50": 4.0}, "256": {"p50": spread}}}, "rate": spread}
    assert store.flat(found) == {
        "count": 3,
        "rate": spread,
        "string": {"bytes": 9},
        "string, find, 1": {"p50": 4.0},
        "string, find, 256": {"p50": spread},
    }


@pytest.mark.parametrize("wrong", [["--rows", "10"], ["--threads", "0"], ["--part", "everything"]])
def test_arguments_that_cannot_be_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        store.main(wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run_of_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "store.json"
    began = time.process_time()
    code = store.main(["--quick", "--backend", "host", "--threads", "1", "--json", str(file)])
    assert time.process_time() - began < 60  # of all threads: others may have the cores just now
    report = Report.from_json(file.read_text(encoding="utf-8"))
    assert code == (0 if report.held else 1)
    said = capsys.readouterr().err
    for number, name in enumerate(store.PARTS, 1):
        assert f"part {number} of {len(store.PARTS)}: {name}" in said
    names = [one.name for one in report.criteria]
    assert len(names) == len(set(names))
    for part in ("apply", "search docstrings", "search glove", "ingest", "sustained", "runbook", "filters", "memory"):
        assert any(name.startswith(part) for name in names), part
    assert all(one.figure is not None for one in report.criteria)
    missed = [one for one in report.criteria if one.name.startswith(FINDING) and not one.held]
    assert not missed
