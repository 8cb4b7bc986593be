"""The scheduler's calls about snapshots: take one, say which there are, make a collection from one."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from headrace.cluster.calls import Call
from headrace.cluster.coordinator import Coordinator, CoordinatorSettings
from headrace.cluster.manifests import Entry, Manifest
from headrace.cluster.snapshot_checking import checked
from headrace.cluster.snapshot_owner import Mark, read_mark
from headrace.cluster.snapshot_settings import entries_at
from headrace.cluster.snapshot_state import Restoring, Snapshots
from headrace.cluster.snapshots import choose, owner
from headrace.cluster.state import CollectionSpec, CollectionState
from headrace.gpu.errors import CollectionError, ConfigError
from headrace.gpu.snapshot_place import Place

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

    def _coordinator_of(self, spec: CollectionSpec, after: CollectionState | None) -> Coordinator:
        raise NotImplementedError

    async def _forget(self, name: str, coordinator: Coordinator) -> None:
        raise NotImplementedError

    async def snapshot(self, collection: str, url: str, keep: int = 0, every: float | None = None) -> dict[str, Any]:
        """Take one now; with `every`, one every so many seconds from now on (0: no longer).

        Raises
        ------
        CollectionError
            There is nothing to be scheduled: the rows cannot change.
        """
        coordinator = await self._settled(collection)
        keeper = coordinator.snapshots
        if every and coordinator.state.snapshots.detached:
            raise CollectionError(
                f"every={every:g} cannot be: collection {collection!r} was restored without its topic, so its rows "
                "never change, and one snapshot is enough: leave every out"
            )
        told = await keeper.take(url, keep)
        if every is not None:
            await keeper.schedule(url, every, keep)
        return told

    async def snapshots(self, url: str, check: bool = False) -> dict[str, Any]:
        """What is at a place, oldest first; those that are damaged, too. With `check`, all their files are read."""
        options = self._settings.snapshots.options
        entries = await asyncio.to_thread(entries_at, url, options)
        if check:
            entries = await asyncio.to_thread(checked, url, options, entries)
        return {"snapshots": [entry.told() for entry in entries]}

    async def restore(
        self,
        url: str,
        name: str | None,
        snapshot: str | None,
        replicas: int | None,
        follow: bool,
        take_over: bool = False,
    ) -> dict[str, Any]:
        """Make a collection from a snapshot, with the workers there are; answers once all have loaded it.

        It writes snapshots to the same place only if it is to `take_over`, or its predecessor was dropped here: then
        that one, should it live on somewhere, is refused there from the first snapshot of this one on. If the caller
        is no longer there when it is done, or fails, the collection is there all the same, or is tried again.

        Raises
        ------
        ConfigError
            It is to take the place over under another name.
        SnapshotError
            There is none, or none that can be used.
        CollectionExists
            There is a collection of this name.
        CollectionNotFound
            It was dropped meanwhile.
        StoreFull
            The workers have no room for it.
        """
        entries, mark = await asyncio.to_thread(_look, url, self._settings.snapshots.options)
        manifest, _ = choose(entries, lineage=_lineage(entries, mark), wanted=snapshot)
        name = name or manifest.state.spec.name
        if take_over and name != manifest.state.spec.name:
            raise ConfigError(
                f"take_over goes with the collection's own name, {manifest.state.spec.name!r}: as {name!r} it is "
                "another collection, whose snapshots go elsewhere"
            )
        await self._until_free(name)
        spec = manifest.state.spec
        spec = replace(spec, name=name, uid=uuid.uuid4().hex, replicas=replicas or spec.replicas)
        dropped, newest = self._dropped.pop(name, None), owner(entries)
        writer = newest.state.spec.uid if newest is not None else ""
        ended = (mark is not None and mark.ended) or (dropped is not None and dropped.spec.uid == writer)
        heir_of = writer if take_over or (ended and name == manifest.state.spec.name) else ""
        coordinator = self._coordinator_of(spec, dropped)
        begins = _beginning(coordinator.state, manifest, url, only=snapshot is not None, follow=follow)
        coordinator.state = begins.with_(snapshots=replace(begins.snapshots, heir_of=heir_of))
        self._coordinators[name] = coordinator
        coordinator.start(set(self._ready))
        try:
            return await coordinator.loading.restored()
        except BaseException:
            await self._forget(name, coordinator)
            raise


def _look(url: str, options: Mapping[str, Any]) -> tuple[list[Entry], Mark | None]:
    return entries_at(url, options), read_mark(Place(url, options))


def _lineage(entries: Sequence[Entry], mark: Mark | None) -> str:
    """Of the collection whose place it is; empty where nobody has said so."""
    there = {entry.manifest.lineage for entry in entries if entry.manifest}
    return mark.lineage if mark is not None and mark.lineage in there else ""


def _beginning(state: CollectionState, manifest: Manifest, url: str, *, only: bool, follow: bool) -> CollectionState:
    """The state of a collection that is to come from a snapshot, before it has any worker."""
    kept = manifest.state
    known = Snapshots(detached=manifest.detached or (kept.source is not None and not follow))
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
