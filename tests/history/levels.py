"""How often each level was asked, and how often it gave up: a deadline is an answer that may be given, other errors
are not.
"""

from __future__ import annotations

from collections import Counter

from tests.history.events import Read
from tests.history.facts import Facts
from tests.history.promises import LEVELS, level_of
from tests.history.report import Violation

DEADLINE = "ConsistencyTimeout"
"""The error that says what was missing when the time was over; `Read.error` begins with it."""


def judge_errors(facts: Facts) -> list[Violation]:
    """Reads that failed, but for a wait that passed its deadline; eventual waits for nothing, so nothing excuses it."""
    return [
        Violation("failed", f"{read.consistency} {read.kind}: {read.error}", (index,))
        for index, read in enumerate(facts.events)
        if isinstance(read, Read) and read.error and not _gave_up(read)
    ]


def figures_of(facts: Facts) -> dict[str, float]:
    """Answers, deadlines that passed and other errors, by level; e.g. ``strong_deadlines``."""
    counts: Counter[str] = Counter()
    for read in facts.events:
        if isinstance(read, Read):
            what = "answers" if not read.error else "deadlines" if _gave_up(read) else "errors"
            counts[f"{level_of(read)}_{what}"] += 1
    return {
        name: float(counts[name])
        for level in LEVELS
        for what in ("answers", "deadlines", "errors")
        if counts[name := f"{level}_{what}"] or what == "answers"
    }


def _gave_up(read: Read) -> bool:
    return read.error.startswith(DEADLINE) and level_of(read) != "eventual"
