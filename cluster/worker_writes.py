"""A worker's half of writing: it applies what it is sent, and sends rows on when cells move.

An apply of a few hundred rows takes well under a millisecond and is done on the event loop, in place.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.cluster.moving import header_of_rows, send_on
from headrace.cluster.upkeep import Upkeep
from headrace.cluster.wire import batch_from_wire, offsets_from_wire, offsets_to_wire
from headrace.gpu.errors import StaleEpoch

__all__ = ["Writing"]

_MOVE_ROWS = 256


class Writing(Upkeep):
    """The part of `WorkerNode` that takes rows in and sends them on; what is written makes work for its upkeep.

    Attributes
    ----------
    apply_deadline : float
        Seconds that a peer may take to answer an apply.
    move_rate : float
        Rows a second that are sent on.
    """

    calls: tuple[str, ...] = ("apply", "move", *Upkeep.calls)
    apply_deadline: float
    move_rate: float

    async def on_apply(
        self,
        collection: str,
        epoch: int,
        incarnation: int,
        batch: Mapping[str, Any] | None,
        ranges: Sequence[Sequence[int]],
        stable: Sequence[Sequence[int]],
    ) -> dict[str, Any]:
        """Apply one part of a batch (`headrace.cluster.fanout`); answers the rows that are lacking here.

        Raises
        ------
        StaleEpoch
            A newer epoch is known here, or this worker has no part in this one.
        StoreFull, ClusterError
            As `Replica.apply`.
        """
        replica = await self._begun(collection, incarnation)
        if replica is None or incarnation < replica.state.incarnation:
            raise StaleEpoch(f"{self.address} has no part in epoch {epoch} of collection {collection!r}")
        try:
            applied = replica.apply(
                None if batch is None else batch_from_wire(batch),
                {partition: (low, high) for partition, low, high in ranges},
                offsets_from_wire(stable),
                epoch,
            )
        finally:  # also where there was no room: tidying up makes some
            self.maintain(replica)
        if applied is None:
            raise StaleEpoch(f"epoch {epoch} of collection {collection!r}: {self.address} is at {replica.fence}")
        return {"missing": list(applied.missing)}

    async def on_move(self, collection: str, epoch: int, cells: Sequence[int]) -> dict[str, Any]:
        """Send all rows of `cells` on to whoever must hold them now, with their own versions.

        Who holds a row already hears of its number only, so a move that was interrupted costs little to do again.
        """
        replica = self.replica(collection)
        state = replica.state
        if state.epoch != epoch:
            raise StaleEpoch(f"{self.address} is at epoch {state.epoch} of {collection!r}, not {epoch}")
        watermarks = offsets_to_wire(replica.watermarks)
        moved = 0
        failed: dict[str, str] = {}
        began = time.monotonic()
        scan = replica.store.scan(frozenset(cells), vectors=True, batch=_MOVE_ROWS)
        while rows := await self.read(next, scan, []):
            header = await self.read(header_of_rows, rows, state, self.backend)
            failed = await send_on(
                self.call, state, header, me=self.address, local=replica.apply, deadline=self.apply_deadline
            )
            if failed:
                break
            moved += len(rows)
            # Applies and searches come first, here and where the rows go.
            await asyncio.sleep(max(0.0, began + moved / self.move_rate - time.monotonic()))
        self.maintain(replica)
        return {"moved": moved, "watermarks": watermarks, "failed": [[worker, why] for worker, why in failed.items()]}
