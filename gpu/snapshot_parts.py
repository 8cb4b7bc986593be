"""One worker's part of a snapshot: a store's rows as files, and back into any store.

::

    segments/<uid>/…                  sealed segments, each written once (`headrace.gpu.segment_files`)
    moments/<snapshot>/<part>.npz     what may still change (`headrace.gpu.moment_files`)

Nothing here knows of the manifest that ties parts together: what no manifest names does not count.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.gpu import moment_files, segment_files
from headrace.gpu.checksums import checksum, checksum_of
from headrace.gpu.errors import ConfigError, SnapshotDamaged
from headrace.gpu.marks import Marks
from headrace.gpu.moment_files import Description, Moment, batches
from headrace.gpu.segment_files import MANIFEST
from headrace.gpu.segments import Sealed, View
from headrace.gpu.snapshot_checks import manifest_of, verified
from headrace.gpu.snapshot_place import AlreadyThere, Place
from headrace.gpu.snapshot_wire import NAME, MomentFile, Part, SegmentFile
from headrace.gpu.store import Store

__all__ = ["Loaded", "MomentFile", "Part", "SegmentFile", "read_into", "write"]

log = logging.getLogger("headrace.gpu")

_ADOPTED_SHARE = 0.5
"""Of a segment's live rows that must be wanted for taking it over: with fewer it would be rewritten at once."""

_CHECKED_EVERY = 24 * 3600.0
"""Seconds after which a snapshot that relies on a segment's files reads them once more: media fail in silence."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `read_into` did.

    Attributes
    ----------
    rows : int
        Rows that the store took; those it knew in this or a newer version are not counted.
    bytes : int
        Read from the place.
    adopted, rebuilt : int
        Sealed segments taken over with their index, and those whose rows went through `Store.apply`.
    """

    rows: int
    bytes: int
    adopted: int
    rebuilt: int


# -- writing -----------------------------------------------------------------------------------------------------------


def write(store: Store, place: Place, snapshot: str, part: str, *, view: View | None = None) -> Part:
    """Write one view of a store. Blocks for as long as the place takes; nobody who uses the store waits for it.

    Sealed segments that are at the place already, complete and with good checksums, are not written again. Their files
    are read through when this process relies on them for the first time, and once a day; in between, manifest and sizes
    are looked at. What is damaged is written again, for the rows are here. A write that was interrupted can simply be
    done again.

    Parameters
    ----------
    store : Store
    place : Place
    snapshot, part : str
        Names of letters, digits and ``. _ -``; the same part of the same snapshot is replaced.
    view : View, optional
        The store's, of the moment to be written; by default that of now.

    Raises
    ------
    SnapshotError
        The place cannot be written; nothing that looks complete is left of what was being written.
    ConfigError
        A name has other characters.
    """
    for name in (snapshot, part):
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot be a snapshot's or part's name: use letters, digits and . _ -")
    view = view or store.view
    sealed = _by_uid(view)
    growing = [some for some in view.segments if some.live and not isinstance(some.segment, Sealed)]
    files, written = [], 0
    for uid, (segment, marks) in sealed.items():
        size, digest, new = _kept(store, place, segment)
        files.append(SegmentFile(uid, len(marks), marks.live, size, digest))
        written += size if new else 0
    path = f"moments/{snapshot}/{part}.npz"
    with place.new(path) as file:
        marks_of = {uid: marks for uid, (_, marks) in sealed.items()}
        moment_files.save(_description(store), store.index.dtype, marks_of, growing, store.backend, file)
        moment = MomentFile(path, *checksum_of(file))
    rows: dict[int, int] = {}
    for some in view.segments:
        cells, counts = np.unique(some.cells[some.alive], return_counts=True)
        for cell, count in zip(cells.tolist(), counts.tolist(), strict=True):
            rows[cell] = rows.get(cell, 0) + count
    log.info("snapshot %s, part %s: %d rows, %d bytes written to %s", snapshot, part, view.rows, written, place.url)
    return Part(part, dict(view.stamp), rows, tuple(files), moment, written + moment.bytes)


def _by_uid(view: View) -> dict[str, tuple[Sealed, Marks]]:
    """The sealed segments that have live rows, once each.

    A store may hold one twice: two workers had shared it between them, and both parts were read. Each row lives in one.
    """
    found: dict[str, tuple[Sealed, Marks]] = {}
    for some in view.segments:
        if not some.live or not isinstance(some.segment, Sealed):
            continue
        alive, cells = some.alive, some.cells
        if twin := found.get(some.segment.uid):
            alive, cells = alive | twin[1].alive, np.where(alive, cells, twin[1].cells)
        found[some.segment.uid] = some.segment, Marks(alive, cells)
    return found


def _kept(store: Store, place: Place, segment: Sealed) -> tuple[int, str, bool]:
    """Have a segment at the place: its bytes, its manifest's checksum, and whether it was written for that."""
    folder = _folder(segment.uid)
    if there := _whole(place, segment):
        return *there, False
    place.remove(folder)  # what was interrupted, or is damaged
    try:
        with place.new(folder, last=MANIFEST) as made:
            manifest = segment_files.save(segment, store.metric, store.backend, made)
    except AlreadyThere:  # another worker that has loaded the same segment was quicker
        if there := _whole(place, segment):
            return *there, False
        raise
    content = manifest.to_json()
    segment.kept[place.url] = checksum(content), None  # written, not read: what the disk has made of it is not known
    return manifest.size + len(content), checksum(content), True


