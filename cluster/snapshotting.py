"""Taking snapshots of one collection: the coordinator's half.

Belongs to the scheduler's event loop, which touches no file: whatever reads or writes a place runs on a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headrace.cluster.calls import Call
from headrace.cluster.manifests import FOLDER, Entry, Manifest, manifest_of
from headrace.cluster.snapshot_owner import check_mark, claim, end, folder_for
from headrace.cluster.snapshot_settings import Owner, SnapshotSettings, entries_at
from headrace.cluster.snapshot_state import Snapshots
from headrace.cluster.snapshots import expired, next_id, refusal, writers
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import ClusterError, HeadraceError, SnapshotError
from headrace.gpu.snapshot_place import Place
from headrace.gpu.snapshot_sweep import sweep
from headrace.gpu.snapshot_wire import Part

__all__ = ["Taking"]

log = logging.getLogger("headrace.cluster")

_PAUSE = 0.25
_AFTER_FAILURE = 60.0
_END = 10.0
"""Seconds that dropping a collection waits for its place."""


class Taking:
    """Takes one collection's snapshots, one at a time."""

    def __init__(self, owner: Owner, call: Call, settings: SnapshotSettings) -> None:
        self._owner, self._call, self._settings = owner, call, settings
        self._busy = ""
        self._by_itself = False  # what is being taken was scheduled
        self._written: tuple[str, ...] = ()

    @property
    def _name(self) -> str:
        return self._owner.state.spec.name

    async def run(self) -> None:
        """Take those that are scheduled, until cancelled."""
        state, settings = self._owner.state, self._settings
        if settings.url and settings.every and not (state.snapshots.url or state.snapshots.unscheduled):
            below, last = f"{settings.url.rstrip('/')}/", state.snapshots.last_url
            url = last if last.startswith(below) else f"{below}{state.spec.name}"
            await self.schedule(url, settings.every, settings.keep)
        while True:
            await asyncio.sleep(_PAUSE)
            plan = self._owner.state.snapshots
            if not self._due(time.time()):
                continue
            try:
                url = await self._folder(plan)
                self._by_itself = True
                await self.take(url, plan.keep)
            except HeadraceError as error:
                log.error("collection %r: the scheduled snapshot failed: %s; the one before stays", self._name, error)
            except Exception:
                log.exception("collection %r: the scheduled snapshot failed; the one before stays", self._name)
            finally:
                self._by_itself = False

    async def _folder(self, plan: Snapshots) -> str:
        """Where the next scheduled one goes: of those that are configured, a collection of its own has its own."""
        settings = self._settings
        if not settings.url or not plan.url.startswith(f"{settings.url.rstrip('/')}/"):
            return plan.url
        try:
            url = await asyncio.to_thread(folder_for, plan.url, settings.options, self._owner.state)
        except SnapshotError:
            return plan.url  # taking it fails for the same reason, and says so
        if url != plan.url:
            log.warning("collection %r: %s has another's snapshots, its own go to %s", self._name, plan.url, url)
            await self.schedule(url, plan.every, plan.keep)
        return url

    def _due(self, now: float) -> bool:
        state = self._owner.state
        plan = state.snapshots
        if not plan.url or self._busy or state.moving or not state.active:
            return False
        if state.source is None and (self._written or not plan.detached):
            return False  # there are no rows yet; or none will ever change, and one snapshot has them
        pause = min(plan.every, _AFTER_FAILURE) if plan.failed else plan.every
        return not plan.tried_at <= now < plan.tried_at + pause  # also where the clock was set back

    async def schedule(self, url: str, every: float, keep: int) -> None:
        """From now on take one every so many seconds; 0 takes none any more."""
        await self._note(url=url if every else "", every=every, keep=keep if every else 0, unscheduled=not every)

    async def end(self) -> None:
        """The collection was dropped: its snapshots stay, and say so, lest it comes back with the next cluster."""
        state = self._owner.state
        for url in {state.snapshots.url, state.snapshots.last_url} - {""}:
            try:
                ending = asyncio.to_thread(end, url, self._settings.options, state)
                if await asyncio.wait_for(ending, _END):
                    log.warning("collection %r was dropped; its snapshots stay at %s", self._name, url)
            except (HeadraceError, TimeoutError) as error:
                log.error(
                    "collection %r was dropped, but its snapshots at %s cannot be told (%s): `headrace up --snapshots` "
                    "would bring it back; remove them", self._name, url, error or "no answer",
                )  # fmt: skip

    async def take(self, url: str, keep: int = 0) -> dict[str, Any]:
        """Take one now; ingest and reads go on. Answers what `Manifest.told` says of it. A scheduled one that is being
        taken is waited for.

        Raises
        ------
        SnapshotError
            Somebody else has one taken; the place cannot be written, or belongs to another collection or cluster.
        ClusterError
            Rows were moving all the time, or too few workers answered.
        """
        while self._busy and self._by_itself:
            await asyncio.sleep(_PAUSE)
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
        entries = await asyncio.to_thread(claim, url, options, self._owner.state)
        lineage = self._owner.state.lineage
        snapshot = next_id(entries, now, uuid.uuid4().hex[:4])
        try:
            state, parts = await self._parts(url, snapshot)
            # A column that was met meanwhile may be in a part: what it is must be known.
            state = state.with_(schema=self._owner.state.schema, alarms=self._owner.state.alarms)
            manifest = manifest_of(
                state, snapshot, parts, lineage=lineage, created=now, seconds=time.monotonic() - began
            )
            await asyncio.to_thread(lambda: _finish(Place(url, options), manifest, self._owner.state))
            await asyncio.to_thread(self._check_alone, url, entries)
        except BaseException as error:
            await asyncio.to_thread(self._leave_nothing, url, snapshot)
            if isinstance(error, SnapshotError):  # perhaps because another swept away what was half written
                await asyncio.to_thread(lambda: check_mark(Place(url, options), self._owner.state))
            raise
        self._written = manifest.writers
        return manifest

    async def _parts(self, url: str, snapshot: str) -> tuple[CollectionState, dict[str, Part]]:
        """Have enough workers write what they hold, all at one epoch."""
        problem = "rows are moving"
        until = time.monotonic() + self._settings.settle
        numbers = itertools.count()  # never the same twice: whoever was given up may still be writing its part
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
                        url=url, snapshot=snapshot, part=f"part-{next(numbers)}",
                    )
                    for worker in who
                ),
                return_exceptions=True,
            )  # fmt: skip
            try:
                answers = await self._owner.unless_lost(asking, of=who)
            except ClusterError as error:
                problem = str(error)
                until = time.monotonic() + self._settings.settle  # the others take over, and then write
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

    def _check_alone(self, url: str, before: Sequence[Entry]) -> None:
        """Raise `SnapshotError` if another has begun to write there meanwhile, or has written a newer snapshot.

        Neither could know of the other: one of them is refused here, or has been in `claim`. Blocks.
        """
        check_mark(Place(url, self._settings.options), self._owner.state)
        came = entries_at(url, self._settings.options, without={entry.snapshot for entry in before})
        if why := refusal(came, Place(url, self._settings.options).url, self._owner.state):
            raise SnapshotError(why)

    def _leave_nothing(self, url: str, snapshot: str) -> None:
        try:
            place = Place(url, self._settings.options)
            place.remove(f"{FOLDER}/{snapshot}.json")
            place.remove(f"moments/{snapshot}")
        except HeadraceError as error:
            log.warning("what a failed snapshot has left is not removed: %s", error)

    def _give_up(self, url: str, keep: int, lineage: str) -> None:
        """Delete what is no longer to be kept. Nothing is being written there: one snapshot is taken at a time, and the
        mark is looked at before each removal.
        """
        try:
            place, entries = Place(url, self._settings.options), entries_at(url, self._settings.options)
            if refusal(entries, place.url, self._owner.state):
                return  # it was taken over just now, and what is being written there is another's
            gone = expired(entries, keep, lineage)
            for snapshot in gone:
                check_mark(place, self._owner.state)
                place.remove(f"{FOLDER}/{snapshot}.json")
            kept = [entry for entry in entries if entry.snapshot not in gone]
            # What a manifest that cannot be read names is not known: then only manifests go.
            if all(entry.manifest for entry in kept):
                parts = [part for entry in kept if entry.manifest for part in entry.manifest.parts]
                sweep(place, parts, lambda: check_mark(place, self._owner.state))
        except HeadraceError as error:
            log.warning("collection %r: old snapshots are not deleted: %s", self._name, error)

    async def _note(self, **changes: Any) -> None:
        known = self._owner.state.snapshots
        known = replace(known, revision=known.revision + 1, **changes)
        self._owner.state = self._owner.state.with_(snapshots=known)
        await self._owner.tell()


def _finish(place: Place, manifest: Manifest, state: CollectionState) -> None:
    """Write the manifest, without which there is no snapshot. Blocks.

    What it names must be there, also where it was there before this snapshot began: the collection before this one at
    the place may have been about to delete it.
    """
    check_mark(place, state)
    there = place.sizes(f"moments/{manifest.snapshot}")
    for part, worker in zip(manifest.parts, manifest.writers, strict=True):
        if there.get(part.moment.path.rpartition("/")[2]) != part.moment.bytes:
            raise SnapshotError(
                f"what {worker} has written to {place.url} is not there for the scheduler: give a place that all of "
                "them reach"
            )
    found: Counter[str] = Counter()
    for name, size in place.sizes("segments").items():
        found[name.partition("/")[0]] += size
    for segment in (segment for part in manifest.parts for segment in part.segments):
        if found[segment.uid] != segment.bytes:
            raise SnapshotError(
                f"{place.shown(segment.path)} was changed while the snapshot was written: take it again"
            )
    place.write(f"{FOLDER}/{manifest.snapshot}.json", manifest.to_bytes())
