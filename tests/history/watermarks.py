"""Honest watermarks (I5): they never fall, and commits only rise and never pass an active copy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from tests.history.events import Committed, FinalState, Offsets, WatermarkSample
from tests.history.facts import Facts, Rising
from tests.history.report import Violation

_Seen = tuple[int, float, float, Offsets]  # event, started, finished, offsets


def _lower(earlier: Iterable[_Seen], later: Iterable[_Seen], message: str) -> Iterator[Violation]:
    """Where something asked for later was lower than what had been answered before."""
    before = Rising((finished, index, offsets) for index, _, finished, offsets in earlier)
    for index, started, _, offsets in later:
        for partition, (high, at) in before.before(started).items():
            if (low := offsets.get(partition, 0)) < high:
                yield Violation("I5", f"topic partition {partition}: {message.format(low=low, high=high)}", (at, index))


def judge_watermarks(facts: Facts) -> list[Violation]:
    """Each copy's watermark against itself, commits against themselves, and commits against active copies.

    A watermark only rises, so a commit had passed an active copy if that copy's watermark is still lower *afterwards*.
    """
    found: list[Violation] = []
    marks: dict[tuple[str, str], list[_Seen]] = defaultdict(list)
    active: list[tuple[str, _Seen]] = []
    commits: list[_Seen] = []
    for index, event in enumerate(facts.events):
        if isinstance(event, Committed):
            commits.append((index, event.time if event.started is None else event.started, event.time, event.offsets))
        elif isinstance(event, WatermarkSample):
            seen = (index, event.time if event.started is None else event.started, event.time, event.offsets)
            marks[event.worker, event.incarnation].append(seen)
            active += [(event.worker, seen)] if event.active else []
        elif isinstance(event, FinalState):
            seen = (index, event.time, event.time, event.watermarks)
            marks[event.worker, event.incarnation].append(seen)
            active += [(event.worker, seen)] if facts.final.get(event.worker) == (index, event) else []
    for (worker, _), seens in marks.items():
        found += _lower(seens, seens, f"the watermark of {worker} fell from {{high}} to {{low}}")
    found += _lower(commits, commits, "the committed offset fell from {high} to {low}")
    for worker in sorted({worker for worker, _ in active}):
        later = [seen for name, seen in active if name == worker]
        found += _lower(commits, later, f"{{high}} was committed while {worker} had applied only {{low}}")
    return found
