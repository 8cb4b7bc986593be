"""Freshness (I4): first visible minus Kafka's timestamp, outside fault windows and within."""

from __future__ import annotations

import math

from tests.history.events import FaultMark, FirstVisible
from tests.history.facts import Facts
from tests.history.report import Violation


def judge_freshness(
    facts: Facts, bound_ms: float = 100.0, *, settle: float = 0.0, fault_bound_ms: float | None = None
) -> tuple[list[Violation], dict[str, float]]:
    """I4: p99 of first visible minus Kafka's timestamp.

    Parameters
    ----------
    bound_ms : float
        For records that lived outside every fault window.
    settle : float
        Seconds by which a fault window outlasts its healing; a fault never healed lasts for ever.
    fault_bound_ms : float, optional
        For the slowest of the others.

    Returns
    -------
    violations, figures
        Figures in ms: p50, p99, max and count of the judged, and max and count within fault windows.
    """
    windows: list[tuple[float, float]] = []
    marks = [event for event in facts.events if isinstance(event, FaultMark)]
    for mark in (mark for mark in marks if not mark.healed):
        healed = [m.time for m in marks if m.healed and m.what == mark.what and m.time >= mark.time]
        windows.append((mark.time, min(healed, default=math.inf) + settle))
    judged: list[tuple[float, int]] = []
    faulty: list[tuple[float, int]] = []
    found: list[Violation] = []
    for index, event in enumerate(facts.events):
        if not isinstance(event, FirstVisible):
            continue
        write = facts.known.get((event.topic_partition, event.offset))
        if write is None:
            place = (event.topic_partition, event.offset)
            found.append(Violation("I4", f"{place} was seen but never produced", (index,)))
            continue
        born = write.record.timestamp_ms / 1000
        late = (event.time - born) * 1000
        if late < -1.0:  # timestamps are whole milliseconds
            message = f"{write.record.id!r} was visible {-late:.0f} ms before Kafka's timestamp: a clock is off"
            found.append(Violation("I4", message, (index, write.at)))
        overlaps = any(begin <= event.time and born <= end for begin, end in windows)
        (faulty if overlaps else judged).append((late, index))
    judged.sort()
    figures = {"fresh_count": float(len(judged)), "fault_count": float(len(faulty))}
    if judged:
        p99, at = judged[math.ceil(0.99 * len(judged)) - 1]
        figures |= {"fresh_p50": judged[(len(judged) - 1) // 2][0], "fresh_p99": p99, "fresh_max": judged[-1][0]}
        if p99 > bound_ms:
            found.append(Violation("I4", f"p99 freshness is {p99:.1f} ms of {len(judged)}, over {bound_ms:g}", (at,)))
    if faulty:
        figures["fault_max"], at = max(faulty)
        if fault_bound_ms is not None and figures["fault_max"] > fault_bound_ms:
            found.append(Violation("I4", f"{figures['fault_max']:.1f} ms in a fault, over {fault_bound_ms:g}", (at,)))
    return found, figures
