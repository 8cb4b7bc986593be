"""The compressed index kind: FAISS IVF-PQ, re-ranked from the kept vectors. See `headrace.gpu.backend.IndexKind`.

With codes of 4 bits FAISS scans 32 rows per step in registers: at the same bytes per row that is five to nine times as
fast as codes of 8 bits, whose tables do not fit there, and trains ten times as fast.
"""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu import archive, filtered, ranking
from headrace.gpu.host import exact, storage
from headrace.gpu.host.storage import faiss
from headrace.gpu.index_spec import BuildParams

__all__ = ["Index", "build", "efforts", "extension", "load", "nbytes", "save", "search", "vectors"]

log = logging.getLogger("headrace.gpu")

_Floats = npt.NDArray[np.float32]
_Kept = npt.NDArray[np.float32] | npt.NDArray[np.float16]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]

_LADDER = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_ITERATIONS = 8
_SAMPLE_PER_LIST = 40
_SAMPLE_PER_CODE = 64
# Measured for recall 0.99: codes of 768 bits need 4 candidates per row asked for (6 under a filter), of 384 bits 8, of
# 64 bits 16.
_REFINE = 6
_FINE_BITS = 768
_MIN_CANDIDATES = 60
_CALIBRATED = 10
_SPREAD = 1.5
# Before it scans, a search finds its lists and fills its tables: as long as scoring so many rows takes.
_START = 1000


class Index:
    """Codes in lists, and the vectors; never changes.

    Parameters
    ----------
    owner : faiss.IndexRefine or the index of `storage.keep`
        The latter for few rows, and where numbers are too large for FAISS: there are no codes, all are scored.

    Attributes
    ----------
    metric : {"ip", "l2"}
        ip for cosine too: the scores are the same.
    rows : float32 or float16, (n, dim)
        The vectors, in memory that belongs to `owner`.
    codes : faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan or None
    scan : float
        What scanning a code costs, in the time of scoring a vector.
    refine : int
        Candidates per row asked for that are scored again: more where codes are coarse.
    """

    __slots__ = ("codes", "metric", "owner", "refine", "rows", "scan")

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.metric = "l2" if owner.metric_type == faiss.METRIC_L2 else "ip"
        self.codes: Any = None
        self.scan, self.refine = 1.0, _REFINE
        if isinstance(owner, faiss.IndexRefine):
            self.codes = faiss.downcast_index(owner.base_index)
            self.rows = storage.array(owner.refine_index)
            self.scan = 0.3 if isinstance(self.codes, faiss.IndexIVFPQFastScan) else 2.0
            bits = self.codes.pq.M * self.codes.pq.nbits
            self.refine = math.ceil(_REFINE * max(1.0, math.sqrt(_FINE_BITS / bits)))
        else:
            self.rows = storage.array(owner)


def build(vectors: _Kept, metric: str, params: BuildParams, *, threads: int = 1) -> Index:
    """Train lists and codes on a sample and fill them; the same vectors give the same index.

    FAISS ends the process where a squared distance is infinite, so where one could be there are no lists.

    Raises
    ------
    BackendError
        There are no vectors, or a number is too large for float16.
    """
    kept = storage.stored(vectors, params.dtype)
    far = params.lists > 0 and not ranking.squares(np, kept)
    if far:
        log.warning("%d vectors hold numbers too large to be put into lists: all of them are scored", len(kept))
    with storage.openmp(threads):
        refine = storage.keep(kept, metric)
        if params.lists == 0 or far:
            return Index(refine)
        codes = _codes(kept, storage.faiss_metric(metric), params)
    owner = faiss.IndexRefine(codes, refine)
    owner.own_fields = owner.own_refine_index = True
    codes.this.disown()
    refine.this.disown()
    return Index(owner)


def _codes(vectors: _Kept, metric: int, params: BuildParams) -> Any:
    n, dim = vectors.shape
    kind = faiss.IndexIVFPQFastScan if params.pq_bits == 4 else faiss.IndexIVFPQ
    coarse = faiss.IndexFlat(dim, metric)
    codes = kind(coarse, dim, params.lists, params.pq_dim, params.pq_bits, metric)
    codes.own_fields = True
    coarse.this.disown()
    # FAISS would warn on stderr about samples that are small on purpose: codes gain nothing from larger ones.
    for training, most in ((codes.cp, _SAMPLE_PER_LIST), (codes.pq.cp, _SAMPLE_PER_CODE)):
        training.niter, training.min_points_per_centroid, training.max_points_per_centroid = _ITERATIONS, 1, most
    # For squared distances FAISS would keep a table of lists x centroids that is larger than all codes.
    codes.use_precomputed_table = -1
    sample = max(_SAMPLE_PER_LIST * params.lists, _SAMPLE_PER_CODE << params.pq_bits)
    chosen = np.sort(np.random.default_rng(0).choice(n, min(sample, n), replace=False))
    codes.train(vectors[chosen].astype(np.float32, copy=False))
    for piece in storage.pieces(vectors):
        codes.add(piece)
    return codes


