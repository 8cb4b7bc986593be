"""What a snapshot is: its manifest, as JSON with a checksum over itself. Pure; nothing is ever unpickled.

::

    segments/<uid>/…             sealed segments, written once (`headrace.gpu.snapshot_parts`)
    moments/<snapshot>/…         what may still change about them, and growing rows
    snapshots/<snapshot>.json    the manifest, written last: without it there is no snapshot
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.cluster.snapshot_state import Snapshots
from headrace.cluster.state import CollectionSpec, CollectionState, first_codebook
from headrace.gpu.errors import HeadraceError, SnapshotDamaged, SnapshotError
from headrace.gpu.snapshot_wire import Part

__all__ = ["FOLDER", "Entry", "Manifest", "lowest", "manifest_of", "read_manifest"]

FOLDER = "snapshots"
FORMAT = 1

_ID = re.compile(r"(\d{6,})-[A-Za-z0-9-]+")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One complete snapshot.

    Attributes
    ----------
    snapshot : str
        Its id; see `next_id`.
    created : float
        When it was begun, seconds since 1970.
    seconds : float
        That writing it took.
    lineage : str
        Of which collection; see `Snapshots.lineage`.
    state : CollectionState
        Spec, codebook, source, schema and alarms, and whether it is `detached`; without workers.
    offsets : dict of int to int
        Topic partition to the first offset that some part may lack: the log is read from there.
    parts : tuple of Part
    writers : tuple of str
        Worker that wrote each part.
    """

    snapshot: str
    created: float
    seconds: float
    lineage: str
    state: CollectionState
    offsets: Mapping[int, int]
    parts: tuple[Part, ...]
    writers: tuple[str, ...]

    @property
    def rows(self) -> dict[int, int]:
        """Live rows by cell."""
        rows: dict[int, int] = {}
        for part in self.parts:
            for cell, count in part.rows.items():
                rows[cell] = max(rows.get(cell, 0), count)
        return rows

    @property
    def detached(self) -> bool:
        """Its rows are of a topic that it no longer names: no other may be read into them."""
        return self.state.snapshots.detached or (self.state.source is None and any(self.rows.values()))

    @property
    def nbytes(self) -> int:
        """All its files; a segment that two parts name counts once."""
        segments = {segment.uid: segment.bytes for part in self.parts for segment in part.segments}
        return sum(segments.values()) + sum(part.moment.bytes for part in self.parts)

    @property
    def written_bytes(self) -> int:
        """What it added to what was there."""
        return sum(part.written_bytes for part in self.parts)

    def to_bytes(self) -> bytes:
        """As `read_manifest` takes it."""
        content = {
            "format": FORMAT,
            "snapshot": self.snapshot,
            "collection": self.state.spec.name,
            "created": self.created,
            "seconds": self.seconds,
            "lineage": self.lineage,
            "offsets": [list(pair) for pair in sorted(self.offsets.items())],
            "state": _texts(self.state.to_wire()),
            "parts": [part.to_wire() for part in self.parts],
            "writers": list(self.writers),
        }
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode()

    def told(self) -> dict[str, Any]:
        """What people are shown; plain msgpack types."""
        source = self.state.source
        return {
            "snapshot": self.snapshot,
            "collection": self.state.spec.name,
            "created": self.created,
            "seconds": self.seconds,
            "rows": sum(self.rows.values()),
            "bytes": self.nbytes,
            "bytes_written": self.written_bytes,
            "offsets": [list(pair) for pair in sorted(self.offsets.items())],
            "encoder": self.state.spec.encoder,
            "source": source and self.state.to_wire()["source"],
            "problem": "",
        }


@dataclass(frozen=True, slots=True)
class Entry:
    """What was found under ``snapshots/``: a manifest, or why there is none."""

    snapshot: str
    manifest: Manifest | None = None
    problem: str = ""
    foreign: bool = False
    """It may well be good, but this Headrace cannot know what it names."""
    unread: bool = False
    """Its file could not be read just now; another time it may be."""

    @property
    def number(self) -> int:
        found = _ID.fullmatch(self.snapshot)
        return int(found[1]) if found else -1

    def told(self) -> dict[str, Any]:
        """As `Manifest.told`; of a damaged one only its name and what is wrong."""
        if self.manifest is not None:
            return {**self.manifest.told(), "problem": self.problem}
        return {"snapshot": self.snapshot, "problem": self.problem}


