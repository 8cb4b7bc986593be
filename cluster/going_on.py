"""Whether a worker may still be read by an older placement once it knows a newer one. Pure."""

from __future__ import annotations

from headrace.cluster.state import CollectionState

__all__ = ["goes_on"]


def goes_on(old: CollectionState, new: CollectionState, worker: str) -> bool:
    """Whether whoever reads `worker` by the `old` state finds all that it looks for there, now that it has the `new`.

    It looks for the rows of cells that the worker served then. They are all there as long as rows have the same cells
    and the worker serves these still; where others are sent rows too, or are gone, is no matter of this one's. So when
    a worker is lost, the rest go on answering those who have not heard of it. By another codebook a row may be in a
    cell that nobody who reads by the old one asks for.
    """
    if _rows_are_kept_by(old) != _rows_are_kept_by(new):
        return False
    return all(worker in new.serving.get(cell, ()) for cell, holders in old.serving.items() if worker in holders)


def _rows_are_kept_by(state: CollectionState) -> tuple[str, int, int, int]:
    previous = -1 if state.previous is None else state.previous.generation
    return state.spec.uid, state.incarnation, state.codebook.generation, previous