def search(index: Index, allowed: _Bools | None, queries: _Floats, k: int, *, effort: int) -> tuple[_Floats, _Ints]:
    """The `k` best allowed rows, approximately; `effort` is the lists to probe, for up to 10 rows without a filter.

    With a filter the search is for the nearest rows of all, as `headrace.gpu.filtered` says. With a share f of allowed
    rows the `k` best of them lie as far apart as the k / f best of all, so more lists are probed; never so few that
    they hold fewer than `refine` * `k` allowed rows. Where scanning the codes in so many lists costs more than scoring
    every allowed row, these are scored. The same is done for single queries that come back short.

    Measured with 20 K rows of 384 numbers in 282 lists, 8 probed: at f = 0.1 recall, 0.98 without a filter, falls to
    0.90 with 1/f as many lists and to 0.98 with f to the power of -1.5; `k` = 100 does the same.
    """
    total = len(index.rows)
    count = total if allowed is None else int(np.count_nonzero(allowed))
    if count == total:
        allowed = None
    if index.codes is None or count == 0 or len(queries) == 0 or k == 0:
        return exact.search(index.rows, allowed, queries, k, index.metric)
    lists = index.codes.nlist
    reach = max(1.0, k / _CALIBRATED) * total / count
    probes = math.ceil(max(effort * reach**_SPREAD, index.refine * k * lists / count))
    if probes >= lists or count <= _START + index.scan * probes * total / lists:
        return exact.search(index.rows, allowed, queries, k, index.metric)
    if allowed is not None:
        return _among(index, allowed, count, queries, k, probes)
    scores, rows = _near(index, queries, k, probes, index.refine)
    if rows[:, -1].min() < 0:
        short = np.flatnonzero(rows[:, min(k, count) - 1] < 0)
        scores[short], rows[short] = exact.search(index.rows, None, queries[short], k, index.metric)
    return scores, rows


def _among(index: Index, allowed: _Bools, count: int, queries: _Floats, k: int, probes: int) -> tuple[_Floats, _Ints]:
    """The `k` best of the allowed rows, `count` of them; first `probes` lists are looked through."""
    total, lists = len(index.rows), index.codes.nlist
    width = max(k, filtered.depth(k, count, total))
    # As many allowed rows among the candidates as there are candidates without a filter.
    refine = index.refine * k * total / (count * width)

    def walk(some: _Floats, factor: int) -> tuple[_Floats, _Ints]:
        deep = min(factor * width, total)
        near = _near(index, some, deep, math.ceil(probes * factor**_SPREAD), max(refine, 1.0))
        return filtered.keep(np, *near, allowed, k, index.metric)

    def score(some: _Floats) -> tuple[_Floats, _Ints]:
        return exact.search(index.rows, allowed, some, k, index.metric)

    # More than all lists cannot be probed, and scoring must cost twice what scanning does.
    scanned = index.scan * probes * total / lists
    most = min(lists / probes, (count / 2 - _START) / scanned) ** (1 / _SPREAD) if count > 2 * _START else 1.0
    return filtered.search(np, queries, walk, score, min(k, count), most)


def _near(index: Index, queries: _Floats, k: int, probes: int, refine: float) -> tuple[_Floats, _Ints]:
    """The `k` nearest rows in `probes` lists, `refine` times as many candidates scored."""
    return storage.search(index.owner, queries, k, _parameters(max(refine, _MIN_CANDIDATES / k), probes))


@functools.lru_cache(256)  # to make them takes a third of the time of a small search
def _parameters(factor: float, probes: int) -> Any:
    return faiss.IndexRefineSearchParameters(
        k_factor=factor, base_index_params=faiss.SearchParametersIVF(nprobe=probes)
    )


def extension(index: Index) -> None:
    """None: lists and codes are trained on the rows that they are to hold."""


def efforts(index: Index, k: int) -> tuple[int, ...]:
    """Numbers of lists, as far as scanning them is faster than scoring every row."""
    if index.codes is None:
        return (0,)
    lists = index.codes.nlist
    return tuple(probes for probes in _LADDER if probes < lists * min(1, 1 / index.scan)) or _LADDER[:1]


def vectors(index: Index, rows: _Ints) -> _Floats:
    """The kept vectors of `rows`, float32 (r, dim), as a copy."""
    return index.rows[rows].astype(np.float32, copy=False)


def nbytes(index: Index) -> dict[str, int]:
    """Bytes by purpose: vectors, codes (with the row numbers beside them), centroids (of lists and of codes)."""
    sizes = {"vectors": index.rows.nbytes}
    if index.codes is not None:
        codes = index.codes
        # FAISS packs codes of 4 bits by blocks of rows.
        block = getattr(codes, "bbs", 1)
        lengths = (codes.get_list_size(number) for number in range(codes.nlist))
        padded = sum(-(-length // block) * block for length in lengths)
        sizes["codes"] = int(padded * codes.code_size + codes.ntotal * 8)
        sizes["centroids"] = int(codes.nlist * codes.d * 4 + codes.pq.centroids.size() * 4)
    return sizes


def save(index: Index, path: Path) -> None:
    """Write the index to `path`; raises `BackendError` if it cannot be written."""
    storage.write(index.owner, "ivf_pq", path)


def load(path: Path) -> Index:
    """Read an index written by `save`; one that RAPIDS has written is built again from its vectors.

    Raises
    ------
    BackendError
        The file is missing, damaged, or of another kind.
    """
    if archive.is_archive(path):
        parts = archive.read(path, "ivf_pq")
        log.info("%s was built on a device: building it again here, over its vectors", path)
        return build(parts["vectors"], str(parts["metric"]), archive.pq_params(parts))
    return Index(storage.read(path, "ivf_pq"))
