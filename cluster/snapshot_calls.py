"""The scheduler's calls about snapshots: take one, say which there are, make a collection from one."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any

from headrace.cluster.calls import Call
from headrace.cluster.coordinator import Coordinator, CoordinatorSettings
from headrace.cluster.manifests import Manifest
from headrace.cluster.snapshot_settings import entries_at
from headrace.cluster.snapshot_state import Restoring, Snapshots
from headrace.cluster.snapshots import choose
from headrace.cluster.state import CollectionState

__all__ = ["SnapshotCalls"]


class SnapshotCalls:
    """The part of `HeadraceScheduler` that answers for snapshots."""

    calls: tuple[str, ...] = ("snapshot", "snapshots", "restore")
    _settings: CoordinatorSettings
    _coordinators: dict[str, Coordinator]
    _dropped: dict[str, CollectionState]
    _ready: dict[str, str]
    _call: Call

    async def _settled(self, collection: str) -> Coordinator:
        raise NotImplementedError

    async def _until_free(self, name: str) -> None:
        raise NotImplementedError

    async def drop(self, collection: str) -> dict[str, Any]:
        raise NotImplementedError

    async def snapshot(self, collection: str, url: str, keep: int = 0, every: float | None = None) -> dict[str, Any]:
        """Take one now; with `every`, one every so many seconds from now on (0: no longer)."""
        keeper = (await self._settled(collection)).snapshots
        told = await keeper.take(url, keep)
        if every is not None:
            await keeper.schedule(url, every, keep)
        return told

    async def snapshots(self, url: str) -> dict[str, Any]:
        """What is at a place, oldest first; those that are damaged, too."""
        entries = await asyncio.to_thread(entries_at, url, self._settings.snapshots.options)
        return {"snapshots": [entry.told() for entry in entries]}

    async def restore(
        self, url: str, name: str | None, snapshot: str | None, replicas: int | None, follow: bool
    ) -> dict[str, Any]:
        """Make a collection from a snapshot, with the workers there are; answers once all have loaded it.

        Raises
        ------
        SnapshotError
            There is none, or none that can be used.
        CollectionExists
            There is a collection of this name.
        StoreFull
            The workers have no room for it.
        """
        entries = await asyncio.to_thread(entries_at, url, self._settings.snapshots.options)
        manifest, _ = choose(entries, wanted=snapshot)
        name = name or manifest.state.spec.name
        await self._until_free(name)
        spec = manifest.state.spec
        spec = replace(spec, name=name, uid=uuid.uuid4().hex, replicas=replicas or spec.replicas)
        coordinator = Coordinator(spec, self._call, self._settings, after=self._dropped.pop(name, None))
        coordinator.state = _beginning(coordinator.state, manifest, url, only=snapshot is not None, follow=follow)
        self._coordinators[name] = coordinator
        coordinator.start(set(self._ready))
        try:
            return await coordinator.loading.restored()
        except BaseException:
            await self.drop(name)
            raise


def _beginning(state: CollectionState, manifest: Manifest, url: str, *, only: bool, follow: bool) -> CollectionState:
    """The state of a collection that is to come from a snapshot, before it has any worker."""
    kept = manifest.state
    known = Snapshots(detached=kept.source is not None and not follow)
    if kept.spec.name == state.spec.name:
        known = replace(
            known,
            lineage=manifest.lineage,
            last=manifest.snapshot,
            last_url=url,
            last_at=manifest.created,
            last_rows=sum(manifest.rows.values()),
        )
    # Under another name it is another collection: the one whose snapshot this is may go on writing to the same place.
    return state.with_(
        codebook=kept.codebook,
        source=kept.source if follow else None,
        schema=dict(kept.schema),
        alarms=kept.alarms,
        snapshots=known,
        restoring=Restoring(url, manifest.snapshot, manifest.lineage, asked=True, only=only),
    )
