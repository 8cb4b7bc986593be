"""Vectors as the device's index kinds keep them, and indexes that come from the host: what they have in common."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import cupy as cp
from cuvs.common.exceptions import CuvsException

from headrace.gpu.errors import BackendError
from headrace.gpu.index_spec import BuildParams, IndexSpec, build_params

__all__ = ["rebuilt", "scratch", "stored"]

log = logging.getLogger("headrace.gpu")

Array = Any


def stored(vectors: Array, dtype: str) -> Array:
    """The vectors in the dtype that they are to be kept in, row by row; a copy only where it takes one.

    Raises
    ------
    BackendError
        There are no vectors, or a number is too large for float16.
    """
    if len(vectors) == 0:
        raise BackendError("cannot build an index over 0 vectors: give at least one")
    rows = cp.ascontiguousarray(vectors, dtype=dtype)
    if rows.dtype != vectors.dtype and rows.dtype == cp.float16 and bool(cp.isinf(rows).any()):
        worst = float(cp.abs(vectors).max())
        raise BackendError(f"a vector holds {worst:g}, and float16 ends at 65504: build the index with dtype float32")
    return rows


def rebuilt(host: ModuleType, path: Path, kind: str, build: Callable[[Array, str, BuildParams], Any]) -> Any:
    """The index that the host's kind has saved, built again on the device from its vectors, with default parameters.

    Raises
    ------
    BackendError
        The file is missing, damaged, or of another kind.
    """
    index = host.load(path)
    rows = index.rows
    log.info("%s was built on the host: building %s over its %d vectors again on the device", path, kind, len(rows))
    return build(cp.asarray(rows), index.metric, build_params(IndexSpec(kind, str(rows.dtype)), *rows.shape))


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """The name of a file beside `path` that a library may write or read; it is gone after the block.

    Raises
    ------
    BackendError
        What the block reads or writes cannot be read or written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
            yield Path(folder) / "index"
    except (OSError, CuvsException) as error:
        raise BackendError(f"cannot use {path}: check the folder, its free space and the device ({error})") from error
