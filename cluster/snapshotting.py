"""Taking snapshots of one collection: the coordinator's half.

Belongs to the scheduler's event loop, which touches no file: whatever reads or writes a place runs on a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import replace
from typing import Any

from headrace.cluster.calls import Call
from headrace.cluster.manifests import FOLDER, Manifest, manifest_of
from headrace.cluster.snapshot_settings import Owner, SnapshotSettings, entries_at
from headrace.cluster.snapshots import expired, lineage_of, next_id, writers
from headrace.cluster.state import CollectionState
from headrace.gpu import snapshot_parts
from headrace.gpu.errors import ClusterError, HeadraceError, SnapshotError
from headrace.gpu.snapshot_parts import Part
from headrace.gpu.snapshot_place import Place

__all__ = ["Taking"]

log = logging.getLogger("headrace.cluster")

_PAUSE = 0.25
_AFTER_FAILURE = 60.0


class Taking:
    """Takes one collection's snapshots, one at a time."""

    def __init__(self, owner: Owner, call: Call, settings: SnapshotSettings) -> None:
        self._owner, self._call, self._settings = owner, call, settings
        self._busy = ""
        self._written: tuple[str, ...] = ()

    @property
    def _name(self) -> str:
        return self._owner.state.spec.name

    async def run(self) -> None:
        """Take those that are scheduled, until cancelled."""
        state, settings = self._owner.state, self._settings
        if settings.url and settings.every and not (state.snapshots.url or state.snapshots.unscheduled):
            await self.schedule(f"{settings.url.rstrip('/')}/{state.spec.name}", settings.every, settings.keep)
        while True:
            await asyncio.sleep(_PAUSE)
            plan = self._owner.state.snapshots
            if not self._due(time.time()):
                continue
            try:
                await self.take(plan.url, plan.keep)
            except HeadraceError as error:
                log.error("collection %r: the scheduled snapshot failed: %s; the one before stays", self._name, error)
            except Exception:
                log.exception("collection %r: the scheduled snapshot failed; the one before stays", self._name)

    def _due(self, now: float) -> bool:
        state = self._owner.state
        plan = state.snapshots
        if not plan.url or self._busy or state.source is None or state.moving or not state.active:
            return False
        pause = min(plan.every, _AFTER_FAILURE) if plan.failed else plan.every
        return not plan.tried_at <= now < plan.tried_at + pause  # also where the clock was set back

    async def schedule(self, url: str, every: float, keep: int) -> None:
        """From now on take one every so many seconds; 0 takes none any more."""
        await self._note(url=url if every else "", every=every, keep=keep if every else 0, unscheduled=not every)

    async def take(self, url: str, keep: int = 0) -> dict[str, Any]:
        """Take one now; ingest and reads go on. Answers what `Manifest.told` says of it.

        Raises
        ------
        SnapshotError
            One is being taken; the place cannot be written, or holds another collection's.
        ClusterError
            Rows were moving all the time, or too few workers answered.
        """
        if self._busy:
            raise SnapshotError(
                f"a snapshot of collection {self._name!r} is being written to {self._busy}: wait for it"
            )
        self._busy = url
        tried, began = time.time(), time.monotonic()
        try:
            manifest = await self._taken(url, tried, began)
            await self._note(
                failed="", tried_at=tried, last=manifest.snapshot, last_url=url, last_at=manifest.created,
                last_rows=sum(manifest.rows.values()), lineage=manifest.lineage,
            )  # fmt: skip
            if keep:
                await asyncio.to_thread(self._give_up, url, keep, manifest.lineage)
        except Exception as error:
            known = self._owner.state.snapshots
            if url in (known.url, known.last_url):  # nowhere else is anything expected to be
                await self._note(failed=str(error) or type(error).__name__, tried_at=tried)
            raise
        finally:
            self._busy = ""
        log.info(
            "collection %r: snapshot %s, %d rows, %.1f MB new of %.1f MB, %.2f s",
            self._name, manifest.snapshot, sum(manifest.rows.values()), manifest.written_bytes / 1e6,
            manifest.nbytes / 1e6, manifest.seconds,
        )  # fmt: skip
        return manifest.told()

    async def _taken(self, url: str, now: float, began: float) -> Manifest:
        options = self._settings.options
        entries = await asyncio.to_thread(entries_at, url, options)
        there, lineage = lineage_of(entries), self._owner.state.lineage
        if there and there != lineage:
            names = {entry.manifest.state.spec.name for entry in entries if entry.manifest}
            raise SnapshotError(
                f"{url} holds snapshots of another collection ({', '.join(sorted(names))}, created as {there}): choose "
                "another folder"
            )
        snapshot = next_id(entries, now, uuid.uuid4().hex[:4])
        try:
            state, parts = await self._parts(url, snapshot)
            # A column that was met meanwhile may be in a part: what it is must be known.
            state = state.with_(schema=self._owner.state.schema, alarms=self._owner.state.alarms)
            manifest = manifest_of(
                state, snapshot, parts, lineage=lineage, created=now, seconds=time.monotonic() - began
            )
            await asyncio.to_thread(lambda: _finish(Place(url, options), manifest))
        except BaseException:
            await asyncio.to_thread(self._leave_nothing, url, snapshot)
            raise
        self._written = manifest.writers
        return manifest

    async def _parts(self, url: str, snapshot: str) -> tuple[CollectionState, dict[str, Part]]:
        """Have enough workers write what they hold, all at one epoch."""
        problem = "rows are moving"
        until = time.monotonic() + self._settings.settle
        while time.monotonic() < until:
            state = self._owner.state
            who = [] if state.moving else writers(state, self._written)
            if not who:
                await asyncio.sleep(_PAUSE)
                continue
            asking = asyncio.gather(
                *(
                    self._call(
                        worker, "snapshot", deadline=self._settings.deadline, collection=self._name, epoch=state.epoch,
                        url=url, snapshot=snapshot, part=f"part-{number}",
                    )
                    for number, worker in enumerate(who)
                ),
                return_exceptions=True,
            )  # fmt: skip
            try:
                answers = await self._owner.unless_lost(asking)
            except ClusterError as error:
                problem = str(error)
                continue
            parts = {w: Part.from_wire(a["part"]) for w, a in zip(who, answers, strict=True) if isinstance(a, dict)}
            if len(parts) == len(who):
                return state, parts
            for answer in answers:
                if isinstance(answer, ClusterError):
                    problem = str(answer)  # such as a newer epoch
                elif isinstance(answer, BaseException):
                    raise answer
            await asyncio.sleep(_PAUSE)
        raise ClusterError(f"no snapshot of collection {self._name!r} could be taken: {problem}; try again")

    def _leave_nothing(self, url: str, snapshot: str) -> None:
        try:
            Place(url, self._settings.options).remove(f"moments/{snapshot}")
        except HeadraceError as error:
            log.warning("what a failed snapshot has left is not removed: %s", error)

    def _give_up(self, url: str, keep: int, lineage: str) -> None:
        """Delete what is no longer to be kept. Nothing is being written there: one snapshot is taken at a time."""
        try:
            place, entries = Place(url, self._settings.options), entries_at(url, self._settings.options)
            gone = expired(entries, keep, lineage)
            for snapshot in gone:
                place.remove(f"{FOLDER}/{snapshot}.json")
            kept = [entry for entry in entries if entry.snapshot not in gone]
            # What a manifest that cannot be read names is not known: then only manifests go.
            if all(entry.manifest for entry in kept):
                snapshot_parts.sweep(place, [part for entry in kept if entry.manifest for part in entry.manifest.parts])
        except HeadraceError as error:
            log.warning("collection %r: old snapshots are not deleted: %s", self._name, error)

    async def _note(self, **changes: Any) -> None:
        known = self._owner.state.snapshots
        known = replace(known, revision=known.revision + 1, **changes)
        self._owner.state = self._owner.state.with_(snapshots=known)
        await self._owner.tell()


def _finish(place: Place, manifest: Manifest) -> None:
    """Write the manifest, without which there is no snapshot. Blocks."""
    there = place.sizes(f"moments/{manifest.snapshot}")
    for part, worker in zip(manifest.parts, manifest.writers, strict=True):
        if there.get(part.moment.path.rpartition("/")[2]) != part.moment.bytes:
            raise SnapshotError(
                f"what {worker} has written to {place.url} is not there for the scheduler: give a place that all of "
                "them reach"
            )
    place.write(f"{FOLDER}/{manifest.snapshot}.json", manifest.to_bytes())
