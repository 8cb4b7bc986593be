"""The last moments of a store, for a read whose answers come from several workers and must fit together.

Workers apply the same batches a little before or after each other, so while much is written one has nearly always taken
a row away that another has not taken in yet. Who is ahead need not wait for the other, who goes on meanwhile: it can
answer from the moment at which both were equally far. A `View` is never written again, so all it takes is to keep it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from headrace.gpu.store import View

__all__ = ["Moments"]

_MOST = 32
_SECONDS = 0.25
_BYTES = 64 << 20
"""Of marks that only kept views have: of ten million rows, a batch copies ten megabytes of them, fifty where rows get
other cells."""


class Moments:
    """The last views that were published, newest last. Belongs to one event loop.

    Few and young, because each keeps a byte a row of those segments in which rows died since, and segments that have
    been merged: `clear` it when they are.

    Parameters
    ----------
    clock : callable
        Seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: deque[tuple[float, View, int]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def note(self, view: View) -> None:
        """This is how it is now."""
        size = _own(view, self._kept[-1][1]) if self._kept else 0
        self._kept.append((self._clock(), view, size))
        self._bytes += size
        while len(self._kept) > _MOST or (self._bytes > _BYTES and len(self._kept) > 1):
            self._let_go()
        self.tidy()

    def tidy(self) -> None:
        """Let go of those that are too old to be of use."""
        oldest = self._clock() - _SECONDS
        while self._kept and self._kept[0][0] < oldest:
            self._let_go()

    def _let_go(self) -> None:
        self._kept.popleft()
        # What a view has of its own counts from when the next one has another.
        self._bytes -= self._kept[0][2] if self._kept else self._bytes

    def clear(self) -> None:
        """What was before is not to be shown any more, or takes memory."""
        self._kept.clear()
        self._bytes = 0

    def before(self, cut: Mapping[int, int], required: Mapping[int, int]) -> View | None:
        """The newest moment from which no record at or above `cut` had taken a row away, with all of `required`
        applied; None if there is none, or it is kept no longer.
        """
        for _, view, _ in reversed(self._kept):
            if all(offset <= cut.get(tp, 0) for tp, offset in view.moved.items()):
                # Older ones have applied less.
                return view if all(view.stamp.get(tp, 0) >= offset for tp, offset in required.items()) else None
        return None


def _own(view: View, before: View) -> int:
    """Bytes of marks that were copied for `view`: so much is kept by `before` alone."""
    shared = {id(_memory(marks)) for part in before.segments for marks in (part.alive, part.cells)}
    return sum(
        marks.nbytes for part in view.segments for marks in (part.alive, part.cells) if id(_memory(marks)) not in shared
    )


def _memory(marks: npt.NDArray[Any]) -> Any:
    return marks if marks.base is None else marks.base
