"""Stand-ins for the device: each call must bind to the real function's signature, and is then computed with NumPy.

So everything in `headrace.gpu.rapids` that is not a kernel runs where no device is, and a call that the installed
RAPIDS would not take raises TypeError or AttributeError.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import cudf
import cuml.cluster
import cupy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from cudf.core.accessors.lists import ListMethods
from cuvs.common.device_tensor_view import DeviceTensorView
from cuvs.distance import DISTANCE_TYPES
from cuvs.neighbors import brute_force, cagra, filters

from headrace.gpu.host import flat, kmeans

NOTHING = 0xFFFFFFFF
"""What CAGRA puts where it has found no row."""


def binds(real: Callable) -> Callable[[Callable], Callable]:
    """The decorated function takes what `real` takes."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            inspect.signature(real).bind(*given, **named)
            return function(*given, **named)

        return call

    return decorate


class Cupy(ModuleType):
    """NumPy under CuPy's names: what CuPy does not have, or does not take, is an error."""

    def __init__(self) -> None:
        super().__init__("cupy")

    def __getattr__(self, name: str) -> Any:
        real = getattr(cupy, name)
        if name == "asnumpy":
            return binds(real)(np.array)
        ours = getattr(np, name)
        if isinstance(real, type | cupy.ufunc) or not callable(real):
            return ours
        return binds(real)(ours)


def _check_matrix(matrix: Any) -> None:
    assert matrix.dtype == np.float32
    assert matrix.flags.c_contiguous


def _alive(prefilter: Any, n: int) -> np.ndarray:
    if prefilter is None:
        return np.ones(n, dtype=bool)
    assert isinstance(prefilter, filters.Prefilter)
    words = prefilter.parent
    assert words.shape == (-(-n // 32),)
    return np.array([words[row // 32] >> (row % 32) & 1 for row in range(n)], dtype=bool)


def _nearest(data: Any, metric: str, queries: Any, k: int, prefilter: Any) -> np.ndarray:
    assert DISTANCE_TYPES[metric] in (DISTANCE_TYPES["sqeuclidean"], DISTANCE_TYPES["inner_product"])
    _check_matrix(queries)
    alive = _alive(prefilter, len(data))
    assert 1 <= k <= alive.sum()
    return flat.search(data, alive, queries, k, "l2" if metric == "sqeuclidean" else "ip")[1]


class BruteForce:
    """`cuvs.neighbors.brute_force`; the distances are left out, as nothing may rest on them."""

    @staticmethod
    @binds(brute_force.build)
    def build(dataset: Any, metric: str = "sqeuclidean") -> Any:
        _check_matrix(dataset)
        return SimpleNamespace(data=dataset, metric=metric)

    @staticmethod
    @binds(brute_force.search)
    def search(index: Any, queries: Any, k: int, prefilter: Any = None) -> tuple[None, np.ndarray]:
        return None, _nearest(index.data, index.metric, queries, k, prefilter)


class CagraIndex:
    """`cuvs.neighbors.cagra.Index`."""

    def __init__(self, data: np.ndarray, metric: str, links: np.ndarray) -> None:
        _check_matrix(data)
        assert data.strides[0] % 16 == 0, "CAGRA would copy the rows"
        assert hasattr(cagra.Index, "graph")
        assert hasattr(cagra.Index, "graph_degree")
        self.data, self.metric, self._links = data, metric, links
        self.graph_degree = links.shape[1]

    @property
    def graph(self) -> Any:
        return SimpleNamespace(copy_to_host=lambda: binds(DeviceTensorView.copy_to_host)(lambda _: self._links)(self))


class Cagra:
    """`cuvs.neighbors.cagra`; like the real one it misses rows now and then."""

    IndexParams, SearchParams = cagra.IndexParams, cagra.SearchParams

    @staticmethod
    @binds(cagra.build)
    def build(index_params: Any, dataset: Any) -> CagraIndex:
        assert isinstance(index_params, cagra.IndexParams)
        assert index_params.graph_degree <= index_params.intermediate_graph_degree < len(dataset)
        links = np.zeros((len(dataset), index_params.graph_degree), dtype=np.uint32)
        return CagraIndex(dataset, index_params.metric, links)

    @staticmethod
    @binds(cagra.search)
    def search(search_params: Any, index: Any, queries: Any, k: int, filter: Any = None) -> tuple[None, np.ndarray]:
        assert isinstance(search_params, cagra.SearchParams)
        assert search_params.num_random_samplings >= 8
        assert k <= search_params.itopk_size <= 512
        assert search_params.itopk_size % 32 == 0
        rows = _nearest(index.data, index.metric, queries, k, filter)
        rows[::3, -1] = NOTHING
        return None, rows.astype(np.uint32)

    @staticmethod
    @binds(cagra.from_graph)
    def from_graph(graph: Any, dataset: Any, metric: str = "sqeuclidean") -> CagraIndex:
        assert graph.dtype == np.uint32
        return CagraIndex(dataset, metric, graph)


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
