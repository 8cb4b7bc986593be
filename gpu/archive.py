"""The file of an index that a device has built: named arrays that any NumPy can read, with or without a device.

The libraries' own formats hold for one release of theirs only. It is NumPy's ``.npz``, which is a zip: its first bytes
are `MAGIC`, and every array carries a checksum.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.errors import BackendError
from headrace.gpu.index_spec import BuildParams
from headrace.gpu.npz_files import arrays_of

__all__ = ["MAGIC", "is_archive", "pq_params", "read", "write"]

MAGIC = b"PK"

_END, _END_BYTES = b"PK\x05\x06", 22
_METRICS = ("cosine", "ip", "l2")
_KEPT = (np.dtype(np.float16), np.dtype(np.float32))


def is_archive(path: Path) -> bool:
    """Whether the file begins as an archive does; False where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def write(path: Path, kind: str, metric: str, vectors: npt.NDArray[Any], **arrays: npt.ArrayLike) -> None:
    """Write an index of a kind: its `vectors`, (n, dim) float32 or float16, and more arrays by name; all or nothing.

    Raises
    ------
    BackendError
        The file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        try:
            with part.open("wb") as file:
                named: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
                np.savez(file, kind=np.array(kind), metric=np.array(metric), vectors=vectors, **named)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise BackendError(
            f"cannot write the index to {path}: check the folder and its free space ({error})"
        ) from error


def read(path: Path, kind: str) -> Mapping[str, npt.NDArray[Any]]:
    """All arrays of an index of that kind, by name; ``metric`` and ``vectors`` are among them.

    Raises
    ------
    BackendError
        The file is missing, cut short, altered, or holds something else.
    """
    try:
        with path.open("rb") as file:
            # A zip may be followed by anything; an index is not.
            file.seek(-_END_BYTES, os.SEEK_END)
            if not file.read().startswith(_END):
                raise BackendError(f"{path} is damaged at its end: restore it or build it again")
            file.seek(0)
            arrays = arrays_of(file)
        found, metric, vectors = str(arrays["kind"]), str(arrays["metric"]), arrays["vectors"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BackendError(f"cannot read an index from {path}: restore it or build it again ({error})") from error
    if found != kind:
        raise BackendError(f"{path} holds an index of kind {found!r}, not {kind!r}: load it as what it is")
    if metric not in _METRICS or vectors.ndim != 2 or vectors.dtype not in _KEPT or len(vectors) == 0:
        raise BackendError(
            f"{path} holds {vectors.dtype} {vectors.shape} for the metric {metric!r}, no index: build it again"
        )
    return arrays


def pq_params(parts: Mapping[str, npt.NDArray[Any]]) -> BuildParams:
    """What it takes to build an IVF-PQ index again from its vectors; `parts` are those that `read` returned."""
    lists, pq_dim, pq_bits = map(int, parts["pq"])
    return BuildParams(
        kind="ivf_pq",
        dtype=str(parts["vectors"].dtype),
        graph_degree=0,
        graph_effort=0,
        lists=lists,
        pq_dim=pq_dim,
        pq_bits=pq_bits,
    )
