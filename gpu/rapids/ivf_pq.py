"""The compressed index kind: cuVS IVF-PQ, re-ranked from the kept vectors. See `headrace.gpu.backend.IndexKind`.

cuVS 26.10 takes no filter in an IVF-PQ search. So more candidates are taken from more lists as allowed rows become
rare, and the others are dropped when the candidates are scored, as `headrace.gpu.filtered` says.
`cuvs.neighbors.refine` is not used for that scoring: it reads rows that were not found as if they had been, takes
queries in the rows' dtype only, and no more than 256 rows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy as cp
import cuvs
import numpy as np
from cuvs.neighbors import ivf_pq

from headrace.gpu import archive, filtered, ranking
from headrace.gpu.host import ivf_pq as host
from headrace.gpu.index_spec import BuildParams
from headrace.gpu.rapids import kept, scan
from headrace.gpu.rapids.handles import handle

__all__ = ["Index", "build", "efforts", "extension", "load", "nbytes", "save", "search", "vectors"]

Array = Any

_TRAINING_ROWS = 256
_CANDIDATES_PER_HIT = 4
_CANDIDATES_PER_LIST = 2
_MOST_CANDIDATES = 2048
_RARE = 16
_GROUP_ROWS, _GROUP_BYTES, _ROW_NUMBER = 32, 16, 8


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """Codes in lists, and the vectors that they stand for.

    Attributes
    ----------
    metric : one of `headrace.gpu.backend.METRICS`
    rows : float32 or float16, (n, dim)
    params : BuildParams
    codes : cuvs.neighbors.ivf_pq.Index or None
        None where there are too few rows to train a quantiser: all are scored.
    """

    metric: str
    rows: Array
    params: BuildParams
    codes: Any


def build(vectors: Array, metric: str, params: BuildParams, *, threads: int = 1) -> Index:
    """Train `lists` cells and their codes on a part of the vectors, and keep all. `threads` has no meaning here.

    Raises
    ------
    BackendError
        There are no vectors, or a number is too large for float16.
    """
    rows = kept.stored(vectors, params.dtype)
    if params.lists == 0:
        return Index(metric, rows, params, None)
    if not ranking.squares(cp, rows):  # cuVS would train on distances that are infinite
        kept.log.warning("%d vectors hold numbers too large to be put into lists: all of them are scored", len(rows))
        return Index(metric, rows, dataclasses.replace(params, lists=0), None)
    asked = ivf_pq.IndexParams(
        n_lists=params.lists,
        metric=scan.metric_name(metric),
        kmeans_trainset_fraction=min(1.0, _TRAINING_ROWS * params.lists / len(rows)),
        pq_bits=params.pq_bits,
        pq_dim=params.pq_dim,
        conservative_memory_allocation=True,  # nothing is ever added
    )
    with handle() as resources:
        codes = ivf_pq.build(asked, rows, resources=resources)
    return Index(metric, rows, params, codes)


def search(index: Index, allowed: Array | None, queries: Array, k: int, *, effort: int) -> tuple[Array, Array]:
    """The `k` best allowed rows, approximately; `effort` is how many lists are looked through.

    With a filter the search is for the nearest rows of all, as `headrace.gpu.filtered` says.
    """
    n, lists = len(index.rows), max(1, index.params.lists)
    count = n if allowed is None else int(cp.count_nonzero(allowed))
    found = min(k, count)
    if found == 0 or len(queries) == 0:
        return ranking.nothing_found(cp, len(queries), k, index.metric)
    queries = cp.ascontiguousarray(queries, dtype=cp.float32)
    exact = effort >= n
    effort = min(max(1, effort), lists)
    candidates = math.ceil((_refine(index) * k + _CANDIDATES_PER_LIST * effort) * n / count)
    # Reading one row in sixteen is cheaper than looking through sixteen times the lists.
    if exact or index.codes is None or candidates > min(count, _MOST_CANDIDATES) or count * _RARE < n:
        return scan.search(index.rows, None, allowed, queries, k, index.metric)
    width = min(candidates, max(k, filtered.depth(k, count, n)))

    def walk(some: Array, factor: int) -> tuple[Array, Array]:
        params = ivf_pq.SearchParams(n_probes=min(lists, math.ceil(factor * effort * n / count)))
        with handle() as resources:
            _, near = ivf_pq.search(params, index.codes, some, factor * candidates, resources=resources)
        scores, rows = ranking.rank(cp, index.rows, None, some, cp.asarray(near), factor * width, index.metric)
        return (scores, rows) if count == n else filtered.keep(cp, scores, rows, allowed, k, index.metric)

    def score(some: Array) -> tuple[Array, Array]:
        return scan.search(index.rows, None, allowed, some, k, index.metric)

    most = 1 if count == n else min(n, _MOST_CANDIDATES + 1) / candidates
    return filtered.search(cp, queries, walk, score, found, most)


def _refine(index: Index) -> int:
    """Candidates per row asked for: more where codes are coarser than two bits for each number."""
    dim: int = index.rows.shape[1]
    return _CANDIDATES_PER_HIT * max(1, math.ceil(2 * dim / (index.params.pq_dim * index.params.pq_bits)))


def extension(index: Index) -> None:
    """None: lists and codes are trained on the rows that they are to hold."""


def efforts(index: Index, k: int) -> tuple[int, ...]:
    """Numbers of lists, doubling up to all of them; (0,) where every search is exact."""
    if index.codes is None:
        return (0,)
    lists = index.params.lists
    return (*(1 << power for power in range((lists - 1).bit_length())), lists)


def vectors(index: Index, rows: Array) -> Array:
    """The kept vectors of `rows`, float32 (r, dim), as a copy."""
    return index.rows[rows].astype(cp.float32, copy=False)


def nbytes(index: Index) -> dict[str, int]:
    """Bytes on the device by purpose: vectors, codes (with their row numbers, in groups of 32), centroids."""
    if index.codes is None:
        return {"vectors": int(index.rows.nbytes), "codes": 0, "centroids": 0}
    parts_per_chunk = _GROUP_BYTES * 8 // index.params.pq_bits
    chunks = -(-index.params.pq_dim // parts_per_chunk)
    sizes = index.codes.list_sizes.copy_to_host().astype(np.int64)
    places = int((-(-sizes // _GROUP_ROWS) * _GROUP_ROWS).sum())
    tables = ("centers_padded", "centers_rot", "pq_centers", "rotation_matrix")
    return {
        "vectors": int(index.rows.nbytes),
        "codes": places * (chunks * _GROUP_BYTES + _ROW_NUMBER),
        "centroids": sum(4 * math.prod(getattr(index.codes, table).shape) for table in tables),
    }


def save(index: Index, path: Path) -> None:
    """Write metric, vectors, parameters, and cuVS's own file, which the same release of cuVS takes back.

    Raises
    ------
    BackendError
        The file cannot be written.
    """
    params = index.params
    arrays = {"pq": np.array([params.lists, params.pq_dim, params.pq_bits], dtype=np.int64)}
    if index.codes is not None:
        with kept.scratch(path) as file:
            with handle() as resources:
                ivf_pq.save(str(file), index.codes, resources=resources)
            arrays |= {"codes": np.fromfile(file, dtype=np.uint8), "release": np.array(cuvs.__version__)}
    archive.write(path, "ivf_pq", index.metric, cp.asnumpy(index.rows), **arrays)


def load(path: Path) -> Index:
    """Read an index written by `save`; by another release of cuVS, or by the host: built again from its vectors.

    Raises
    ------
    BackendError
        The file is missing, damaged, or of another kind.
    """
    if not archive.is_archive(path):
        rebuilt: Index = kept.rebuilt(host, path, "ivf_pq", build)
        return rebuilt
    parts = archive.read(path, "ivf_pq")
    params = archive.pq_params(parts)
    rows, metric = cp.asarray(parts["vectors"]), str(parts["metric"])
    if params.lists == 0:
        return Index(metric, rows, params, None)
    if str(parts.get("release")) != cuvs.__version__:
        kept.log.info("%s was written by cuVS %s: building it again", path, parts.get("release"))
        return build(rows, metric, params)
    with kept.scratch(path) as file:
        parts["codes"].tofile(file)
        with handle() as resources:
            codes = ivf_pq.load(str(file), resources=resources)
    return Index(metric, rows, params, codes)
