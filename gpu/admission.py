"""What a store has room for: how much a batch will take, what of it may go in, and what was refused last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu import usage
from headrace.gpu.applying import Decision, strangers, without_rows
from headrace.gpu.budget import Budget
from headrace.gpu.columns import Columns
from headrace.gpu.errors import RecordTooLarge, StoreFull
from headrace.gpu.ids import IdColumn
from headrace.gpu.rows import Batch, Id
from headrace.gpu.table import Table

__all__ = ["PER_ID", "Admission"]

PER_ID = 64
"""Bytes that one more id takes beside its text, at most."""


class Admission:
    """The door of one store; every call is made under the lock of its table.

    Parameters
    ----------
    table : Table
        Still empty.
    budget : Budget
        Of the worker.
    xp : module
        numpy or cupy.
    ids : {"string", "integer"}
    """

    def __init__(self, table: Table, budget: Budget, xp: ModuleType, ids: str) -> None:
        self._table, self._budget, self._xp, self._ids = table, budget, xp, ids
        self._empty = usage.held(table)
        self._full = ""  # what was refused last, and not accepted since

    @property
    def full(self) -> bool:
        """Were the last rows, or deletions, refused?"""
        return bool(self._full)

    def look(self, size: int) -> None:
        """Say what the store holds now, and raise `StoreFull` if there is no room for `size` more bytes of rows."""
        self._budget.holds(self._table, usage.held(self._table))
        if size:
            self._room_for(size)

    def admit(self, batch: Batch, decision: Decision) -> tuple[Decision, StoreFull | None]:
        """What of a decision there is room for: all of it, or what needs none and why the rest is refused."""
        if self._budget.limit is None or not (len(decision.insert) or len(decision.remember)):
            return decision, None
        try:
            self._room_for(self._growth(batch, decision), self._deletions(batch, strangers(decision)))
        except StoreFull as error:
            refused = error
            if (too_large := self._too_large(batch, decision)) is not None:
                # What was refused before may have been refused for its sake; if not, the next record says so again.
                refused, self._full = too_large, ""
        else:
            return decision, None
        rest = without_rows(decision, batch, strangers_too=False)
        try:
            self._room_for(0, self._deletions(batch, strangers(rest)))
        except StoreFull as error:
            return without_rows(decision, batch, strangers_too=True), error
        return rest, refused

    def _growth(self, batch: Batch, decision: Decision) -> int:
        """Bytes that the rows to insert will take."""
        if not len(decision.insert):
            return 0
        ids, attributes = _to_insert(batch, decision)
        return self._table.growing.growth(ids, attributes) + PER_ID * len(ids)

    def _too_large(self, batch: Batch, decision: Decision) -> RecordTooLarge | None:
        """Why there is no room for the one row to insert, if an empty store had none either.

        Where it had none for a row without attributes, the limit is at fault and no record: None then.
        """
        limit = self._budget.limit
        if limit is None or len(decision.insert) != 1:
            return None
        ids, attributes = _to_insert(batch, decision)
        own = IdColumn(self._ids).growth(ids) + Columns(self._xp).growth(attributes, 1)
        room = limit - self._budget.kept - self._empty - PER_ID
        if not 0 <= room < own:
            return None
        return RecordTooLarge(
            f"its id and attributes take {own:,} bytes, and an empty worker has room for {room:,} of them: "
            f"store.memory-limit is {limit:,}; raise the limit and write the record again, or make it smaller"
        )

    def _deletions(self, batch: Batch, at: npt.NDArray[np.int64]) -> int:
        """Bytes that remembering the deletions at these positions will take."""
        ids = [batch.ids[row] for row in at.tolist()]
        return self._table.remembered.growth(ids) + PER_ID * len(ids) if ids else 0

    def _room_for(self, rows: int, deletions: int = 0) -> None:
        """Raise `StoreFull` if there is no room for so many more bytes."""
        if self._budget.limit is None:
            return
        self._budget.holds(self._table, usage.held(self._table))
        try:
            self._budget.admit(rows, deletions)
        except StoreFull:
            self._full = "rows" if rows else "deletions"
            raise
        if rows or self._full == "deletions":
            self._full = ""


def _to_insert(batch: Batch, decision: Decision) -> tuple[Sequence[Id], Mapping[str, Sequence[Any]]]:
    """Ids and attributes of the rows to insert."""
    at, held = decision.insert.tolist(), decision.vector_rows.tolist()
    attributes: Mapping[str, Sequence[Any]] = batch.attributes
    if len(held) < len(batch.vectors):
        attributes = {name: [values[row] for row in held] for name, values in attributes.items()}
    return batch.ids if len(at) == len(batch.ids) else [batch.ids[row] for row in at], attributes
