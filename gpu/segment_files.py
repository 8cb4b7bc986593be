"""A sealed segment as a folder: written once, and checked when it is read.

::

    manifest.json   what it is: format, uid, parameters, calibration, and the size and checksum of every other file
    index           by the index kind itself
    rows.npz        ids, versions, attributes

Which rows are alive, and their cells, may still change and is kept elsewhere (`headrace.gpu.moment_files`); so one
segment gives the same folder whenever and by whomever it is written. NumPy's and JSON's formats only: nothing is ever
unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.gpu.backend import Backend
from headrace.gpu.calibrate import Calibration, calibrate
from headrace.gpu.checksums import checksum, checksum_of
from headrace.gpu.errors import BackendError, SnapshotDamaged, SnapshotError
from headrace.gpu.index_spec import BuildParams
from headrace.gpu.npz_files import arrays_of
from headrace.gpu.row_arrays import columns_from, ids_from, of_columns, of_ids, of_versions, versions_from
from headrace.gpu.segments import Sealed

__all__ = ["MANIFEST", "Manifest", "load", "manifest_from", "save", "verify"]

MANIFEST = "manifest.json"
"""Written last: what has none is not complete."""

_FORMAT = 1
_INDEX, _ROWS = "index", "rows.npz"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a segment's folder holds.

    Attributes
    ----------
    uid : str
        Of the segment; two folders with the same uid hold the same.
    backend : str
        By which the index was written.
    rows, dim : int
    metric : one of `headrace.gpu.backend.METRICS`
    ids : {"string", "integer"}
    params : BuildParams
    calibration : Calibration
    schema : mapping of str to str
        Kinds of attributes by name.
    files : mapping of str to (int, str)
        Size and checksum of each other file.
    """

    uid: str
    backend: str
    rows: int
    dim: int
    metric: str
    ids: str
    params: BuildParams
    calibration: Calibration
    schema: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]

    @property
    def size(self) -> int:
        """Bytes of the other files."""
        return sum(size for size, _ in self.files.values())

    def to_json(self) -> bytes:
        """With a checksum of its own."""
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"params": dataclasses.asdict(self.params), "calibration": self.calibration.to_wire()}
        fields |= {"format": _FORMAT}
        return json.dumps({**fields, "checksum": _own_checksum(fields)}, indent=1, sort_keys=True).encode()


def _own_checksum(fields: Mapping[str, Any]) -> str:
    return checksum(json.dumps(fields, sort_keys=True).encode())


def manifest_from(content: bytes, name: str) -> Manifest:
    """The reverse of `Manifest.to_json`; `name` is the file's, for messages.

    Raises
    ------
    SnapshotDamaged
        That cannot have made it.
    SnapshotError
        It is of another format.
    """
    try:
        fields: dict[str, Any] = json.loads(content)
        if fields.pop("checksum") != _own_checksum(fields):
            raise ValueError("its checksum differs")
        if (written := fields.pop("format")) != _FORMAT:
            raise SnapshotError(f"{name} is written in format {written!r}, this Headrace reads {_FORMAT}: use its own")
        fields["params"] = BuildParams(**fields["params"])
        fields["calibration"] = Calibration.from_wire(fields["calibration"])
        fields["files"] = {file: (int(size), str(digest)) for file, (size, digest) in fields["files"].items()}
        if set(fields["files"]) != {_INDEX, _ROWS}:
            raise ValueError(f"it lists {sorted(fields['files'])}")
        return Manifest(**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BackendError) as error:
        raise SnapshotDamaged(f"{name} is not a segment's manifest: take another snapshot ({error!r})") from error


def save(segment: Sealed, metric: str, backend: Backend, folder: Path) -> Manifest:
    """Make the folder of a segment; where that fails, what was written so far is left to the caller.

    Parameters
    ----------
    segment : Sealed
    metric : one of `headrace.gpu.backend.METRICS`
    backend : Backend
    folder : Path
        Not there yet.

    Raises
    ------
    SnapshotError
        The index cannot be written.
    OSError
        Anything else cannot.
    """
    folder.mkdir()
    try:
        backend.kinds[segment.params.kind].save(segment.index, folder / _INDEX)
    except BackendError as error:
        raise SnapshotError(str(error)) from error
    arrays: Any = {**of_versions(segment.versions), **of_ids(segment.ids), **of_columns(segment.columns)}
    np.savez(folder / _ROWS, **arrays)
    manifest = Manifest(
        segment.uid,
        backend.name,
        len(segment),
        int(segment.vectors_of(np.arange(1)).shape[1]),
        metric,
        segment.ids.kind,
        segment.params,
        segment.calibration,
        dict(segment.columns.schema),
        {name: checksum_of(folder / name) for name in (_INDEX, _ROWS)},
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return manifest


def verify(manifest: Manifest, folder: Path, name: str) -> None:
    """Compare all files with their checksums. `name` is the folder's, for messages.

    Raises
    ------
    SnapshotDamaged
        A file is missing or changed.
    """
    for file, told in manifest.files.items():
        if not (folder / file).is_file():
            raise SnapshotDamaged(f"{name}/{file} is missing: take another snapshot")
        if checksum_of(folder / file) != told:
            raise SnapshotDamaged(f"{name}/{file} is damaged: take another snapshot")


def load(manifest: Manifest, backend: Backend, folder: Path, name: str, *, recall_target: float = 0.95) -> Sealed:
    """Read a segment, written by this or another backend, once `verify` has found nothing.

    An index that another backend wrote is converted or built again: then it is another segment, with a uid and a
    calibration of its own, for `recall_target`.

    Raises
    ------
    SnapshotDamaged
        The files do not hold what the manifest says.
    """
    kind, rows = backend.kinds[manifest.params.kind], manifest.rows
    try:
        arrays = arrays_of(folder / _ROWS)
        index = kind.load(folder / _INDEX)
        ids, versions = ids_from(arrays, manifest.ids), versions_from(arrays)
        columns = columns_from(arrays, manifest.schema, rows, backend.xp)
        if not len(ids) == len(versions) == rows:
            raise ValueError(f"{len(ids)} ids for {rows} rows")
        uid, calibration = manifest.uid, manifest.calibration
        if manifest.backend != backend.name:
            vectors = kind.vectors(index, backend.xp.arange(rows))
            uid = ""
            calibration = calibrate(backend, kind, index, vectors, manifest.metric, recall_target=recall_target)
    except (ValueError, KeyError, zipfile.BadZipFile, BackendError) as error:
        raise SnapshotDamaged(f"{name} cannot be used: take another snapshot ({error})") from error
    return Sealed(backend, manifest.params, index, calibration, ids, versions, columns, uid=uid)