def lowest(stamps: Iterable[Mapping[int, int]], origins: Mapping[int, int]) -> dict[int, int]:
    """Topic partition to the lowest of all parts' watermarks; of a part that does not name it, the log's origin."""
    stamps = list(stamps)
    return {
        tp: min((stamp.get(tp, origins.get(tp, 0)) for stamp in stamps), default=origins.get(tp, 0))
        for tp in sorted({*origins, *(tp for stamp in stamps for tp in stamp)})
    }


def manifest_of(
    state: CollectionState, snapshot: str, parts: Mapping[str, Part], *, lineage: str, created: float, seconds: float
) -> Manifest:
    """The manifest of `parts`, written by these workers while the collection was at `state`."""
    bare = CollectionState(spec=state.spec, codebook=state.codebook, source=state.source, alarms=state.alarms)
    return Manifest(
        snapshot=snapshot,
        created=created,
        seconds=seconds,
        lineage=lineage,
        state=bare.with_(schema=dict(state.schema), snapshots=Snapshots(detached=state.snapshots.detached)),
        offsets=lowest((part.stamp for part in parts.values()), state.source.origins if state.source else {}),
        parts=tuple(parts.values()),
        writers=tuple(parts),
    )


def read_manifest(snapshot: str, content: bytes) -> Entry:
    """Take a manifest from its file's content; what is wrong with it is said in the entry."""
    problem, foreign = f"its manifest {FOLDER}/{snapshot}.json is damaged", False
    try:
        wire: dict[str, Any] = json.loads(content)
        checksum = wire.pop("checksum")
        if wire["format"] != FORMAT:
            foreign = True
            raise SnapshotError(f"it is of format {wire['format']!r} and this Headrace reads {FORMAT}: use a newer one")
        if checksum != _checksum(wire):
            raise SnapshotDamaged(f"{problem}: its checksum differs")
        if wire["snapshot"] != snapshot:
            raise SnapshotDamaged(f"{FOLDER}/{snapshot}.json is the manifest of {wire['snapshot']!r}")
        return Entry(snapshot, _manifest(wire))
    except HeadraceError as error:
        return Entry(snapshot, problem=str(error), foreign=foreign)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # whatever bytes may make of JSON
        return Entry(snapshot, problem=f"{problem} ({type(error).__name__}: {error})")


def _manifest(wire: Mapping[str, Any]) -> Manifest:
    told = _from_texts(wire["state"])
    try:
        # Fields that this Headrace has and the writer had not keep their defaults.
        spec = CollectionSpec.from_wire(told["spec"])
        state = CollectionState.from_wire({**CollectionState(spec, first_codebook(spec.dim)).to_wire(), **told})
    except TypeError as error:
        raise SnapshotError(f"it was written by a newer Headrace ({error}): use that") from error
    return Manifest(
        snapshot=wire["snapshot"],
        created=float(wire["created"]),
        seconds=float(wire["seconds"]),
        lineage=wire["lineage"],
        state=state,
        offsets=dict(wire["offsets"]),
        parts=tuple(Part.from_wire(part) for part in wire["parts"]),
        writers=tuple(wire["writers"]),
    )


# -- JSON --------------------------------------------------------------------------------------------------------------


def _checksum(content: Mapping[str, Any]) -> str:
    plain = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(plain, digest_size=16).hexdigest()


def _texts(value: Any) -> Any:
    """Bytes as texts, for JSON."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {name: _texts(inner) for name, inner in value.items()}
    return [_texts(inner) for inner in value] if isinstance(value, list | tuple) else value


def _from_texts(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"base64"}:
            return base64.b64decode(value["base64"], validate=True)
        return {name: _from_texts(inner) for name, inner in value.items()}
    return [_from_texts(inner) for inner in value] if isinstance(value, list) else value
