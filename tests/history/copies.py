"""The copies, once quiet: nothing acknowledged lost (I1), the last writer wins (I2), no ghosts (I3)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

from tests.history.events import Id, Stored, Verified
from tests.history.facts import Facts
from tests.history.report import Violation


def judge_copies(facts: Facts) -> list[Violation]:
    """What the last scan of all workers shows, against what was acknowledged."""
    return [*_rows(facts), *_spread(facts)]


def _rows(facts: Facts) -> Iterator[Violation]:
    for worker in sorted(facts.counted & facts.final.keys()):
        at, state = facts.final[worker]
        for id, times in Counter(row.id for row in state.rows).items():
            if times > 1:
                yield Violation("I3", f"{worker} holds {id!r} {times} times", (at,))
        for row in state.rows:
            if found := facts.verdict(row, facts.floor(row.id, None), state.time):
                invariant = "I2" if found.invariant == "stale" else found.invariant
                yield Violation(invariant, f"on {worker}: {found.message}", (at, *found.events))
            if worker not in facts.placement.cells.get(row.cell, (worker,)):
                yield Violation("I3", f"{worker} holds {row.id!r} of cell {row.cell}, which is placed elsewhere", (at,))
    for index, event in enumerate(facts.events):
        if isinstance(event, Verified) and not event.ok:
            yield Violation("I2", f"the digests of copies differ: {', '.join(event.differences)}", (index,))


def _spread(facts: Facts) -> Iterator[Violation]:
    for worker in sorted(facts.counted - facts.final.keys()):
        yield Violation("I1", f"{worker} is in the placement but was not scanned")
    if not facts.final:
        return
    held: dict[Id, dict[str, Stored]] = defaultdict(dict)
    cells: dict[int, set[str]] = {cell: set(workers) for cell, workers in facts.placement.cells.items()}
    for worker in facts.counted & facts.final.keys():
        for row in facts.final[worker][1].rows:
            held[row.id][worker] = row
            if row.cell not in facts.placement.cells:
                cells.setdefault(row.cell, set()).add(worker)
    wanted = min(facts.placement.replicas or 0, len(facts.counted))
    for cell, workers in sorted(cells.items()):
        if len(workers) < wanted:
            yield Violation("I1", f"cell {cell} has {len(workers)} of {wanted} copies: {sorted(workers)}")
    for id in {**facts.sure, **held}:
        floor, rows = facts.floor(id, None), held.get(id, {})
        expected = facts.must_be(id, floor, math.inf)
        cited = (floor.at,) if floor else ()
        if expected and not rows:
            yield Violation("I1", f"{id!r} was acknowledged and is on no copy", cited)
        if len(homes := {row.cell for row in rows.values()}) > 1:
            yield Violation("I3", f"{id!r} is in cells {sorted(homes)} at once", cited)
        if len(versions := {(row.topic_partition, row.offset, row.digest) for row in rows.values()}) > 1:
            yield Violation("I2", f"copies hold {id!r} at different versions: {sorted(versions)}", cited)
        for worker in sorted({worker for cell in homes for worker in cells[cell]} & facts.final.keys() - rows.keys()):
            yield Violation("I1" if expected else "I2", f"{id!r} is missing from the copy on {worker}", cited)
