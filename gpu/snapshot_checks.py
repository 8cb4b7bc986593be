"""Whether a snapshot's files are what its manifest says: by their checksums, without loading any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.gpu import segment_files
from headrace.gpu.checksums import checksum, checksum_of
from headrace.gpu.errors import SnapshotDamaged
from headrace.gpu.segment_files import MANIFEST, Manifest
from headrace.gpu.snapshot_place import Place
from headrace.gpu.snapshot_wire import MomentFile, Part, SegmentFile

__all__ = ["check", "check_segment", "manifest_of", "verified"]


def check(place: Place, part: Part) -> int:
    """Compare every file of a part with its checksum, and load nothing; returns the bytes that were read.

    Raises
    ------
    SnapshotDamaged
        A file is missing or changed; the message names it.
    SnapshotError
        The place cannot be read.
    """
    for file in part.segments:
        check_segment(place, file)
    with verified(place, part.moment):
        pass
    return part.size


def check_segment(place: Place, file: SegmentFile) -> None:
    """As `check`, of one segment: several snapshots may name it."""
    manifest = manifest_of(place, file)
    with place.copy(file.path, manifest.files) as files:
        segment_files.verify(manifest, files, place.shown(file.path))


def manifest_of(place: Place, file: SegmentFile) -> Manifest:
    """A segment's manifest, which must be the very one that the part names; raises as `check`."""
    path = f"{file.path}/{MANIFEST}"
    content, name = place.read(path), place.shown(path)
    if content is None:
        raise SnapshotDamaged(f"{name} is missing: take another snapshot")
    if checksum(content) != file.checksum:
        raise SnapshotDamaged(f"{name} is damaged or of another snapshot: take another snapshot")
    manifest = segment_files.manifest_from(content, name)
    if (manifest.uid, manifest.rows) != (file.uid, file.rows):
        raise SnapshotDamaged(f"{name} is of the segment {manifest.uid}, not {file.uid}: take another snapshot")
    return manifest


@contextmanager
def verified(place: Place, moment: MomentFile) -> Iterator[Path]:
    """A moment's file where it can be read during the block; raises as `check`."""
    name = place.shown(moment.path)
    with place.copy(moment.path) as file:
        if not file.is_file():
            raise SnapshotDamaged(f"{name} is missing: take another snapshot")
        if checksum_of(file) != (moment.bytes, moment.checksum):
            raise SnapshotDamaged(f"{name} is damaged: take another snapshot")
        yield file
