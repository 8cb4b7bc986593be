"""What a snapshot's manifest says of one worker's part: pure data, as plain JSON types and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.gpu.errors import SnapshotDamaged

__all__ = ["NAME", "MomentFile", "Part", "SegmentFile"]

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,200}")
"""Names of snapshots and parts, which are names of files."""

_UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A sealed segment in the folder ``segments/<uid>``.

    Attributes
    ----------
    uid : str
        32 hexadecimal digits.
    rows, live : int
        Rows written, and those of them that were alive at the part's moment.
    bytes : int
        Of all its files.
    checksum : str
        Of its ``manifest.json``, which holds those of the other files.
    """

    uid: str
    rows: int
    live: int
    bytes: int
    checksum: str

    @property
    def path(self) -> str:
        return f"segments/{self.uid}"


@dataclass(frozen=True, slots=True)
class MomentFile:
    """The file ``moments/<snapshot>/<part>.npz``: what may still change about sealed rows, and the growing rows."""

    path: str
    bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Part:
    """One worker's part of a snapshot.

    Attributes
    ----------
    name : str
    stamp : mapping of int to int
        Of the view that was written: topic partition to first offset not applied.
    rows : mapping of int to int
        Live rows by cell.
    segments : tuple of SegmentFile
    moment : MomentFile
    written_bytes : int
        What this write added to the place; the rest was there.
    """

    name: str
    stamp: Mapping[int, int]
    rows: Mapping[int, int]
    segments: tuple[SegmentFile, ...]
    moment: MomentFile
    written_bytes: int

    @property
    def size(self) -> int:
        """Bytes of all files of the part, those that were there already included."""
        return self.moment.bytes + sum(segment.bytes for segment in self.segments)

    def to_wire(self) -> dict[str, Any]:
        """Plain types for JSON or msgpack; mappings become lists of pairs, because their keys are numbers."""
        return {
            **dataclasses.asdict(self),
            "stamp": sorted([partition, offset] for partition, offset in self.stamp.items()),
            "rows": sorted([cell, rows] for cell, rows in self.rows.items()),
            "segments": [dataclasses.asdict(segment) for segment in self.segments],
        }

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> Part:
        """The reverse of `to_wire`.

        Raises
        ------
        SnapshotDamaged
            That cannot have made it: a field is missing or unknown, or would lead out of the snapshots' folder.
        """
        try:
            part = cls(
                **{
                    **fields,
                    "stamp": {int(partition): int(offset) for partition, offset in fields["stamp"]},
                    "rows": {int(cell): int(rows) for cell, rows in fields["rows"]},
                    "segments": tuple(SegmentFile(**segment) for segment in fields["segments"]),
                    "moment": MomentFile(**fields["moment"]),
                }
            )
            folder, snapshot, name = part.moment.path.split("/")
            names = [snapshot, name, part.name]
            sound = folder == "moments" and all(NAME.fullmatch(name) for name in names)
            if not sound or not all(_UID.fullmatch(segment.uid) for segment in part.segments):
                raise ValueError("a name in it is none that Headrace gives")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SnapshotDamaged(
                f"a part in the snapshot's manifest cannot be read: take another snapshot ({error!r})"
            ) from error
        return part
