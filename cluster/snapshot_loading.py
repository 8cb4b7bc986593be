"""Loading a snapshot into the workers of one collection: the coordinator's half.

A collection that is restored, and one that has lost the last copy of a cell, go the same way: a new incarnation in
which all workers are joining, and are filled by the snapshot instead of by each other. Until all have loaded, nobody is
read, nor is the topic; then it is read from the snapshot's offsets. Whatever goes wrong meanwhile, it is begun again
with empty stores.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headrace.cluster import planning
from headrace.cluster.calls import Call
from headrace.cluster.manifests import Entry, Manifest
from headrace.cluster.snapshot_settings import Owner, SnapshotSettings, entries_at
from headrace.cluster.snapshot_state import Restoring
from headrace.cluster.snapshots import choose, shares
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import (
    ClusterError,
    CollectionError,
    CollectionNotFound,
    HeadraceError,
    SnapshotDamaged,
    SnapshotError,
    StaleEpoch,
)

__all__ = ["Loading"]

log = logging.getLogger("headrace.cluster")


class Loading:
    """Brings one collection back. Belongs to the scheduler's event loop, which touches no file.

    Attributes
    ----------
    most : int
        Members that the collection has had at once.
    """

    def __init__(self, owner: Owner, call: Call, settings: SnapshotSettings) -> None:
        self._owner, self._call, self._settings = owner, call, settings
        self.most = 0
        self._manifest: Manifest | None = None
        self._unusable: dict[str, str] = {}
        self._passed_over: list[str] = []
        self._since: float | None = None
        self._report: dict[str, Any] = {}
        self._failure: HeadraceError | None = None
        self._failed_at = 0.0
        self._waited_for = False

    @property
    def _name(self) -> str:
        return self._owner.state.spec.name

    def check_source(self) -> None:
        """Raise `CollectionError` where no topic may be read."""
        if self._owner.state.snapshots.detached:
            raise CollectionError(
                f"collection {self._name!r} was restored without its topic, and another's versions do not compare with "
                "those of its rows: create a collection for the topic instead"
            )

    async def instead(
        self, before: CollectionState, wanted: CollectionState, leaving: Collection[str]
    ) -> CollectionState | None:
        """The state in which a snapshot is loaded, in place of `wanted`, which begins with empty stores.

        None where it must be asked again later; `wanted` itself where there is no snapshot, or none can be used.
        """
        other = await self._instead(before, wanted, leaving)
        if other is None or other is wanted:
            return other
        # While the place was read, something may have been told that changes without an epoch.
        now = self._owner.state
        alarms = dict.fromkeys((*now.alarms, *other.alarms))
        schema = {**other.schema, **now.schema}
        return other.with_(alarms=tuple(alarms), schema=schema, snapshots=now.snapshots)

    async def _instead(
        self, before: CollectionState, wanted: CollectionState, leaving: Collection[str]
    ) -> CollectionState | None:
        target, known = before.restoring, before.snapshots
        if target is None and not known.last:
            return wanted
        if self._failure is not None:
            if self._waited_for or time.monotonic() < self._failed_at + self._settings.pause:
                return None
            self._failure, self._unusable = None, {}  # whoever asked has gone with an earlier scheduler
        if self._since is None:
            self._since = time.monotonic()
        if target is None and len(wanted.members) < self.most and self._waited() < self._settings.gather:
            return None
        url = target.url if target else known.last_url
        try:
            entries = await asyncio.to_thread(entries_at, url, self._settings.options)
        except SnapshotError as error:
            return (
                self._not_usable(before, wanted, leaving, error) if self._waited() > self._settings.patience else None
            )
        only = target.snapshot if target and target.only else None
        lineage = target.lineage if target else before.lineage
        topic_id = before.source.topic_id if before.source else ""
        try:
            manifest, passed_over = choose(
                entries, lineage=lineage, topic_id=topic_id, wanted=only, without=self._unusable
            )
        except SnapshotError as error:
            return self._not_usable(before, wanted, leaving, error)
        asked = target is not None and target.asked
        if not asked and self._waited() <= self._settings.patience and _may_be_newer(entries, manifest):
            return None
        self._manifest, self._passed_over = manifest, passed_over
        for sentence in passed_over:
            log.error("collection %r: %s", self._name, sentence)
        log.warning("collection %r: loading snapshot %s from %s", self._name, manifest.snapshot, url)
        restoring = replace(
            target or Restoring(url, "", lineage), snapshot=manifest.snapshot, offsets=_begin(before, manifest)
        )
        return planning.restored(before, manifest.state, restoring, wanted.members, manifest.rows, leaving)

    def _waited(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def _not_usable(
        self, before: CollectionState, wanted: CollectionState, leaving: Collection[str], error: HeadraceError
    ) -> CollectionState | None:
        self._since = None
        if before.restoring is not None and before.restoring.asked:
            self._fail(error)
            return None
        log.error("collection %r: no snapshot can be loaded: %s", self._name, error)
        state = planning.begun_anew(before, wanted.members, leaving)
        return state.with_(alarms=(*state.alarms, f"no snapshot could be loaded: {error}"))

    def _fail(self, error: HeadraceError) -> None:
        """Tell whoever has asked for a restore; where nobody waits, let it be seen, and try again after a while."""
        self._failure, self._failed_at = error, time.monotonic()
        if self._waited_for:
            return
        obstacle = f"{error}; it is tried again and again: mend that, or drop the collection"
        log.error("collection %r: a restore that nobody waits for: %s", self._name, obstacle)
        known = self._owner.state.snapshots
        known = replace(known, obstacle=obstacle, revision=known.revision + 1)
        self._owner.state = self._owner.state.with_(snapshots=known)

    async def load(self) -> dict[str, dict[int, int]] | None:
        """Have all workers load their cells; the offsets below which they are complete, or None if it must be done
        again.
        """
        state, manifest = self._owner.state, self._manifest
        restoring = state.restoring
        assert restoring is not None
        assert manifest is not None  # `instead` has chosen it
        began = time.monotonic()
        mine = {w: [cell for cell, holders in state.copies.items() if w in holders] for w in state.members}
        loading = asyncio.gather(
            *(
                self._call(
                    worker, "load", deadline=self._settings.deadline, collection=self._name, epoch=state.epoch,
                    url=restoring.url,
                    parts=[[part.to_wire(), sorted(some)] for part, some in shares(manifest.parts, cells)],
                )
                for worker, cells in mine.items()
            ),
            return_exceptions=True,
        )  # fmt: skip
        try:
            answers = await self._owner.unless_lost(loading)
        except ClusterError as error:
            log.info("collection %r: the snapshot is loaded again: %s", self._name, error)
            return None
        if self._refused(restoring, dict(zip(mine, answers, strict=True))):
            return None
        told = {worker: answer for worker, answer in zip(mine, answers, strict=True) if isinstance(answer, dict)}
        seconds = time.monotonic() - (self._since or began)
        self._report = {
            **manifest.told(),
            "url": restoring.url,
            "workers": [[worker, {**answer, "cells": len(mine[worker])}] for worker, answer in told.items()],
            "seconds": seconds,
            "passed_over": self._passed_over,
        }
        log.warning(
            "collection %r: snapshot %s is loaded: %d rows on %d workers in %.2f s",
            self._name, manifest.snapshot, sum(manifest.rows.values()), len(told), seconds,
        )  # fmt: skip
        for sentence in self._passed_over:
            self._owner.alarm(f"{sentence}; {manifest.snapshot} was loaded instead")
        if not restoring.asked:
            self._owner.alarm(
                f"the last copy of some cells was lost: snapshot {manifest.snapshot} was loaded, and the log read from "
                "there"
            )
        self._since, self._unusable = None, {}
        return {worker: dict(restoring.offsets) for worker in state.members}

    def _refused(self, restoring: Restoring, answers: Mapping[str, Any]) -> bool:
        """Whether some worker could not load its share; what is to be done about it has been begun."""
        errors = {worker: answer for worker, answer in answers.items() if isinstance(answer, BaseException)}
        for worker, error in errors.items():
            if isinstance(error, StaleEpoch):
                continue  # another state is on its way
            if isinstance(error, ClusterError):
                self._owner.suspect(worker, str(error))
            elif isinstance(error, SnapshotDamaged):
                self._unusable[restoring.snapshot] = str(error)
            elif not isinstance(error, HeadraceError):
                raise error
            elif restoring.asked:
                self._fail(error)  # no room, or no way to the place: an older one is no better
            elif not isinstance(error, SnapshotError) or self._waited() > self._settings.patience:
                self._unusable[restoring.snapshot] = str(error)
        if errors:
            log.error("collection %r: snapshot %s: %s", self._name, restoring.snapshot, next(iter(errors.values())))
            self._owner.again()
        return bool(errors)

    async def restored(self) -> dict[str, Any]:
        """What was loaded, once it is; for whoever asked for it.

        Raises
        ------
        SnapshotError, StoreFull
            It cannot be done.
        CollectionNotFound
            The collection was dropped meanwhile.
        """
        self._waited_for = True
        while self._failure is None and (self._owner.state.restoring is not None or not self._report):
            await asyncio.sleep(0.02)
        if self._failure is not None:
            raise self._failure
        return self._report

    def close(self) -> None:
        """The collection is no more: nobody is to wait for it any longer."""
        if self._failure is None:
            self._failure = CollectionNotFound(
                f"collection {self._name!r} was dropped, or the cluster ended, while it was restored: restore it again"
            )


def _may_be_newer(entries: Sequence[Entry], than: Manifest) -> bool:
    """Whether a snapshot that could not be read just now may be newer than this one."""
    number = Entry(than.snapshot).number
    return any(entry.unread and entry.number > number for entry in entries)


def _begin(state: CollectionState, manifest: Manifest) -> dict[int, int]:
    """Topic partition to the offset from which the log is read behind a snapshot."""
    if state.source is None:
        return {}
    origins = state.source.origins
    return {tp: manifest.offsets.get(tp, origins.get(tp, 0)) for tp in range(state.source.partitions)}
