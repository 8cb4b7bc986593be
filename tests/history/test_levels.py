"""Each level's promise, and a history made by hand that breaks it: the one promise must be named, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.history.checker import check_all
from tests.history.events import Answer, Event, History, Offsets, Produced, Read, TopicEnds

# Topic partition 0: "a" at 0, "b" at 1, "a" again at 2 (by "me"), "b" deleted at 3 (by "other"), "c" at 4; each second
LOG: list[Event] = [
    Produced("a", 0, 0, 1000, acked_at=1.1, sent_at=1.0, client="me"),
    Produced("b", 0, 1, 2000, acked_at=2.1, sent_at=2.0, client="other"),
    Produced("a", 0, 2, 3000, acked_at=3.1, sent_at=3.0, client="me"),
    Produced("b", 0, 3, 4000, True, acked_at=4.1, sent_at=4.0, client="other"),
    Produced("c", 0, 4, 5000, acked_at=5.1, sent_at=5.0, client="other"),
]
A0, B1, A2, C4 = Answer("a", 0, 0), Answer("b", 0, 1), Answer("a", 0, 2), Answer("c", 0, 4)
MOMENTS = {0: (), 1: (A0,), 2: (A0, B1), 3: (A2, B1), 4: (A2,), 5: (A2, C4)}


def answer(level: str, at: float, prefix: int, *, applied: Offsets | None = None, **fields: Any) -> Read:
    """An exhaustive answer that is right for the first `prefix` records, and says so."""
    given = {"kind": "scan", "client": "me", "results": MOMENTS[prefix], **fields}
    return Read(
        consistency=level,
        started=at,
        finished=at + 0.01,
        required={},
        applied={0: prefix} if applied is None else applied,
        **given,
    )


def broken(*reads: Event) -> list[str]:
    report = check_all(History.of([*LOG, *reads]), freshness_ms=None, required=())
    return sorted({violation.invariant for violation in report.violations})


HELD: dict[str, list[Event]] = {
    "strong shows the end as it was when it began": [answer("strong", 3.5, 3)],
    "strong may show what came since": [answer("strong", 3.05, 3)],
    "strong need not show what is under way": [answer("strong", 3.05, 2)],
    "strong says nothing when its time is over": [
        answer("strong", 6, 0, applied={}, error="ConsistencyTimeout: 3 of 5", results=()),
    ],
    "session shows its own, not others'": [answer("session", 4.5, 3)],
    "session shows what it has shown": [answer("session", 4.5, 4), answer("session", 5.6, 5)],
    "session of another may be behind": [answer("session", 4.5, 4), answer("session", 4.6, 3, client="third")],
    "bounded shows the end as it was then": [answer("bounded:1000", 5.5, 4)],
    "bounded by much need not show anything": [answer("bounded:60000", 6, 0)],
    "eventual may show any moment": [answer("eventual", 6 + n, prefix) for n, prefix in enumerate((5, 0, 3, 1))],
    "eventual may show more than it claims": [answer("eventual", 6, 4, applied={0: 2})],
    "a get of ids that are not there": [answer("strong", 6, 5, kind="get", asked=("a", "b", "c", "d"))],
}

BROKEN: dict[str, tuple[str, list[Event]]] = {
    "strong is older than the end that was acknowledged": ("promise", [answer("strong", 5.5, 4)]),
    "strong is older than the end that was seen": (
        "promise",
        [TopicEnds(5.05, {0: 5}), answer("strong", 5.06, 4)],
    ),
    "strong claims the end but shows an older version": ("I5", [answer("strong", 3.5, 3, results=(A0, B1))]),
    "strong claims the end but lacks an id": ("I5", [answer("strong", 5.5, 5, results=(A2,))]),
    "strong lacks an id in a get": ("I5", [answer("strong", 5.5, 5, kind="get", asked=("c",), results=())]),
    "strong claims nothing and lacks an id": ("promise", [answer("strong", 5.5, 5, applied={}, results=(A2,))]),
    "strong shows what was deleted": ("I3", [answer("strong", 5.5, 5, results=(A2, B1, C4))]),
    "session lacks its own write": ("promise", [answer("session", 3.5, 2)]),
    "session shows less than an answer before": ("promise", [answer("session", 4.5, 4), answer("session", 4.6, 3)]),
    "session shows an older version than before": (
        "I5",
        [answer("eventual", 4.5, 3, applied={0: 0}), answer("session", 4.6, 3, results=(A0, B1))],
    ),
    "session forgets a row that it saw above what was claimed": (
        "promise",
        [answer("eventual", 5.5, 5, applied={0: 3}), answer("session", 5.6, 4)],
    ),
    "bounded is older than its bound": ("promise", [answer("bounded:1000", 5.5, 3)]),
    "bounded is older than the end that was seen": (
        "promise",
        [TopicEnds(4.01, {0: 4}), answer("bounded:50", 4.07, 3)],
    ),
    "eventual invents an id": ("I3", [answer("eventual", 6, 5, results=(A2, C4, Answer("x", 0, 9)))]),
    "eventual invents a version": ("I3", [answer("eventual", 6, 5, results=(Answer("a", 0, 1), C4))]),
    "eventual shows what was deleted before its claim": ("I3", [answer("eventual", 6, 5, results=(A2, B1, C4))]),
    "eventual shows what was not yet written": ("I3", [answer("eventual", 4.5, 5)]),
    "eventual lacks what it claims": ("I5", [answer("eventual", 6, 5, results=(C4,))]),
    "eventual lacks an id on its way between copies": ("I5", [answer("eventual", 6, 3, results=(B1,))]),
    "eventual shows an id twice": ("I3", [answer("eventual", 6, 5, results=(A2, A2, C4))]),
    "eventual fails": ("failed", [answer("eventual", 6, 0, error="ConsistencyTimeout: never", results=())]),
    "strong fails by something else": ("failed", [answer("strong", 6, 0, error="ClusterError: gone", results=())]),
}


@pytest.mark.parametrize("name", HELD)
def test_a_kept_promise_passes(name: str) -> None:
    assert not broken(*HELD[name])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_caught(name: str) -> None:
    invariant, reads = BROKEN[name]
    assert broken(*reads) == [invariant]


def test_deadlines_are_counted_by_level() -> None:
    late = answer("strong", 6, 0, error="ConsistencyTimeout: 3 of 5", results=())
    other = replace(late, consistency="bounded:100", error="BrokerError: gone")
    report = check_all(History.of([*LOG, late, late, other, answer("session", 6, 5)]), freshness_ms=None, required=())
    assert report.figures["strong_deadlines"] == 2
    assert report.figures["bounded_errors"] == 1
    assert (report.figures["session_answers"], report.figures["strong_answers"]) == (1, 0)
    assert report.judged["strong"] == 0
    nothing = check_all(History.of([*LOG, late]), freshness_ms=None, required=["strong"])
    assert [violation.invariant for violation in nothing.violations] == ["history"]
