"""A sealed segment as a folder: written once, all of it or nothing, and checked when it is read.

::

    manifest.json   what it is: format, parameters, calibration, and the size and checksum of every other file
    index           by the index kind itself
    rows.npz        ids, versions, attributes, and of the moment of writing which rows were alive, and their cells

NumPy's and JSON's formats only: nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Backend
from headrace.gpu.calibrate import Calibration
from headrace.gpu.columns import Columns
from headrace.gpu.errors import BackendError
from headrace.gpu.ids import IdColumn, hash_ids
from headrace.gpu.index_spec import BuildParams
from headrace.gpu.marks import Marks
from headrace.gpu.reading import to_host
from headrace.gpu.segments import Sealed, SegmentView
from headrace.gpu.versions import Versions

__all__ = ["load", "save"]

_FORMAT = 1
_MANIFEST, _INDEX, _ROWS = "manifest.json", "index", "rows.npz"
_PIECE = 1 << 20

Arrays = dict[str, npt.NDArray[Any]]


def save(view: SegmentView, ids: str, backend: Backend, path: Path) -> None:
    """Write one moment of a sealed segment to the folder `path`, which must not be there yet.

    Parameters
    ----------
    view : SegmentView
        Of a `Sealed` segment.
    ids : {"string", "integer"}
    backend : Backend
    path : Path

    Raises
    ------
    BackendError
        It cannot be written; nothing is left at `path`.
    """
    segment = view.segment
    if not isinstance(segment, Sealed):
        raise BackendError(f"a {type(segment).__name__.lower()} segment still changes: seal it before saving it")
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        try:
            part.mkdir(parents=True)
            backend.kinds[segment.params.kind].save(segment.index, part / _INDEX)
            arrays: Any = _arrays(view, ids)  # the stubs take names for options
            np.savez(part / _ROWS, **arrays)
            manifest = {
                "format": _FORMAT,
                "backend": backend.name,
                "rows": len(segment),
                "ids": ids,
                "params": dataclasses.asdict(segment.params),
                "calibration": segment.calibration.to_wire(),
                "schema": dict(segment.columns.schema),
                "files": {name: _checksum(part / name) for name in _files(part)},
            }
            (part / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for file in [*_files(part), "."]:
                _sync(part / file)
            part.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise BackendError(
            f"cannot write a segment to {path}: check the folder and its free space ({error})"
        ) from error


def load(backend: Backend, path: Path) -> tuple[Sealed, Marks]:
    """Read a segment that `save` wrote, on this or another backend that knows the index's file.

    Raises
    ------
    BackendError
        It is missing, incomplete, damaged, or of a newer format.
    """
    manifest = _manifest(path)
    for name, (size, digest) in manifest["files"].items():
        if not (path / name).is_file() or _checksum(path / name) != [size, digest]:
            raise BackendError(f"{path / name} is missing or damaged: restore the segment from another copy")
    params = BuildParams(**manifest["params"])
    with np.load(path / _ROWS, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    rows = int(manifest["rows"])
    index = backend.kinds[params.kind].load(path / _INDEX)
    sealed = Sealed(
        backend,
        params,
        index,
        Calibration.from_wire(manifest["calibration"]),
        _ids_from(arrays, manifest["ids"]),
        Versions(arrays["topic_partitions"], arrays["offsets"], arrays["timestamps"]),
        _columns_from(arrays, manifest["schema"], rows, backend),
    )
    return sealed, Marks(np.unpackbits(arrays["alive"], count=rows).astype(np.bool_), arrays["cells"])


# -- rows as arrays ----------------------------------------------------------------------------------------------------


def _arrays(view: SegmentView, ids: str) -> Arrays:
    segment = view.segment
    versions = segment.versions
    return {
        "topic_partitions": versions.topic_partitions,
        "offsets": versions.offsets,
        "timestamps": versions.timestamps,
        "alive": np.packbits(view.alive),
        "cells": view.cells,
        **_of_ids(segment.ids, ids),
        **_of_columns(segment.columns),
    }


def _of_ids(column: IdColumn, kind: str) -> Arrays:
    values = column.to_list()
    if kind == "integer":
        return {"ids": np.array(values, dtype=np.int64)}
    return _of_texts("ids", [str(value) for value in values])


def _ids_from(arrays: Mapping[str, npt.NDArray[Any]], kind: str) -> IdColumn:
    values = arrays["ids"].tolist() if kind == "integer" else _texts_from("ids", arrays)
    column = IdColumn(kind)
    column.append(values, hash_ids(values, kind))
    return column.take(np.arange(len(values)))


def _of_columns(columns: Columns) -> Arrays:
    arrays: Arrays = {}
    for number, name in enumerate(sorted(columns.schema)):
        column = columns[name]
        arrays[f"values-{number}"] = to_host(column.values[: len(columns)])
        arrays[f"valid-{number}"] = np.packbits(to_host(column.valid[: len(columns)]))
        if column.vocabulary is not None:
            arrays |= _of_texts(f"texts-{number}", list(column.vocabulary))
    return arrays


def _columns_from(
    arrays: Mapping[str, npt.NDArray[Any]], schema: Mapping[str, str], rows: int, backend: Backend
) -> Columns:
    attributes: dict[str, list[Any]] = {}
    for number, (name, kind) in enumerate(sorted(schema.items())):
        values: list[Any] = arrays[f"values-{number}"].tolist()
        if kind == "str":
            texts = _texts_from(f"texts-{number}", arrays)
            values = [texts[code] if code >= 0 else None for code in values]
        valid = np.unpackbits(arrays[f"valid-{number}"], count=rows).tolist()
        attributes[name] = [value if there else None for value, there in zip(values, valid, strict=True)]
    columns = Columns(backend.xp)
    columns.append(attributes, rows)
    return Columns.gather(backend.xp, [(columns, np.arange(rows))])


def _of_texts(name: str, texts: list[str]) -> Arrays:
    # Not every str is UTF-8: lone surrogates can come in through JSON.
    octets = [text.encode("utf-8", "surrogatepass") for text in texts]
    lengths = np.fromiter(map(len, octets), dtype=np.int64, count=len(octets))
    return {name: np.frombuffer(b"".join(octets), dtype=np.uint8), f"{name}-lengths": lengths}


def _texts_from(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    octets = arrays[name].tobytes()
    ends = np.cumsum(arrays[f"{name}-lengths"]).tolist()
    return [octets[start:end].decode("utf-8", "surrogatepass") for start, end in zip([0, *ends], ends, strict=False)]


# -- files -------------------------------------------------------------------------------------------------------------


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackendError(f"{path} holds no complete segment: restore it from another copy ({error})") from error
    if manifest.get("format") != _FORMAT:
        raise BackendError(
            f"{path} is written in format {manifest.get('format')!r}, this Headrace reads {_FORMAT}: use a newer one"
        )
    return manifest


def _files(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix()


def _checksum(file: Path) -> list[Any]:
    """Size and digest."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return [file.stat().st_size, digest.hexdigest()]


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
