"""Answers against the log: what a read shows, what it leaves out, and what it says that it had applied.

An answer shows at least the prefix of each topic partition that it claims (or had to show), and may show more of it:
whatever was sent before it finished. It never shows what no prefix holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tests.history.events import Id, Offsets, Read, WatermarkSample
from tests.history.facts import Facts, Rising, highest
from tests.history.promises import Promises
from tests.history.report import Violation


def judge_answers(facts: Facts) -> list[Violation]:
    """Every answer, of whatever level: I3, I2 and I5, and the promise of its level."""
    return list(_reads(facts))


def _reads(facts: Facts) -> Iterator[Violation]:
    samples = [(i, e) for i, e in enumerate(facts.events) if isinstance(e, WatermarkSample)]
    reported = {key: Rising((s.time, i, s.offsets) for i, s in samples if (s.worker, s.incarnation) == key)
                for key in {(s.worker, s.incarnation) for _, s in samples}}  # fmt: skip
    promises = Promises(facts)
    for index, read in enumerate(facts.events):
        if not isinstance(read, Read) or read.error:
            continue
        promised = promises.of(read)
        claimed = dict(read.applied or {})
        if read.applied is not None:
            short = {p: (claimed.get(p, 0), offset) for p, offset in promised.items() if claimed.get(p, 0) < offset}
            if short:
                missing = ", ".join(f"{p}: {got} of {offset}" for p, (got, offset) in sorted(short.items()))
                yield Violation(
                    "promise", f"a {read.consistency} read had not applied its offsets ({missing})", (index,)
                )
        if (key := (read.worker, read.incarnation)) in reported:
            claimed = highest(claimed, reported[key].offsets(read.started))
        yield from _one_read(facts, index, read, claimed, highest(claimed, promised))


def _one_read(facts: Facts, index: int, read: Read, claimed: Offsets, bound: Offsets) -> Iterator[Violation]:
    asked = Counter(read.asked)
    returned = Counter(row.id for row in read.results)
    what = f"{read.consistency} {read.kind}"
    for id, times in returned.items():
        if times > max(1, asked[id]):
            yield Violation("I3", f"{what}: one answer holds {id!r} {times} times", (index,))
        if read.kind == "get" and id not in asked:
            yield Violation("I3", f"{what}: {id!r} was answered but not asked for", (index,))
    for row in read.results:
        if found := facts.verdict(row, facts.floor(row.id, bound), read.finished):
            # the answer's own claim is the graver breach; else it claimed little and broke what it was asked to show
            by_claim = not found.depends or facts.verdict(row, facts.floor(row.id, claimed), read.finished)
            invariant = "I5" if found.invariant == "stale" else found.invariant
            yield Violation(invariant if by_claim else "promise", f"{what}: {found.message}", (index, *found.events))
    # one copy alone holds only its cells, so only what it does show can be judged
    expected: Iterable[Id] = () if read.worker or read.kind == "search" else asked if read.kind == "get" else facts.sure
    for id in expected:
        floor = facts.floor(id, bound)
        if id not in returned and floor is not None and facts.must_be(id, floor, read.finished):
            invariant = "I5" if facts.must_be(id, facts.floor(id, claimed), read.finished) else "promise"
            place = (floor.record.topic_partition, floor.record.offset)
            yield Violation(invariant, f"{what}: {id!r}, written at {place}, is missing", (index, floor.at))
