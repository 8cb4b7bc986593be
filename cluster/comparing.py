"""What a worker tells of its copy, so that copies can be compared: sums by cell, digests by row, what it knows of ids.

Nothing here blocks the event loop or takes the store's lock for longer than one look-up: sums and digests are made from
one view, in chunks, in an executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from headrace.cluster.holding import Holding
from headrace.cluster.wire import offsets_from_wire, offsets_to_wire
from headrace.gpu.digests import DigestedRows

__all__ = ["Comparing"]

T = TypeVar("T")

_WRAP = 0xFFFF_FFFF_FFFF_FFFF


class Comparing(Holding):
    """The part of `WorkerNode` that answers `verify`."""

    calls: tuple[str, ...] = ("digests", "row_digests", "ids_of_digests", "heard", "remember", "drop_strays")

    async def on_digests(self, collection: str, epoch: int | None = None, deep: bool = False) -> dict[str, Any]:
        """Per cell, the number of rows and the order-free sum of their digests; over their content too if `deep`.

        At whatever epoch, if none is named.
        """
        replica = self.replica(collection) if epoch is None else self._at(collection, epoch)
        store = replica.store
        stamp = store.view.stamp  # before the rows, so that they hold at least this
        if not deep:
            sums, stamp = await self.read(store.digests)
        else:
            sums = {}
            chunks = store.row_digests(deep=True)
            while (chunk := await self.read(next, chunks, None)) is not None:
                for cell in np.unique(chunk.cells).tolist():
                    some = chunk.digests[chunk.cells == cell]
                    count, total = sums.get(cell, (0, 0))
                    sums[cell] = count + len(some), (total + int(some.sum(dtype=np.uint64))) & _WRAP
        return {
            "digests": [[cell, count, str(total)] for cell, (count, total) in sums.items()],
            "applied": offsets_to_wire(stamp),
        }

    async def on_row_digests(self, collection: str, epoch: int, cell: int, deep: bool = False) -> dict[str, Any]:
        """A digest of each row of one cell, as bytes of little-endian uint64."""
        found = [chunk.digests for chunk in await self._digested(collection, epoch, cell, deep)]
        return {"digests": b"".join(some.astype("<u8").tobytes() for some in found)}

    async def on_ids_of_digests(
        self, collection: str, epoch: int, cell: int, digests: bytes, deep: bool = False
    ) -> dict[str, Any]:
        """Ids of those rows of one cell that have these digests now."""
        wanted = np.frombuffer(digests, dtype="<u8").astype(np.uint64)
        chunks = await self._digested(collection, epoch, cell, deep)
        found = [await self.read(chunk.ids, wanted) for chunk in chunks]
        return {"ids": [row_id for some in found for row_id in some]}

    async def _digested(self, collection: str, epoch: int, cell: int, deep: bool) -> list[DigestedRows]:
        chunks = self._at(collection, epoch).store.row_digests(frozenset([cell]), deep=deep)
        found = []
        while (chunk := await self.read(next, chunks, None)) is not None:
            found.append(chunk)
        return found

    async def on_heard(
        self, collection: str, epoch: int, ids: Sequence[Any], required: Sequence[Sequence[int]], deadline_s: float
    ) -> dict[str, Any]:
        """What this copy knows of each id once it has applied `required`; see `Store.heard`."""
        replica = self._at(collection, epoch)
        if required:
            await replica.wait(offsets_from_wire(required), deadline_s)
        heard, stamp = await self.read(replica.store.heard, ids)
        self._at(collection, epoch)
        return {"heard": [one and list(one) for one in heard], "applied": offsets_to_wire(stamp)}

    async def on_remember(self, collection: str, epoch: int, seconds: float) -> dict[str, Any]:
        """Forget no deletion for some seconds."""
        self._at(collection, epoch).remember(seconds)
        return {}

    async def on_drop_strays(self, collection: str, epoch: int, ids: Sequence[Any]) -> dict[str, Any]:
        """Let go of rows of `ids` that this copy answers with and does not know of; answers how many those were."""
        replica = self._at(collection, epoch)
        dropped = await self.read(replica.store.drop_strays, ids)
        replica.moments.clear()  # they show them still
        return {"dropped": dropped}
