"""The latest queries of a store: indexes are calibrated with them, because nobody else knows what will be asked."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

__all__ = ["Asked"]

_Floats = npt.NDArray[np.float32]

_KEPT = 128
_OF_A_BATCH = 16


class Asked:
    """Some of the latest queries, 128 at most. Thread-safe; noting one takes a microsecond."""

    def __init__(self) -> None:
        self._latest: deque[_Floats] = deque(maxlen=_KEPT)
        self._turn = 0

    def note(self, queries: _Floats) -> None:
        """Keep a few of these, float32 (q, dim), other ones each time."""
        if len(queries) == 1:
            self._latest.append(queries[0].copy())
            return
        step = max(1, len(queries) // _OF_A_BATCH)
        self._turn += 1  # by several threads at once: a turn that is lost does no harm
        for query in queries[self._turn % step :: step][:_OF_A_BATCH]:
            self._latest.append(query.copy())

    def latest(self) -> _Floats | None:
        """Float32 (q, dim), none twice, in no order that means anything; None if there are none."""
        kept = list(self._latest.copy())
        return np.unique(np.stack(kept), axis=0) if kept else None
