"""One answer out of those of several workers. Pure.

A row that moves may be told of by two: per id the newer version counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from headrace.cluster.wire import offsets_from_wire, rows_from_wire
from headrace.gpu.store import StoredRow
from headrace.pipeline.cuts import left_behind
from headrace.pipeline.queries import best
from headrace.pipeline.results import Hits, Row, Rows

__all__ = ["all_found", "hits_of", "nothing_near", "row_of", "rows_of", "size_of"]

Answers = Sequence[Mapping[str, Any]]


def hits_of(answers: Answers, queries: int, limit: int, metric: str) -> list[Hits]:
    """The best `limit` hits of each query."""
    applied = _lowest(answers)
    return [
        Hits(best([(a["rows"][at], a["scores"][at]) for a in answers], limit, metric), applied) for at in range(queries)
    ]


def nothing_near(answers: Answers) -> bool:
    """Whether no row that was on its way between the workers belongs into the hits.

    A worker has left out of ``near`` what is worse than all it found: of no use only as long as all that counts, so
    none of it may be an older version of what another one found.
    """
    versions: dict[Any, tuple[int, int]] = {}
    for answer in answers:
        for row in (row for rows in answer["rows"] for row in rows):
            if versions.setdefault(row[0], (row[1], row[2])) != (row[1], row[2]):
                return False
    return not left_behind([(offsets_from_wire(a["applied"]), offsets_from_wire(a["near"])) for a in answers])


def all_found(answers: Answers) -> bool:
    """Whether there is a row for each id that was asked for."""
    return all(any(copies) for copies in zip(*(answer["rows"] for answer in answers), strict=True))


def rows_of(answers: Answers) -> Rows:
    """A row, or None, for each id that was asked for."""
    rows: list[Row | None] = []
    for copies in zip(*(rows_from_wire(answer["rows"]) for answer in answers), strict=True):
        there = [row for row in copies if row is not None]
        rows.append(row_of(max(there, key=lambda row: row.offset)) if there else None)
    return Rows(rows, _lowest(answers))


def size_of(answers: Answers) -> int:
    """How many rows all cells have; of copies that differ, the larger counts. Where all tell ids, these are counted."""
    ids = [answer["ids"] for answer in answers]
    if ids and all(each is not None for each in ids):
        return len(np.unique(np.concatenate([np.frombuffer(each, dtype="<u8") for each in ids])))
    sizes: dict[int, int] = {}
    for answer in answers:
        for cell, rows in answer["cell_sizes"]:
            sizes[cell] = max(sizes.get(cell, 0), rows)
    return sum(sizes.values())


def row_of(row: StoredRow) -> Row:
    """A row as users see it."""
    return Row(row.id, row.topic_partition, row.offset, row.timestamp, row.cell, row.attributes, row.vector)


def _lowest(answers: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """What all of them had applied."""
    low: dict[int, int] = {}
    for answer in answers:
        for tp, offset in offsets_from_wire(answer["applied"]).items():
            low[tp] = min(low.get(tp, offset), offset)
    return low
