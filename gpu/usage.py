"""What a store's memory is used for, measured by each structure itself."""

from __future__ import annotations

from typing import Any

from headrace.gpu.segments import Sealed
from headrace.gpu.table import Part, Table

__all__ = ["held", "segment_bytes", "statistics"]


_EXACT: dict[str, Any] = {"recall": 1.0, "effort": None, "reached": 1.0}


def segment_bytes(part: Part) -> dict[str, int]:
    """Bytes of one segment by purpose; "marks" are which rows are alive, and their cells."""
    return {**part.segment.nbytes(), "marks": part.marks.nbytes}


def held(table: Table) -> int:
    """Bytes of everything that a store keeps. To be called under its lock."""
    segments = sum(sum(segment_bytes(part).values()) for part in table.parts.values())
    return segments + table.directory.nbytes + table.remembered.nbytes


def statistics(table: Table, recall_target: float) -> dict[str, Any]:
    """Rows, segments, remembered deletions, and bytes by segment and by purpose. To be called under the store's lock.

    Parameters
    ----------
    table : Table
    recall_target : float
        What searches ask for by default.

    Returns
    -------
    dict
        ``rows``, ``remembered``: counts. ``segments``: for each its ``kind`` ("growing" or "sealed"), ``index`` (its
        index kind; "exact" while it has none), ``rows``, ``live``, ``bytes`` by purpose, and what a search by the
        default target gets there: its calibrated ``recall``, the ``effort`` (None: it is exact), and ``reached``, the
        highest recall that any effort was seen to reach; where that is below the target the search is exact.
        ``bytes``: by purpose, over all segments, with "id map" and "remembered" for what belongs to none.
    """
    purposes: dict[str, int] = {}
    segments = []
    for part in table.parts.values():
        sealed = isinstance(part.segment, Sealed)
        promise = part.segment.promise(recall_target) if isinstance(part.segment, Sealed) else _EXACT
        size = segment_bytes(part)
        for purpose, bytes_ in size.items():
            purposes[purpose] = purposes.get(purpose, 0) + bytes_
        segments.append(
            {
                "kind": "sealed" if sealed else "growing",
                "index": part.segment.params.kind if isinstance(part.segment, Sealed) else "exact",
                "rows": len(part.marks),
                "live": part.marks.live,
                "bytes": size,
                **promise,
            }
        )
    purposes |= {"id map": table.directory.nbytes, "remembered": table.remembered.nbytes}
    rows = sum(part.marks.live for part in table.parts.values())
    return {"rows": rows, "segments": segments, "remembered": table.remembered.count, "bytes": purposes}