def _whole(place: Place, segment: Sealed) -> tuple[int, str] | None:
    """Bytes of a segment's files at the place, and its manifest's checksum; None where they are not all there."""
    folder = _folder(segment.uid)
    content = place.read(f"{folder}/{MANIFEST}")
    if content is None:
        return None
    digest = checksum(content)
    try:
        manifest = segment_files.manifest_from(content, place.shown(f"{folder}/{MANIFEST}"))
        sizes = place.sizes(folder)
        short = [file for file, (size, _) in manifest.files.items() if sizes.get(file) != size]
        if short or (manifest.uid, manifest.rows) != (segment.uid, len(segment)):
            raise SnapshotDamaged(f"{place.shown(folder)} lacks some of {', '.join(short) or 'its rows'}")
        known, checked = segment.kept.get(place.url, ("", None))
        if known != digest or checked is None or time.monotonic() - checked > _CHECKED_EVERY:
            checked = time.monotonic()
            with place.copy(folder, manifest.files) as files:
                segment_files.verify(manifest, files, place.shown(folder))
    except SnapshotDamaged as error:
        log.warning("%s; it is written again", error)
        return None
    segment.kept[place.url] = digest, checked
    return manifest.size + len(content), digest


# -- reading -----------------------------------------------------------------------------------------------------------


def read_into(store: Store, place: Place, part: Part, cells: frozenset[int]) -> Loaded:
    """Take the rows of some cells of a part into a store; per id the highest version wins. Blocks.

    Where copies of a cell are in several parts, name it for one of them only: what is known already is read for
    nothing. Neither stamp nor remembered deletions change; say `Store.stamp` when all parts are read. What the view has
    `moved` rises to the part's stamp (`Store.note_moved`). May be done again, also after it failed in between, and
    while the store is written to.

    Raises
    ------
    SnapshotDamaged
        A file is missing, changed or of another collection; the message names it. Segments before it may be in.
    SnapshotError
        The place cannot be read.
    StoreFull
        The rows would pass the memory limit. Segments before it may be in.
    RecordError
        An attribute is of another kind in the store.
    """
    moment = _moment(store, place, part)
    store.note_moved(part.stamp)
    rows = size = adopted = rebuilt = 0
    for file in part.segments:
        marks = moment.marks[file.uid]
        wanted = marks.alive & _are_of(marks.cells, cells)
        count = int(np.count_nonzero(wanted))
        if not count:
            continue
        size += file.bytes
        adopt = count >= _ADOPTED_SHARE * marks.live
        with _segment(store, place, file, stays=adopt) as sealed:
            if adopt:
                rows += store.adopt(sealed, Marks(wanted, marks.cells))
            else:
                rows += _apply(store, sealed, marks.cells, wanted)
        adopted, rebuilt = adopted + adopt, rebuilt + (not adopt)
    rows += _apply(store, moment.growing, moment.cells, _are_of(moment.cells, cells))
    log.info("part %s: %d rows from %s, %d segments adopted, %d rebuilt", part.name, rows, place.url, adopted, rebuilt)
    return Loaded(rows, size + part.moment.bytes, adopted, rebuilt)


def _apply(
    store: Store,
    source: Sealed | moment_files.Rows,
    cells: npt.NDArray[np.int32],
    wanted: npt.NDArray[np.bool_],
) -> int:
    return sum(store.apply(batch, relabel=False).inserted for batch in batches(source, cells, np.flatnonzero(wanted)))


@contextmanager
def _segment(store: Store, place: Place, file: SegmentFile, *, stays: bool) -> Iterator[Sealed]:
    """A segment of the place, in memory for the length of the block or for good."""
    manifest, name = manifest_of(place, file), place.shown(file.path)
    _same_collection(store, Description(manifest.dim, manifest.metric, manifest.ids), f"{name}/{MANIFEST}")
    with store.loading(file.bytes, stays=stays):
        with place.copy(file.path, manifest.files) as files:
            segment_files.verify(manifest, files, name)
            sealed = segment_files.load(manifest, store.backend, files, name, recall_target=store.index.recall_target)
        if sealed.uid == file.uid:
            sealed.kept[place.url] = file.checksum, time.monotonic()
        yield sealed


def _moment(store: Store, place: Place, part: Part) -> Moment:
    name = place.shown(part.moment.path)
    with verified(place, part.moment) as file:
        moment = moment_files.load(file, name)
    _same_collection(store, moment.about, name)
    told = {uid: len(marks) for uid, marks in moment.marks.items()}
    if told != {file.uid: file.rows for file in part.segments}:
        raise SnapshotDamaged(f"{name} is not of the segments that the snapshot names: take another snapshot")
    return moment


def _same_collection(store: Store, found: Description, name: str) -> None:
    wanted = _description(store)
    if found != wanted:
        raise SnapshotDamaged(
            f"{name} is of another collection ({found}; this one has {wanted}): restore it as its own"
        )


def _description(store: Store) -> Description:
    return Description(store.dim, store.metric, store.ids)


def _are_of(cells: npt.NDArray[np.int32], wanted: frozenset[int]) -> npt.NDArray[np.bool_]:
    return np.isin(cells, np.fromiter(wanted, dtype=np.int32, count=len(wanted)))


def _folder(uid: str) -> str:
    return f"segments/{uid}"
