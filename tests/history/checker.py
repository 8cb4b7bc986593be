"""The offline judge of a history: invariants I1 to I5, and what each read was promised.

==========  ================================================================================================
I1          nothing acknowledged is lost: every live id is on every copy of its cell, once quiet
I2          the last writer wins: the highest acknowledged version, with its value, and copies agree
I3          no ghosts: nothing never produced, deleted, refused, twice in one answer, or on a stray worker
I4          freshness: first visible minus Kafka's timestamp, p99, outside fault windows
I5          an honest watermark: answers show what their applied offsets claim; watermarks and commits only rise
promise     what a level of consistency had to show: see `tests.history.promises`
failed      a read ended in an error that is no passed deadline (only where it is asked for)
history     the history contradicts itself, or holds nothing to judge an invariant by
==========  ================================================================================================

Only what is certain counts. A record without acknowledgement may exist or not. An answer may show more than it claims:
anything sent before it finished. A refused record is no write. For an id in several topic partitions the last version
of each is compared by Kafka's timestamp, and a tie allows either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from tests.history.answers import judge_answers
from tests.history.copies import judge_copies
from tests.history.events import Committed, History, Origin, Read, WatermarkSample
from tests.history.facts import Facts, facts_of
from tests.history.freshness import judge_freshness
from tests.history.levels import figures_of, judge_errors
from tests.history.promises import LEVELS, level_of
from tests.history.report import INVARIANTS, Report, Violation
from tests.history.watermarks import judge_watermarks

__all__ = ["INVARIANTS", "LEVELS", "Report", "Violation", "check_all", "check_freshness"]


def check_freshness(
    history: History, bound_ms: float = 100.0, *, settle: float = 0.0, fault_bound_ms: float | None = None
) -> tuple[list[Violation], dict[str, float]]:
    """I4 alone, and its figures; see `tests.history.freshness`."""
    return judge_freshness(facts_of(history), bound_ms, settle=settle, fault_bound_ms=fault_bound_ms)


def check_all(
    history: History,
    *,
    freshness_ms: float | None = 100.0,
    settle: float = 0.0,
    fault_bound_ms: float | None = None,
    required: Collection[str] = ("I1", "I2", "I3"),
    errors: bool = True,
    shown: int = 20,
) -> Report:
    """Judge a history by everything.

    Parameters
    ----------
    freshness_ms, settle, fault_bound_ms
        As in `check_freshness`; None skips I4, for machines whose own stalls would be judged.
    required : collection of str
        Invariants and levels that must have had something to be judged by; a history that proves nothing must not pass.
    errors : bool
        Whether a read may not fail but for a passed deadline; False where a test expects errors of its own.
    shown : int
        At most so many violations in the text.
    """
    facts = facts_of(history)
    found = [*facts.broken, *judge_copies(facts)]
    figures: dict[str, float] = {}
    if freshness_ms is not None:
        slow, figures = judge_freshness(facts, freshness_ms, settle=settle, fault_bound_ms=fault_bound_ms)
        found += slow
    found += [*judge_answers(facts), *judge_watermarks(facts), *(judge_errors(facts) if errors else ())]
    reads = [event for event in facts.events if isinstance(event, Read)]
    figures |= {"reads": float(len(reads)), "failed_reads": float(sum(bool(read.error) for read in reads))}
    figures |= figures_of(facts)
    judged = _judged(facts, int(figures.get("fresh_count", 0)))
    found += [Violation("history", f"nothing to judge {name} by") for name in required if not judged[name]]
    origin = next((event for event in facts.events if isinstance(event, Origin)), Origin())
    return Report(tuple(found), judged, figures, origin, shown)


def _judged(facts: Facts, fresh: int) -> dict[str, int]:
    """How much there was to judge each invariant and each level by."""
    kinds = Counter(type(event) for event in facts.events)
    answers = [event for event in facts.events if isinstance(event, Read) and not event.error]
    scanned = len(facts.counted & facts.final.keys()) if facts.known else 0
    levels = Counter(map(level_of, answers))
    return {
        "I1": scanned,
        "I2": scanned,
        "I3": scanned + len(answers),
        "I4": fresh,
        "I5": kinds[WatermarkSample] + kinds[Committed] + sum(read.applied is not None for read in answers),
        "promise": sum(levels[level] for level in LEVELS if level != "eventual"),
        **{level: levels[level] for level in LEVELS},
    }
