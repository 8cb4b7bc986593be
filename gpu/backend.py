"""One contract, two backends: what the rest of Headrace may ask of a device.

``rapids`` (cuDF, cuML, cuVS) and ``host`` (pandas, FAISS) are twin packages: the same modules with the same names and
the same calls. A backend is resolved once, at the start of a worker, and handed down as a parameter; nothing looks it
up again deep inside, and nothing falls back silently: what a backend cannot do raises `BackendError` naming it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from headrace.gpu.errors import BackendError
from headrace.gpu.growing_vectors import GrowingVectors
from headrace.gpu.index_spec import KINDS, BuildParams
from headrace.gpu.nearest import Nearest

__all__ = [
    "METRICS",
    "Array",
    "Backend",
    "Exact",
    "Extension",
    "Frames",
    "GrowingKind",
    "IndexKind",
    "KMeans",
    "Memory",
    "available",
    "resolve",
]

log = logging.getLogger("headrace.gpu")

Array = Any
"""A NumPy or CuPy array: the element of `Backend.xp`."""

METRICS = ("cosine", "ip", "l2")
"""cosine (vectors are normalised on the way in, score = dot product), inner product, squared Euclidean distance."""


class Frames(Protocol):
    """Records as columns: pandas on the host, cuDF on RAPIDS."""

    def decode_json(self, values: Sequence[bytes]) -> tuple[Any, dict[int, str]]:
        """Parse one JSON object per value, all in one call.

        Returns
        -------
        frame : pandas.DataFrame or cudf.DataFrame
            One row per value that is a JSON object, indexed by its position in `values`; one column per field that any
            of them has. Absent and null are the frame's null. A column keeps the JSON type of its values
            (object columns hold mixed types where the records disagree: the caller refuses record by record).
        bad : dict of int to str
            Position of each value that cannot be used, and why (not UTF-8, broken JSON, a duplicate key, nested too
            deeply, not an object). One bad value never touches its neighbours.
        """

    def to_lists(self, frame: Any) -> dict[str, list[Any]]:
        """Columns as lists of plain Python values (str, int, float, bool, list, dict, None), in the frame's order."""

    def vectors(self, frame: Any, column: str, dim: int) -> tuple[Array, Array]:
        """The list column as one matrix.

        Returns
        -------
        matrix : Array of float32, (r, dim)
        rows : Array of int64, (r,)
            Positions in the frame (0-based) whose list has exactly `dim` numbers; the others are left out, and the
            caller says why.
        """


class KMeans(Protocol):
    """Training of the codebook and assignment to its cells."""

    def train(
        self, sample: Array, cells: int, *, seed: int = 0, iterations: int = 20, init: Array | None = None
    ) -> Array:
        """Train with squared Euclidean distance.

        Parameters
        ----------
        sample : float32 (n, dim)
            n >= 1; with no more vectors than cells they become the centroids themselves, some of them repeated.
        cells : int
        seed : int
            The same arguments give the same centroids on the same backend and number of threads.
        iterations : int
        init : float32 (cells, dim), optional
            Start from these centroids: a cell keeps its number.

        Returns
        -------
        centroids : float32 (cells, dim)

        Raises
        ------
        BackendError
            The sample is empty, or `init` has another shape than the centroids asked for.
        """

    def assign(self, vectors: Array, centroids: Array) -> tuple[Array, Array]:
        """Nearest centroid of each vector; of equally near ones the first.

        A vector gets the same label whatever else is in the batch, and on either backend.

        Returns
        -------
        labels : int32 (n,)
        distances : float32 (n,)
            Squared.
        """

    def nearest(self, centroids: Array) -> Nearest:
        """The same for centroids that are asked often: see `headrace.gpu.nearest.Nearest`."""


class Exact(Protocol):
    """Exact search over plain arrays."""

    def search(self, vectors: Array, allowed: Array | None, queries: Array, k: int, metric: str) -> tuple[Array, Array]:
        """The `k` best allowed rows for each query.

        Parameters
        ----------
        vectors : float32 or float16, (n, dim)
        allowed : bool (n,), or None for all
        queries : float32 (q, dim)
        k : int
        metric : one of `METRICS`; for "cosine" both sides are normalised already

        Returns
        -------
        scores : float32 (q, k)
            Best first. Inner product (higher is better) for cosine and ip; squared distance (lower is better) for l2.
            Where there are fewer than `k` allowed rows: -inf (cosine, ip) or +inf (l2).
        rows : int64 (q, k)
            Row numbers, -1 where there is none.
        """


class GrowingKind(Protocol):
    """How vectors are kept that no index is built for yet."""

    def vectors(self, dim: int, dtype: str, metric: str, expected: int) -> GrowingVectors:
        """An empty buffer of vectors, searched exactly.

        Parameters
        ----------
        dim : int
        dtype : {"float32", "float16"}
        metric : one of `METRICS`
        expected : int
            Rows that will probably come.
        """


class Extension(Protocol):
    """An index that can take in more rows; it stays as it is."""

    def __call__(self, vectors: Array, *, threads: int = 1) -> Any:
        """A new index over the same rows, and `vectors` behind them: float32 or float16, (n, dim).

        As `IndexKind.build` otherwise: it may take minutes, and raises what that does.
        """


