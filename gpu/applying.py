"""What one batch changes: from what is known about its ids to what is to be done. Pure, and without a loop over rows.

Per id the highest version wins, and what is known already changes nothing; see `headrace.gpu.rows.Action` for what a
worker is told to do with a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from headrace.gpu.rows import Action, Batch
from headrace.gpu.versions import Versions, compare

__all__ = ["Decision", "Known", "decide", "strangers", "without_rows"]

_Ints = npt.NDArray[np.int64]


_NONE: _Ints = np.empty(0, dtype=np.int64)
_DROP, _KEEP, _HOLD = (int(action) for action in (Action.DROP, Action.KEEP, Action.HOLD))


@dataclass(frozen=True, slots=True)
class Known:
    """What a store knows about the ids of a batch.

    Attributes
    ----------
    live : bool (n,)
        There is a row.
    remembered : bool (n,)
        There is none, but its deletion is remembered.
    versions : Versions
        Of the rows and the deletions; anything where neither is known.
    """

    live: npt.NDArray[np.bool_]
    remembered: npt.NDArray[np.bool_]
    versions: Versions


@dataclass(frozen=True, slots=True)
class Decision:
    """Positions in the batch, int64 each, of what is to be done.

    Attributes
    ----------
    relabel : rows that are here at this version and take over the batch's cell
    kill : rows that are here and go
    insert : rows to write; `vector_rows` are their vectors' and attributes' positions
    renew : deletions that are remembered and get a newer version
    remember : deletions to remember that are not yet
    release : remembered deletions that end because the row is inserted
    missing : rows told to KEEP that are not here
    foreign : int
        Records decided by timestamp.
    """

    relabel: _Ints
    kill: _Ints
    insert: _Ints
    vector_rows: _Ints
    renew: _Ints
    remember: _Ints
    release: _Ints
    missing: _Ints
    foreign: int


def decide(batch: Batch, known: Known) -> Decision:
    """Compare a batch with what is known.

    Parameters
    ----------
    batch : Batch
        Each id at most once.
    known : Known
    """
    heard = known.live | known.remembered
    if batch.instead is None and not heard.any():
        return _all_new(batch)
    order, crossed = compare(Versions(batch.topic_partitions, batch.offsets, batch.timestamps), known.versions)
    if batch.instead is not None:
        same_place = known.versions.topic_partitions == batch.instead.topic_partitions
        order = np.where(same_place & (known.versions.offsets == batch.instead.offsets), 1, order)
    order = np.where(heard, order, 1)
    drop, keep, hold = (batch.actions == action for action in (_DROP, _KEEP, _HOLD))
    same_row = (order == 0) & known.live & ~drop
    acts = (order >= 0) & ~same_row & ~keep
    insert = np.flatnonzero(acts & hold)
    vector_at = np.cumsum(hold) - 1
    return Decision(
        relabel=np.flatnonzero(same_row),
        kill=np.flatnonzero(acts & known.live),
        insert=insert,
        vector_rows=vector_at[insert],
        renew=np.flatnonzero(acts & drop & known.remembered),
        remember=np.flatnonzero(acts & drop & ~known.remembered),
        release=np.flatnonzero(acts & hold & known.remembered),
        missing=np.flatnonzero((order >= 0) & ~same_row & keep),
        foreign=int(np.count_nonzero(crossed & heard)),
    )


def strangers(decision: Decision) -> _Ints:
    """Deletions to remember of ids that have no row here: they take memory, and give none back."""
    return np.setdiff1d(decision.remember, decision.kill, assume_unique=True)


def without_rows(decision: Decision, batch: Batch, *, strangers_too: bool) -> Decision:
    """What of a decision can be done where there is no room for its rows: deletions, rows that go, new cells.

    The rows that it would replace stay: nothing is taken away without what comes instead. With `strangers_too`
    deletions of ids that have no row here are left out, too.
    """
    kill = decision.kill[batch.actions[decision.kill] == _DROP]
    remember = np.intersect1d(decision.remember, kill) if strangers_too else decision.remember
    return replace(
        decision, kill=kill, remember=remember, insert=_NONE, vector_rows=_NONE, release=_NONE, missing=_NONE
    )


def _all_new(batch: Batch) -> Decision:
    """What `decide` says of ids that nobody has heard of: most batches, and small ones come often."""
    hold = batch.actions == _HOLD
    if hold.all():
        insert = vector_rows = np.arange(len(batch))
        remember = missing = _NONE
    else:
        insert, vector_rows = np.flatnonzero(hold), np.arange(len(batch.vectors))
        remember, missing = np.flatnonzero(batch.actions == _DROP), np.flatnonzero(batch.actions == _KEEP)
    return Decision(_NONE, _NONE, insert, vector_rows, _NONE, remember, _NONE, missing, 0)
