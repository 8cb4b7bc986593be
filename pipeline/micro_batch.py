"""A micro-batch on its way in, and the header that is made of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headrace.cluster.fanout import Header
from headrace.cluster.routing import Router
from headrace.gpu.rows import DELETED
from headrace.streams.batches import Decoded, RawBatch

__all__ = ["MicroBatch", "route"]


@dataclass(slots=True)
class MicroBatch:
    """A raw batch, what the steps have made of it, and how long each took (seconds).

    Attributes
    ----------
    raw : RawBatch
    decoded : Decoded, optional
    vectors : float32 (v, dim), optional
        Of the records that are no deletes, in order; normalised where the metric is cosine.
    took : dict of str to float
        By stage.
    applied_at : float
        The worker's clock when all copies had it.
    given_up : list of int
        Positions among the decoded records of those that no copy has room for, whatever else it holds: they are in the
        dead letters.
    """

    raw: RawBatch
    decoded: Decoded | None = None
    vectors: npt.NDArray[np.float32] | None = None
    took: dict[str, float] = field(default_factory=dict)
    applied_at: float = 0.0
    given_up: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what happens in the block to what `stage` took."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.took[stage] = self.took.get(stage, 0.0) + time.perf_counter() - start

    def header(self, router: Router) -> Header:
        """All records, routed; those that were given up as deletions of their ids, at their own versions.

        Not as records that never were: a copy that was to hold the id no longer may have dropped its row already. The
        log has had a newer record of the id, so the older one must not be shown as if it were the last, and all copies
        have to agree.
        """
        assert self.decoded is not None
        assert self.vectors is not None
        header = route(self.raw, self.decoded, self.vectors, router)
        header.cells[self.given_up] = DELETED
        return header


def route(raw: RawBatch, decoded: Decoded, vectors: npt.NDArray[np.float32], router: Router) -> Header:
    """Give each record its cell: the router's, `DELETED` for a delete.

    Parameters
    ----------
    vectors : float32 (v, dim)
        Of the records that are no deletes, in order; normalised where the metric is cosine.
    """
    keeps = ~decoded.deleted
    cells = np.full(len(decoded.ids), DELETED, dtype=np.int32)
    if len(vectors):
        cells[keeps] = router.cells(vectors)
    return Header(
        ids=decoded.ids,
        topic_partitions=raw.topic_partitions[decoded.rows],
        offsets=raw.offsets[decoded.rows],
        timestamps=raw.timestamps[decoded.rows],
        cells=cells,
        vectors=vectors,
        vector_at=np.cumsum(keeps) - 1,
        attributes=decoded.attributes,
    )