class IndexKind(Protocol):
    """One kind of index over rows that will never change; the kinds are those of `headrace.gpu.index_spec.KINDS`."""

    def build(self, vectors: Array, metric: str, params: BuildParams, *, threads: int = 1) -> Any:
        """Build an index over `vectors`; may take minutes, so call it off the event loop.

        Parameters
        ----------
        vectors : float32 or float16, (n, dim)
            n >= 1. Kept as `params.dtype` says; row r of the index is row r here.
        metric : one of `METRICS`
        params : BuildParams
            From `headrace.gpu.index_spec.build_params`.
        threads : int
            Host threads to build with, at most.

        Raises
        ------
        BackendError
            There are no vectors.
        """

    def extension(self, index: Any) -> Extension | None:
        """How to build this index with more rows for less than building it anew; None where there is no such way."""

    def search(self, index: Any, allowed: Array | None, queries: Array, k: int, *, effort: int) -> tuple[Array, Array]:
        """As `Exact.search`, approximately: the rows may not be the best ones, their scores are exact. Thread-safe.

        Among the `allowed` rows as exactly as among all (see `headrace.gpu.filtered`); where they are so few that
        scoring all of them is cheaper, that is done. A query gets fewer than `k` rows only if fewer are allowed. An
        `effort` of at least the number of rows is an exact search.

        Parameters
        ----------
        index : Any
            From `build` or `load`, which also fix the metric.
        allowed : bool (n,), or None for all
        queries : float32 (q, dim)
        k : int
        effort : int
            One of `efforts`, or any number near them: more finds more and takes longer.

        Returns
        -------
        scores : float32 (q, k)
        rows : int64 (q, k)
        """

    def efforts(self, index: Any, k: int) -> tuple[int, ...]:
        """Efforts worth trying for `k` rows, rising; (0,) where every search is exact."""

    def vectors(self, index: Any, rows: Array) -> Array:
        """The kept vectors of `rows`, float32 (r, dim), as a copy."""

    def nbytes(self, index: Any) -> dict[str, int]:
        """Bytes that the index holds, by purpose: vectors, links, codes, centroids."""

    def save(self, index: Any, path: Path) -> None:
        """Write the index to `path`; raises `BackendError` if it cannot be written, and leaves no half file there."""

    def load(self, path: Path) -> Any:
        """Read an index written by `save` of the same kind; raises `BackendError` if it is missing or damaged."""


class Memory(Protocol):
    """What the device's memory holds."""

    def start(self, limit: int | None) -> None:
        """Prepare the device's allocator, once per process, before anything is put there; `limit` in bytes."""

    def used(self) -> int | None:
        """Bytes in use now; None where that cannot be told."""

    def statistics(self) -> dict[str, int]:
        """Figures of the allocator, in bytes, by name."""


@dataclass(frozen=True)
class Backend:
    """The chosen twin, passed down from the worker to whatever needs a device.

    Attributes
    ----------
    name : {"host", "rapids"}
    xp : module
        numpy or cupy.
    frames, kmeans, exact, growing, memory
        The twin modules; each satisfies the Protocol of its name.
    kinds : mapping of str to IndexKind
        The twin modules of `headrace.gpu.index_spec.KINDS`, by name.
    """

    name: str
    xp: ModuleType
    frames: Frames
    kmeans: KMeans
    exact: Exact
    growing: GrowingKind
    memory: Memory
    kinds: Mapping[str, IndexKind]


_ARRAYS: Mapping[str, str] = {"host": "numpy", "rapids": "cupy"}


def available() -> dict[str, str]:
    """What each backend lacks here: an empty text means it can be used."""
    return {name: _missing(name) for name in _ARRAYS}


def resolve(name: str = "auto") -> Backend:
    """Load a backend by name; "auto" takes RAPIDS where it imports and a device answers, else the host.

    Raises
    ------
    BackendError
        The name is unknown, or the backend asked for by name cannot be used here; says why.
    """
    if name == "auto":
        why = _missing("rapids")
        name = "host" if why else "rapids"
        log.info("backend: %s%s", name, f" ({why})" if why else "")
    if name not in _ARRAYS:
        raise BackendError(f"unknown backend {name!r}: use 'auto', 'host' or 'rapids'")
    if why := _missing(name):
        raise BackendError(f"backend {name!r} cannot be used here: {why}")

    def twin(part: str) -> Any:
        return importlib.import_module(f"headrace.gpu.{name}.{part}")

    return Backend(
        name=name,
        xp=importlib.import_module(_ARRAYS[name]),
        frames=twin("frames"),
        kmeans=twin("kmeans"),
        exact=twin("exact"),
        growing=twin("growing"),
        memory=twin("memory"),
        kinds={kind: twin(kind) for kind in KINDS},
    )


def _missing(name: str) -> str:
    if name == "host":
        return ""
    for library in ("cupy", "cudf", "cuml", "cuvs"):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed (pip install 'headrace[rapids]')"
    cupy = importlib.import_module("cupy")
    try:
        devices = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device answers ({error})"
    return "" if devices else "no CUDA device"
