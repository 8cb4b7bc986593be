"""Rows that answer although they should not be: a damaged store may show two rows of one id, or one that is deleted.

A live row is rightful if the directory of ids names its very place; there can be one for each id. A healthy store has
no other live rows, in no view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headrace.gpu.places import places_of
from headrace.gpu.rows import Id
from headrace.gpu.table import Table

__all__ = ["drop_strays"]


def drop_strays(table: Table, ids: Sequence[Id], hashes: npt.NDArray[np.uint64]) -> int:
    """Kill those rows of `ids` that the directory does not name; returns how many.

    Takes the lock, though not while it looks for them; what a merge takes to another segment meanwhile stays.

    Parameters
    ----------
    table : Table
    ids : sequence of str or int, (n,)
    hashes : uint64 (n,)
    """
    if not len(ids):
        return 0
    candidates = []
    for shown in table.view.segments:
        rows = np.flatnonzero(shown.alive)
        rows = rows[np.isin(shown.segment.ids.hashes(rows), hashes)]
        if len(rows):
            candidates.append((shown.segment, rows))
    dropped = 0
    with table.lock:
        for segment, rows in candidates:
            part = table.parts.get(segment.serial)
            rows = rows[:0] if part is None else rows[part.marks.alive[rows]]
            if part is None or not len(rows):
                continue
            _, places = table.directory.find(segment.ids.hashes(rows), segment.ids.to_list(rows))
            strays = rows[places != places_of(segment.serial, rows)]
            if len(strays):
                part.marks.kill(strays)
                dropped += len(strays)
        table.publish()
    return dropped
