"""Vectors as FAISS keeps them, and indexes as files: what the host's index kinds have in common."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss as typed_faiss
import numpy as np
import numpy.typing as npt

from headrace.gpu import ending
from headrace.gpu.errors import BackendError

__all__ = [
    "array",
    "faiss",
    "faiss_metric",
    "keep",
    "openmp",
    "over",
    "parameters",
    "pieces",
    "read",
    "read_one_of",
    "search",
    "short",
    "stored",
    "write",
]

# The stubs that come with FAISS lack half of what is used here.
faiss: Any = typed_faiss

_Floats = npt.NDArray[np.float32]
_Kept = npt.NDArray[np.float32] | npt.NDArray[np.float16]
_Octets = npt.NDArray[np.uint8]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]

_MAGIC = b"HRINDEX1"
_TRAILER = struct.Struct("<8s8sQI")
_CHUNK = 1 << 20
_PIECE = 1 << 12


def faiss_metric(metric: str) -> int:
    """FAISS's number of a metric; cosine is the inner product of normalised vectors."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def stored(vectors: _Kept, dtype: str) -> _Kept:
    """The vectors in the dtype that they are to be kept in, row by row; a copy only where it takes one.

    Raises
    ------
    BackendError
        There are no vectors, or a number is too large for float16.
    """
    if len(vectors) == 0:
        raise BackendError("cannot build an index over 0 vectors: give at least one")
    with np.errstate(over="ignore"):
        kept = np.ascontiguousarray(vectors, dtype=np.dtype(dtype))
    if kept.dtype != vectors.dtype and kept.dtype == np.float16 and np.isinf(kept).any():
        worst = float(np.abs(vectors).max())
        raise BackendError(f"a vector holds {worst:g}, and float16 ends at 65504: build the index with dtype float32")
    return kept


def pieces(vectors: _Kept) -> Iterator[_Floats]:
    """The vectors as float32, a piece at a time: what must be converted may not fit into memory as a whole, and between
    two pieces a build can be given up (`headrace.gpu.ending`).
    """
    for start in range(0, len(vectors), _PIECE):
        ending.check()
        yield vectors[start : start + _PIECE].astype(np.float32, copy=False)


def keep(vectors: _Kept, metric: str) -> Any:
    """A FAISS index over a copy of the vectors, float32 or float16 (n, dim), as they are."""
    index = _empty(vectors, metric)
    index.add_sa_codes(vectors.view(np.uint8))
    return index


def over(vectors: _Kept | _Octets, metric: str) -> Any:
    """As `keep`, over the array itself, which must outlive the index; takes 10 µs whatever its size. An octet stands
    for itself less 128.
    """
    octets = np.ascontiguousarray(vectors).view(np.uint8).reshape(-1)
    index = _empty(vectors, metric)
    index.codes = faiss.MaybeOwnedVectorUInt8.create_view(faiss.swig_ptr(octets), octets.size, index.codes.owner)
    index.ntotal = len(vectors)
    faiss.add_to_referenced_objects(index, octets)
    return index


def _empty(vectors: _Kept | _Octets, metric: str) -> Any:
    dim, quantizer = vectors.shape[1], faiss.ScalarQuantizer
    if vectors.dtype != np.float32:
        kind = quantizer.QT_fp16 if vectors.dtype == np.float16 else quantizer.QT_8bit_direct_signed
        return faiss.IndexScalarQuantizer(dim, kind, faiss_metric(metric))
    return faiss.IndexFlat(dim, faiss_metric(metric))


def array(index: Any) -> _Kept:
    """What `keep` has kept, as an array without a copy; valid as long as the caller holds the index."""
    index = faiss.downcast_index(index)
    octets = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    dtype = np.float16 if isinstance(index, faiss.IndexScalarQuantizer) else np.float32
    view: _Kept = octets.view(dtype).reshape(index.ntotal, index.d)
    return view


@contextmanager
def openmp(threads: int) -> Iterator[None]:
    """Let FAISS use so many OpenMP threads in this block, on the calling thread only: OpenMP keeps the number apart."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def parameters(kind: Any, allowed: _Bools | None, **values: Any) -> Any:
    """FAISS's search parameters of a kind, with the rows that may be found; None where nothing is to be said."""
    if allowed is None:
        return kind(**values) if values else None
    return kind(sel=faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little")), **values)


def search(index: Any, queries: _Floats, k: int, params: Any) -> tuple[_Floats, _Ints]:
    """The index's answer, as `headrace.gpu.backend.Exact.search` returns it.

    A single query stays on its thread: waking a team for it costs more than it saves, and stalls where cores are busy.
    """
    if len(queries) == 1 and (threads := faiss.omp_get_max_threads()) > 1:
        faiss.omp_set_num_threads(1)
        try:
            scores, rows = index.search(queries, k, params=params)
        finally:
            faiss.omp_set_num_threads(threads)
    else:
        scores, rows = index.search(queries, k, params=params)
    if short(rows):
        scores[rows < 0] = np.inf if index.metric_type == faiss.METRIC_L2 else -np.inf
    return scores, rows


def short(rows: _Ints) -> bool:
    """Has any query fewer rows than it asked for? Rows (q, k), -1 behind the last one; q and k at least 1."""
    last = rows.item(-1) if len(rows) == 1 else rows[:, -1].min()  # of one query without the calls that arrays take
    return bool(last < 0)


def write(index: Any, kind: str, path: Path) -> None:
    """Write an index, and behind it its kind and a checksum; the file appears whole or not at all.

    Raises
    ------
    BackendError
        The file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        faiss.write_index(index, str(part))
        size, checksum = _checksum(part, None)
        with part.open("ab") as file:
            file.write(_TRAILER.pack(_MAGIC, kind.encode(), size, checksum))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise BackendError(
            f"cannot write the index to {path}: check the folder and its free space ({error})"
        ) from error


def read(path: Path, kind: str) -> Any:
    """Read an index of a kind written by `write`; raises as `read_one_of`."""
    return read_one_of(path, (kind,))[0]


def read_one_of(path: Path, kinds: Sequence[str]) -> tuple[Any, str]:
    """Read an index of one of these kinds, written by `write`, and say which.

    Raises
    ------
    BackendError
        The file is missing, cut short, changed, or something else.
    """
    try:
        with path.open("rb") as file:
            size = max(0, file.seek(0, os.SEEK_END) - _TRAILER.size)
            file.seek(size)
            trailer = file.read(_TRAILER.size)
        magic, written, *rest = _TRAILER.unpack(trailer) if len(trailer) == _TRAILER.size else (b"", b"")
        if magic != _MAGIC or rest != list(_checksum(path, size)):
            raise BackendError(f"{path} is damaged or holds no index: restore it or build it again")
        found = written.rstrip(b"\0").decode()
        if found not in kinds:
            raise BackendError(f"{path} holds an index of kind {found}, not {kinds[0]}: load it as what it is")
        return faiss.read_index(str(path), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE), found
    except (OSError, RuntimeError) as error:
        raise BackendError(f"cannot read an index from {path}: restore it or build it again ({error})") from error


def _checksum(path: Path, size: int | None) -> tuple[int, int]:
    """Length and CRC-32 of a file's first `size` bytes, or of all of it."""
    done, checksum = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK if size is None else min(_CHUNK, size - done)):
            done, checksum = done + len(chunk), zlib.crc32(chunk, checksum)
    return done, checksum
