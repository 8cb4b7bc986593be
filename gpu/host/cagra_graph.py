"""A graph that CAGRA built on a device, served by FAISS without one.

CAGRA's graph has one level: each row's links, no way in. FAISS's own conversion (``GpuIndexCagra::copyTo``) either
builds HNSW's upper levels over it, or starts from the best of some random rows. Both lose what is not connected:
where rows lie in clusters, as routing by centroids makes them, a row's nearest neighbours are all in its own cluster,
and a search that enters the wrong one never leaves it.

So the rows that stand on HNSW's upper levels (one in `degree` / 2) give the weaker half of their CAGRA links for
their links on the first upper level, which were chosen for being far apart, and bridge the clusters. Measured over
20,000 rows of 48 numbers in 200 clusters, degree 32, efSearch 64, squared distance: recall at 10 is 0.60 with upper
levels alone, 0.73 from the best of 256 random rows, 0.96 with bridges; the whole takes a tenth of building HNSW.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu import archive
from headrace.gpu.errors import BackendError
from headrace.gpu.host import graph, storage
from headrace.gpu.host.storage import faiss
from headrace.gpu.index_spec import IndexSpec, build_params

__all__ = ["load", "over"]

_Kept = npt.NDArray[np.float32] | npt.NDArray[np.float16]
_Links = npt.NDArray[np.uint32]

_FEWEST_UPPER_LINKS = 8
_UPPER_EFFORT = 200


def load(path: Path) -> graph.Index:
    """Read what `headrace.gpu.rapids.graph.save` has written; where it holds no graph (few rows), one is built.

    Raises
    ------
    BackendError
        The file is missing, damaged, or holds no such graph.
    """
    parts = archive.read(path, "graph")
    metric, vectors, links = str(parts["metric"]), parts["vectors"], parts["links"]
    if links.size == 0:
        params = build_params(IndexSpec("graph", str(vectors.dtype)), *vectors.shape)
        return graph.build(vectors, metric, params)
    if links.dtype != np.uint32 or links.ndim != 2 or len(links) != len(vectors) or links.max() >= len(vectors):
        raise BackendError(f"{path} links rows that it does not hold: restore it or build it again")
    return over(vectors, links, metric)


def over(vectors: _Kept, links: _Links, metric: str) -> graph.Index:
    """An index of FAISS whose lowest level is the given graph.

    Parameters
    ----------
    vectors : float32 or float16, (n, dim)
    links : uint32 (n, degree)
        The strongest first; each below n.
    metric : one of `headrace.gpu.backend.METRICS`
    """
    (n, dim), degree, kind = vectors.shape, links.shape[1], storage.faiss_metric(metric)
    upper = max(degree // 2, _FEWEST_UPPER_LINKS)
    if vectors.dtype == np.float16:
        hnsw = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, upper, kind)
    else:
        hnsw = faiss.IndexHNSWFlat(dim, upper, kind)
    hnsw.hnsw.set_nb_neighbors(0, degree)
    hnsw.hnsw.efConstruction = _UPPER_EFFORT
    hnsw.init_level0 = False
    hnsw.add(vectors.astype(np.float32, copy=False))
    index = graph.Index(hnsw)
    index.rows[:] = vectors  # FAISS rounds the tiniest float16 numbers to zero
    table = faiss.rev_swig_ptr(hnsw.hnsw.neighbors.data(), hnsw.hnsw.neighbors.size())
    starts = faiss.vector_to_array(hnsw.hnsw.offsets)[:n].astype(np.int64)
    # FAISS counts levels from one: 2 is a row that is on the lowest level and the one above.
    bridges = np.flatnonzero(faiss.vector_to_array(hnsw.hnsw.levels)[:n] > 1)
    lowest = links.astype(np.int32)
    lowest[bridges] = _merged(lowest[bridges], table[starts[bridges, None] + degree + np.arange(upper)])
    for column in range(degree):  # column by column: the places of all of them take more memory than the graph
        table[starts + column] = lowest[:, column]
    return index


def _merged(near: npt.NDArray[np.int32], far: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Each line's first half of `near`, then `far`, then the rest of `near`, none twice, cut to the width of `near`."""
    half, width = near.shape[1] // 2, near.shape[1]
    lines = np.concatenate([near[:, :half], far, near[:, half:]], axis=1)
    order = np.argsort(lines, axis=1, kind="stable")
    ranked = np.take_along_axis(lines, order, axis=1)
    again = np.zeros(lines.shape, dtype=np.bool_)
    np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    lines[again] = -1
    # A search stops at the first place without a link, so these must be last.
    places = np.argsort(lines < 0, axis=1, kind="stable")[:, :width]
    merged: Any = np.take_along_axis(lines, places, axis=1)
    return np.asarray(merged, dtype=np.int32)
