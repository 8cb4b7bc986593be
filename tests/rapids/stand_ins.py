"""Stand-ins for the device: each call must bind to the real function's signature, and is then computed with NumPy.

So everything in `headrace.gpu.rapids` that is not a kernel runs where no device is, and a call that the installed
RAPIDS would not take raises TypeError or AttributeError.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cudf
import cuml.cluster
import cupy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import rmm.mr
from cudf.core.accessors.lists import ListMethods
from cuvs.common import Resources
from cuvs.common.device_tensor_view import DeviceTensorView
from cuvs.distance import DISTANCE_TYPES
from cuvs.neighbors import brute_force, cagra, filters, ivf_pq

from headrace.gpu.backend import Backend
from headrace.gpu.host import exact, kmeans
from headrace.gpu.index_spec import KINDS

NOTHING = 0xFFFFFFFF
"""What CAGRA puts where it has found no row."""
NO_ROW = np.iinfo(np.int64).max
"""What IVF-PQ puts there."""


def binds(real: Callable) -> Callable[[Callable], Callable]:
    """The decorated function takes what `real` takes."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            inspect.signature(real).bind(*given, **named)
            with np.errstate(over="ignore", invalid="ignore"):  # a device does not warn
                return function(*given, **named)

        return call

    return decorate


class Cupy(ModuleType):
    """NumPy under CuPy's names: what CuPy does not have, or does not take, is an error."""

    def __init__(self) -> None:
        super().__init__("cupy")

    def __getattr__(self, name: str) -> Any:
        real = getattr(cupy, name)
        if name in ("asarray", "asnumpy"):
            return binds(real)(np.array)  # between host and device there is always a copy
        ours = getattr(np, name)
        if isinstance(real, type | cupy.ufunc) or not callable(real):
            return ours
        return binds(real)(ours)


def _check_matrix(matrix: Any, *dtypes: Any) -> None:
    assert matrix.dtype in (dtypes or (np.float32,))
    assert matrix.flags.c_contiguous


class Handle:
    """`cuvs.common.Resources`: what is called with it is done only when it has been waited for."""

    def __init__(self) -> None:
        self.waiting = 0

    @binds(Resources.sync)
    def sync(self) -> None:
        self.waiting = 0

    def use(self) -> None:
        assert isinstance(self, Handle), "without a handle cuVS makes one for each call"
        self.waiting += 1


