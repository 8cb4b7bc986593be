"""The demo's checks can fail: each thing that may be wrong with an index is found, and only that."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.errors import BackendError, ConfigError
from headrace.pipeline import cli, demo
from headrace.pipeline.cli_common import Session
from headrace.pipeline.demo import Options, run
from headrace.pipeline.demo_checks import Difference, Expected, Seen, compare, exact_scores, percentiles, recall
from headrace.pipeline.demo_display import _rows
from headrace.pipeline.demo_stream import MOST, Ledger, Pacer, applied
from headrace.pipeline.results import Write

EXPECTED = {"a": Expected(0, 5, "one"), "b": Expected(1, 7, "two")}
A, B = Seen("a", 0, 5, "one"), Seen("b", 1, 7, "two")
RIGHT: dict[str, list[Seen]] = {"w1": [A, B], "w2": [B, A]}
ANSWERS: list[tuple[str, Seen | None]] = [("a", A), ("b", B), ("gone", None)]


def check(
    copies: dict[str, list[Seen]] = RIGHT, answers: Iterable[tuple[str, Seen | None]] = ANSWERS, needed: int = 2
) -> Difference:
    return compare(EXPECTED, copies, answers, needed)


def test_what_is_right_has_no_difference() -> None:
    assert not check()
    assert not compare({}, {"w1": []}, [], 1)


def test_an_id_on_too_few_copies_is_missing() -> None:
    assert check({"w1": [A, B], "w2": [B]}) == Difference(missing=[("a", "on 1 of 2 copies")])
    assert not check({"w1": [A, B], "w2": [B]}, needed=1)
    assert check({"w1": [A], "w2": [A]}, needed=1).missing == [("b", "on 0 of 1 copies")]


def test_an_id_that_a_read_does_not_return_is_missing() -> None:
    assert check(answers=[("a", A), ("b", None)]) == Difference(missing=[("b", "get")])


def test_a_read_that_leaves_an_id_out_is_not_taken_for_an_answer() -> None:
    assert check(answers=[("a", A)]) == Difference(missing=[("b", "never asked for")])


def test_what_was_deleted_or_never_written_is_a_ghost() -> None:
    gone = Seen("gone", 0, 3, "x")
    assert check({"w1": [A, B, gone], "w2": [B, A]}) == Difference(ghosts=[("gone", "w1")])
    assert check(answers=[*ANSWERS[:2], ("gone", gone)]) == Difference(ghosts=[("gone", "get")])


def test_a_row_that_is_there_twice_is_a_ghost() -> None:
    assert check({"w1": [A, B, A], "w2": [B, A]}) == Difference(ghosts=[("a", "w1")])


@pytest.mark.parametrize("old", [Seen("a", 0, 4, "one"), Seen("a", 1, 5, "one"), Seen("a", 0, 5, "older")])
def test_another_version_or_text_is_stale(old: Seen) -> None:
    assert check({"w1": [A, B], "w2": [old, B]}) == Difference(stale=[("a", "w2")])
    assert check(answers=[("a", old), ("b", B)]) == Difference(stale=[("a", "get")])


def test_another_ids_row_is_stale() -> None:
    assert check(answers=[("a", Seen("b", 0, 5, "one")), ("b", B)]).stale == [("a", "get")]


@given(st.data())
def test_every_lost_row_is_found(data: st.DataObject) -> None:
    ids = [str(number) for number in range(12)]
    expected = {id_: Expected(0, int(id_), id_) for id_ in ids}
    row = {id_: Seen(id_, 0, int(id_), id_) for id_ in ids}
    copies = {worker: data.draw(st.sets(st.sampled_from(ids))) for worker in ("w1", "w2", "w3")}
    found = compare(
        expected, {name: [row[i] for i in held] for name, held in copies.items()}, [(i, row[i]) for i in ids], 2
    )
    assert {id_ for id_, _ in found.missing} == {i for i in ids if sum(i in held for held in copies.values()) < 2}
    assert not found.ghosts
    assert not found.stale


def test_recall_by_hand() -> None:
    ids = ["a", "b", "c", "d"]
    scores = [np.array([0.9, 0.8, 0.1, 0.2], dtype=np.float32)] * 2
    assert recall(ids, scores, [["a", "b"], ["b", "a"]], k=2) == 1.0
    assert recall(ids, scores, [["a", "c"], ["d", "c"]], k=2) == 0.25
    assert recall(ids, scores, [["a", "a"], []], k=2) == 0.25


def test_recall_counts_ties_but_no_ids_from_elsewhere() -> None:
    scores = [np.array([0.9, 0.5, 0.5 - 5e-6, 0.4], dtype=np.float32)]
    assert recall(["a", "b", "c", "d"], scores, [["a", "c"]], k=2) == 1.0
    assert recall(["a", "b", "c", "d"], scores, [["a", "d"]], k=2) == 0.5
    assert recall(["a", "b", "c", "d"], scores, [["a", "deleted"]], k=2) == 0.5


def test_recall_over_fewer_than_k_and_over_nothing() -> None:
    scores = [np.array([0.9, 0.5], dtype=np.float32)]
    assert recall(["a", "b"], scores, [["b", "a"]]) == 1.0
    assert recall([], [], []) == 0.0


def test_recall_refuses_answers_that_do_not_match_the_queries() -> None:
    with pytest.raises(ValueError, match="zip"):
        recall(["a"], [np.ones(1, dtype=np.float32)], [])


def test_exact_scores_in_pieces_are_the_whole_product() -> None:
    random = np.random.default_rng(0)
    vectors, queries = (random.random((count, 8), dtype=np.float32) for count in (30, 7))
    got = np.stack(list(exact_scores(vectors, queries, rows=3)))
    np.testing.assert_allclose(got, queries @ vectors.T, rtol=1e-6)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentiles([1.0, 2.0, 3.0, 100.0]) == {"p50": 3.0, "p99": 100.0}
    assert percentiles([]) == {}


# -- the stream --------------------------------------------------------------------------------------------------------


def test_a_fixed_rate_is_kept() -> None:
    pacer, sent, clock = Pacer(rate=100.0), 0, 50.0
    for step in range(101):
        sent += pacer.allow(clock + step * 0.02, sent)
    assert sent == 201


@pytest.mark.parametrize("capacity", [30, 120, 350, 2000])
def test_a_closed_loop_keeps_few_on_their_way_and_the_encoder_busy(capacity: int) -> None:
    pacer, sent, done, longest = Pacer(), 0, 0.0, 0.0
    pacer.look(1.0, 0)
    for step in range(1, 1001):  # ten seconds
        now = 1.0 + step * 0.01
        done = min(float(sent), done + capacity * 0.01)
        if step % 20 == 0:
            pacer.look(now, int(done))
        if step % 2 == 0:
            sent += pacer.allow(now, sent)
        if step > 300:
            longest = max(longest, sent - done)
    assert done > 0.55 * 10 * min(capacity, 350)
    assert longest <= 1.5 * MOST


def test_nothing_is_sent_while_nothing_is_applied() -> None:
    pacer, sent = Pacer(), 0
    pacer.look(1.0, 0)
    for step in range(100):
        pacer.look(1.0 + step, 0)
        sent += pacer.allow(1.0 + step, sent)
    assert 0 < sent <= MOST


def test_the_ledger_holds_the_last_acknowledged_version() -> None:
    ledger = Ledger()
    ledger.upserted(Write({0: 2}, 2, (("a", 0, 0), ("b", 0, 1))), {"a": "one", "b": "two"})
    ledger.upserted(Write({0: 3}, 1, (("a", 0, 2),)), {"a": "three"})
    ledger.removed(Write({0: 4}, 1, (("b", 0, 3),)))
    assert ledger.expected == {"a": Expected(0, 2, "three")}
    assert ledger.newest == ("a", Expected(0, 2, "three"))
    assert (ledger.deleted, ledger.sent) == ({"b"}, 4)


def test_applied_is_what_the_slowest_copy_has() -> None:
    workers = [
        {"state": "active", "watermarks": {0: 5, 1: 2}},
        {"state": "active", "watermarks": {0: 3, 1: 7}},
        {"state": "joining", "watermarks": {}},
    ]
    assert applied({"workers": workers}) == 5
    assert applied({"workers": []}) == 0


# -- what is refused before anything is started ------------------------------------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options that the demo would have been run with."""
    begun: list[Options] = []
    monkeypatch.setattr(demo, "run", lambda options: begun.append(options) or 0)
    return begun


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--copies", "3"], "3 copies cannot be on 2 workers"),
        (["--workers", "1", "--copies", "2"], "2 copies cannot be on 1 workers"),
        (["--workers", "100000"], "100000 workers are too many"),
        (["--json", "nowhere/report.json"], "name a file in a folder that is there"),
    ],
)
def test_what_cannot_be_is_refused_at_once(nothing_starts: list[Options], arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(cli.commands, ["demo", *arguments], obj=Session())
    assert (result.exit_code, told in result.output) == (2, True), result.output
    assert not nothing_starts
    with pytest.raises(ConfigError, match="copies cannot be"):
        run(Options(workers=1, copies=2))


@pytest.mark.parametrize(("workers", "copies"), [("1", 1), ("2", 2), ("3", 2)])
def test_as_many_copies_as_there_can_be(nothing_starts: list[Options], workers: str, copies: int) -> None:
    assert CliRunner().invoke(cli.commands, ["demo", "--workers", workers], obj=Session()).exit_code == 0
    assert [options.copies for options in nothing_starts] == [copies]


def test_a_backend_that_is_not_there_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise BackendError(f"{name} is not here")

    monkeypatch.setattr("headrace.gpu.backend.resolve", missing)
    monkeypatch.setattr(demo, "_read", lambda *_: pytest.fail("it went on"))
    with pytest.raises(BackendError, match="rapids is not here"):
        run(Options(backend="rapids"))


def test_a_single_copy_is_not_said_to_agree_with_others() -> None:
    assert dict(_rows({"verify": True, "copies": 2}))["verify"] == "all copies agree"
    assert dict(_rows({"verify": True, "copies": 1}))["verify"] == "one copy, nothing to compare it with"
    assert dict(_rows({"verify": False, "copies": 2}))["verify"] == "COPIES DIFFER"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_finds_everything_in_its_place(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert run(Options(docs=300, report=report)) == 0
    found = json.loads(report.read_text())
    assert (found["documents"], found["changed"], found["deleted"], found["count"]) == (300, 15, 6, 294)
    assert [found[name] for name in ("missing", "ghosts", "stale", "dead_letters")] == [0, 0, 0, 0]
    assert found["freshness_ms"]["count"] == 321