def _allowed(prefilter: Any, n: int) -> np.ndarray:
    if prefilter is None:
        return np.ones(n, dtype=bool)
    assert isinstance(prefilter, filters.Prefilter)
    words = prefilter.parent
    assert words.shape == (-(-n // 32),)
    rows = np.arange(n)
    return (words[rows // 32] >> (rows % 32) & 1).astype(bool)


def _nearest(data: Any, metric: str, queries: Any, k: int, prefilter: Any) -> np.ndarray:
    assert DISTANCE_TYPES[metric] in (DISTANCE_TYPES["sqeuclidean"], DISTANCE_TYPES["inner_product"])
    allowed = _allowed(prefilter, len(data))
    assert 1 <= k <= allowed.sum()
    queries = queries.astype(np.float32)
    return exact.search(data, allowed, queries, k, "l2" if metric == "sqeuclidean" else "ip")[1]


class BruteForce:
    """`cuvs.neighbors.brute_force`; the distances are left out, as nothing may rest on them."""

    @staticmethod
    @binds(brute_force.build)
    def build(dataset: Any, metric: str = "sqeuclidean", resources: Any = None) -> Any:
        Handle.use(resources)
        _check_matrix(dataset)
        return SimpleNamespace(data=dataset, metric=metric)

    @staticmethod
    @binds(brute_force.search)
    def search(index: Any, queries: Any, k: int, prefilter: Any = None, resources: Any = None) -> Any:
        Handle.use(resources)
        _check_matrix(queries)
        if DISTANCE_TYPES[index.metric] != DISTANCE_TYPES["sqeuclidean"]:
            return None, _nearest(index.data, index.metric, queries, k, prefilter)
        # As cuVS counts them: far from the origin they cancel.
        lengths = np.einsum("ij,ij->i", index.data, index.data)
        distances = np.einsum("qd,qd->q", queries, queries)[:, None] + lengths - 2 * (queries @ index.data.T)
        distances[:, ~_allowed(prefilter, len(index.data))] = np.inf
        return None, np.argsort(np.maximum(distances, 0), axis=1, kind="stable")[:, :k]


class Tensor:
    """`DeviceTensorView` over an array."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape = array, array.shape

    @binds(DeviceTensorView.copy_to_host)
    def copy_to_host(self) -> np.ndarray:
        return self._array


class CagraIndex:
    """`cuvs.neighbors.cagra.Index`."""

    def __init__(self, data: np.ndarray, metric: str, links: np.ndarray) -> None:
        _check_matrix(data, np.float32, np.float16)
        assert data.strides[0] % 16 == 0, "CAGRA would copy the rows"
        assert hasattr(cagra.Index, "graph")
        assert hasattr(cagra.Index, "graph_degree")
        self.data, self.metric = data, metric
        self.graph, self.graph_degree = Tensor(links), links.shape[1]


class Cagra:
    """`cuvs.neighbors.cagra`; like the real one it misses rows now and then. It notes the parameters of searches."""

    IndexParams = cagra.IndexParams
    asked: list[Any]

    def __init__(self) -> None:
        self.asked = []

    def SearchParams(self, **settings: Any) -> Any:
        self.asked.append(cagra.SearchParams(**settings))
        return self.asked[-1]

    @staticmethod
    @binds(cagra.build)
    def build(index_params: Any, dataset: Any, resources: Any = None) -> CagraIndex:
        Handle.use(resources)
        assert isinstance(index_params, cagra.IndexParams)
        assert index_params.graph_degree <= index_params.intermediate_graph_degree < len(dataset)
        # Not a good graph, but one in which every row can be reached: the next rows round a ring.
        ring = np.arange(len(dataset))[:, None] + np.arange(1, index_params.graph_degree + 1)
        return CagraIndex(dataset, index_params.metric, (ring % len(dataset)).astype(np.uint32))

    @staticmethod
    @binds(cagra.search)
    def search(
        search_params: Any, index: Any, queries: Any, k: int, filter: Any = None, resources: Any = None
    ) -> tuple[None, np.ndarray]:
        Handle.use(resources)
        assert isinstance(search_params, cagra.SearchParams)
        assert search_params.num_random_samplings >= 8
        assert k <= search_params.itopk_size <= 512
        assert search_params.itopk_size % 32 == 0
        _check_matrix(queries, index.data.dtype)
        assert queries.shape[1] == index.data.shape[1]
        rows = _nearest(index.data, index.metric, queries, k, filter)
        rows[::3, -1] = NOTHING
        return None, rows.astype(np.uint32)

    @staticmethod
    @binds(cagra.from_graph)
    def from_graph(graph: Any, dataset: Any, metric: str = "sqeuclidean", resources: Any = None) -> CagraIndex:
        Handle.use(resources)
        assert graph.dtype == np.uint32
        return CagraIndex(dataset, metric, graph)


class IvfPqIndex:
    """`cuvs.neighbors.ivf_pq.Index`, its tables empty."""

    def __init__(self, data: np.ndarray, metric: str, lists: int) -> None:
        self.data, self.metric, self.n_lists = data, metric, lists
        sizes = np.bincount(np.arange(len(data)) % lists, minlength=lists).astype(np.uint32)
        dim = data.shape[1]
        tables = {"centers_padded": (lists, dim + 8), "centers_rot": (lists, dim), "rotation_matrix": (dim, dim)}
        tables |= {"pq_centers": (dim // 4, 4, 256)}
        self.list_sizes = Tensor(sizes)
        for name, shape in tables.items():
            setattr(self, name, Tensor(np.zeros(shape, dtype=np.float32)))
        assert all(hasattr(ivf_pq.Index, name) for name in (*tables, "list_sizes", "n_lists"))


class IvfPq:
    """`cuvs.neighbors.ivf_pq`; it misses rows, and has no filter. It notes the parameters of searches."""

    IndexParams = ivf_pq.IndexParams
    asked: list[Any]

    def __init__(self) -> None:
        self.asked = []

    def SearchParams(self, **settings: Any) -> Any:
        self.asked.append(ivf_pq.SearchParams(**settings))
        return self.asked[-1]

    @staticmethod
    @binds(ivf_pq.build)
    def build(index_params: Any, dataset: Any, resources: Any = None) -> IvfPqIndex:
        Handle.use(resources)
        _check_matrix(dataset, np.float32, np.float16)
        assert isinstance(index_params, ivf_pq.IndexParams)
        assert 1 <= index_params.n_lists <= len(dataset)
        assert 0 < index_params.kmeans_trainset_fraction <= 1
        assert index_params.pq_dim * index_params.pq_bits % 8 == 0
        assert index_params.conservative_memory_allocation
        return IvfPqIndex(dataset, index_params.metric, index_params.n_lists)

    @staticmethod
    @binds(ivf_pq.search)
    def search(search_params: Any, index: Any, queries: Any, k: int, resources: Any = None) -> tuple[None, np.ndarray]:
        Handle.use(resources)
        _check_matrix(queries)
        assert isinstance(search_params, ivf_pq.SearchParams)
        assert 1 <= search_params.n_probes <= index.n_lists
        rows = _nearest(index.data, index.metric, queries, k, None)
        rows[::3, -1] = NO_ROW
        rows[1::3, -1] = -1
        return None, rows

    @staticmethod
    @binds(ivf_pq.save)
    def save(filename: str, index: Any, resources: Any = None) -> None:
        Handle.use(resources)
        with Path(filename).open("wb") as file:
            np.savez(file, data=index.data, metric=index.metric, lists=index.n_lists)

    @staticmethod
    @binds(ivf_pq.load)
    def load(filename: str, resources: Any = None) -> IvfPqIndex:
        Handle.use(resources)
        with np.load(filename) as parts:
            return IvfPqIndex(parts["data"], str(parts["metric"]), int(parts["lists"]))


class Pool(rmm.mr.LimitingResourceAdaptor):
    """`rmm.mr.PoolMemoryResource`, which needs a device: a resource with the same limit."""

    def __new__(cls, upstream_mr: Any, initial_pool_size: int, maximum_pool_size: int) -> Any:
        return super().__new__(cls, upstream_mr, maximum_pool_size)

    def __init__(self, upstream_mr: Any, initial_pool_size: int, maximum_pool_size: int) -> None:
        assert hasattr(rmm.mr.PoolMemoryResource, "pool_size")
        assert initial_pool_size % 256 == maximum_pool_size % 256 == 0, "RMM refuses these"
        if initial_pool_size > FREE:
            raise MemoryError
        self._size = initial_pool_size

    def pool_size(self) -> int:
        return self._size


class CudaMemory(rmm.mr.CallbackMemoryResource):
    """`rmm.mr.CudaMemoryResource`: gives addresses away that are none."""

    def __init__(self) -> None:
        super().__init__(lambda nbytes, stream: 4096, lambda address, nbytes, stream: None)
        assert issubclass(rmm.mr.CudaMemoryResource, rmm.mr.DeviceMemoryResource)


FREE, TOTAL = 10_000_000, 12_000_000


class Rmm:
    """`rmm`, as far as it is used; counting and limiting are the real ones."""

    def __init__(self) -> None:
        self.current: Any = CudaMemory()
        self.allocators: list[Any] = []
        self.mr = SimpleNamespace(
            CudaMemoryResource=CudaMemory,
            PoolMemoryResource=Pool,
            LimitingResourceAdaptor=rmm.mr.LimitingResourceAdaptor,
            StatisticsResourceAdaptor=rmm.mr.StatisticsResourceAdaptor,
            available_device_memory=lambda: (FREE, TOTAL),
            get_current_device_resource=lambda: self.current,
            set_current_device_resource=functools.partial(setattr, self, "current"),
        )
        for name in vars(self.mr):
            assert hasattr(rmm.mr, name)
        assert callable(cupy.cuda.set_allocator)
        self.cupy = SimpleNamespace(cuda=SimpleNamespace(set_allocator=self.allocators.append))


class KMeans:
    """`cuml.cluster.KMeans`, its parameters checked by the real one."""

    def __init__(self, **settings: Any) -> None:
        self.real = cuml.cluster.KMeans(**settings)
        assert self.real.output_type == "cupy"
        assert hasattr(cuml.cluster.KMeans, "cluster_centers_")

    def fit(self, *given: Any, **named: Any) -> KMeans:
        bound = inspect.signature(cuml.cluster.KMeans.fit).bind(self.real, *given, **named)
        sample, real = bound.arguments["X"], self.real
        init = None if isinstance(real.init, str) else real.init
        assert init is not None or real.init == "scalable-k-means++"
        self.cluster_centers_ = kmeans.train(
            sample, real.n_clusters, seed=real.random_state, iterations=real.max_iter, init=init
        )
        return self


class Series:
    """`cudf.Series` over an Arrow array, as far as it is used."""

    def __init__(self, array: pa.Array) -> None:
        self._array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array

    @property
    def dtype(self) -> Any:
        return cudf.ListDtype("float64") if pa.types.is_list(self._array.type) else np.dtype(object)

    @property
    def list(self) -> Any:
        assert hasattr(cudf.Series, "list")
        assert hasattr(ListMethods, "leaves")
        lengths = binds(ListMethods.len)(lambda _: Series(pc.list_value_length(self._array)))
        return SimpleNamespace(len=functools.partial(lengths, self), leaves=Series(pc.list_flatten(self._array)))

    @binds(cudf.Series.fillna)
    def fillna(self, value: Any) -> Series:
        return Series(pc.fill_null(self._array, value))

    @binds(cudf.Series.take)
    def take(self, indices: Any) -> Series:
        return Series(self._array.take(pa.array(indices)))

    @binds(cudf.Series.astype)
    def astype(self, dtype: str) -> Series:
        assert self._array.null_count == 0
        with np.errstate(over="ignore"):
            return Series(pa.array(self._array.to_numpy(zero_copy_only=False).astype(dtype)))

    @binds(cudf.Series.to_cupy)
    def to_cupy(self, na_value: Any = None) -> np.ndarray:
        return np.array(self._array.to_numpy(zero_copy_only=False))


class DataFrame:
    """`cudf.DataFrame` over an Arrow table, as far as it is used."""

    @binds(cudf.DataFrame.__init__)
    def __init__(self, data: Any = None, index: Any = None) -> None:
        self._table, self.index = pa.table({}) if data is None else data, index

    @staticmethod
    def from_arrow(*given: Any, **named: Any) -> DataFrame:
        table = inspect.signature(cudf.DataFrame.from_arrow).bind(*given, **named).arguments["table"]
        table.validate(full=True)
        return DataFrame(table)

    @binds(cudf.DataFrame.to_arrow)
    def to_arrow(self, preserve_index: bool | None = None) -> pa.Table:
        assert preserve_index is False
        return self._table

    @property
    def columns(self) -> list[str]:
        return self._table.column_names

    def __getitem__(self, key: Any) -> Any:
        return DataFrame(self._table.select(key)) if isinstance(key, list) else Series(self._table.column(key))


@binds(cudf.Index.__init__)
def _index(_self: Any, data: Any = None) -> Any:
    return SimpleNamespace(values=np.array(data, dtype=np.int64))


CUDF = SimpleNamespace(DataFrame=DataFrame, Index=functools.partial(_index, None), ListDtype=cudf.ListDtype)
CUPY = Cupy()


def install(patch: Any) -> SimpleNamespace:
    """Put the stand-ins where `headrace.gpu.rapids` expects RAPIDS; returns those that note what was asked of them."""
    from headrace.gpu.rapids import flat, frames, graph, growing, handles, kept, memory, scan
    from headrace.gpu.rapids import ivf_pq as codes
    from headrace.gpu.rapids import kmeans as trained

    for module in (codes, flat, frames, graph, growing, kept, scan, trained):
        patch.setattr(module, "cp", CUPY)
    own = SimpleNamespace(cagra=Cagra(), ivf_pq=IvfPq(), rmm=Rmm())
    patch.setattr(handles, "Resources", Handle)
    patch.setattr(handles._threads, "resources", Handle(), raising=False)
    patch.setattr(frames, "cudf", CUDF)
    patch.setattr(trained, "KMeans", KMeans)
    patch.setattr(scan, "brute_force", BruteForce)
    patch.setattr(graph, "cagra", own.cagra)
    patch.setattr(codes, "ivf_pq", own.ivf_pq)
    patch.setattr(memory, "cp", own.rmm.cupy)
    patch.setattr(memory, "rmm", own.rmm)
    patch.setattr(memory, "_started", None)
    return own


def backend() -> Backend:
    """The RAPIDS backend as `headrace.gpu.backend.resolve` would return it, over what `install` has put in place."""
    parts = ("frames", "kmeans", "exact", "growing", "memory", *KINDS)
    twins = {part: importlib.import_module(f"headrace.gpu.rapids.{part}") for part in parts}
    kinds = {kind: twins.pop(kind) for kind in KINDS}
    return Backend(name="rapids", xp=np, kinds=kinds, **twins)
