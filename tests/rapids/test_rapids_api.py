"""RAPIDS as it is installed, without a device: does it have what `headrace.gpu.rapids` calls, with our arguments?"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.rapids_api

pytest.importorskip("cuvs", reason="the RAPIDS wheels are not installed")

import cupy  # noqa: E402
import rmm.mr  # noqa: E402
from cuvs.common.exceptions import CuvsException  # noqa: E402
from cuvs.distance import DISTANCE_TYPES  # noqa: E402
from cuvs.neighbors import brute_force, cagra, filters, ivf_pq  # noqa: E402
from rmm.allocators.cupy import rmm_cupy_allocator  # noqa: E402

from headrace.gpu import backend as backends  # noqa: E402
from headrace.gpu.index_spec import KINDS  # noqa: E402
from tests.rapids import stand_ins  # noqa: E402

PARTS = {
    "frames": backends.Frames,
    "kmeans": backends.KMeans,
    "exact": backends.Exact,
    "growing": backends.GrowingKind,
    "memory": backends.Memory,
    **dict.fromkeys(KINDS, backends.IndexKind),
}


def twin(backend: str, part: str) -> ModuleType:
    return importlib.import_module(f"headrace.gpu.{backend}.{part}")


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter, without self."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values() if p.name != "self"]


def public(owner: Any) -> set[str]:
    return {name for name, value in vars(owner).items() if not name.startswith("_") and inspect.isfunction(value)}


@pytest.mark.parametrize("wheel", ["cudf-cu13", "cuml-cu13", "cuvs-cu13", "rmm-cu13"])
def test_the_release_is_the_one_that_is_pinned(wheel: str) -> None:
    assert version(wheel).startswith("26.10.")


@pytest.mark.parametrize("part", PARTS)
def test_twins_have_the_same_names_and_calls(part: str) -> None:
    host, rapids, protocol = twin("host", part), twin("rapids", part), PARTS[part]
    for name in public(protocol):
        calls = [parameters(getattr(owner, name)) for owner in (host, rapids, protocol)]
        assert calls[0] == calls[1] == calls[2], name


@pytest.mark.parametrize("part", PARTS)
def test_twins_make_no_other_function_public(part: str) -> None:
    for module in (twin("host", part), twin("rapids", part)):
        own = {name for name in public(module) if getattr(module, name).__module__ == module.__name__}
        assert own == public(PARTS[part])
        assert own <= set(module.__all__)


def test_without_a_device_the_backend_says_so() -> None:
    why = backends.available()["rapids"]
    if not why:
        pytest.skip("there is a device")
    assert "device" in why
    assert backends.resolve("auto").name == "host"


def test_cagra_takes_our_parameters() -> None:
    params = cagra.IndexParams(metric="inner_product", intermediate_graph_degree=100, graph_degree=32)
    assert (params.metric, params.intermediate_graph_degree, params.graph_degree) == ("inner_product", 100, 32)
    search = cagra.SearchParams(itopk_size=96, num_random_samplings=8)
    assert (search.itopk_size, search.num_random_samplings) == (96, 8)


def test_ivf_pq_takes_our_parameters() -> None:
    ours = {"n_lists": 100, "kmeans_trainset_fraction": 0.25, "pq_bits": 4, "pq_dim": 8}
    params = ivf_pq.IndexParams(metric="inner_product", conservative_memory_allocation=True, **ours)
    assert {name: getattr(params, name) for name in ours} == ours
    assert params.metric == "inner_product"
    assert params.conservative_memory_allocation
    assert ivf_pq.SearchParams(n_probes=7).n_probes == 7


def test_ivf_pq_has_no_filter_yet() -> None:
    # When it has one, `headrace.gpu.rapids.ivf_pq` can hand the bits over instead of asking for more rows.
    assert "filter" not in inspect.signature(ivf_pq.search).parameters
    assert "filter" in inspect.signature(cagra.search).parameters
    assert "prefilter" in inspect.signature(brute_force.search).parameters


@pytest.mark.parametrize("module", [brute_force, cagra, ivf_pq])
def test_float16_rows_are_taken(module: ModuleType) -> None:
    assert "float16" in module.build.__doc__ or "half" in module.build.__doc__


def test_metrics_are_known() -> None:
    assert {"inner_product", "sqeuclidean"} <= set(DISTANCE_TYPES)


def test_a_set_bit_means_allowed() -> None:
    assert "Bit value of 1: The sample is greenlit" in (filters.from_bitset.__doc__ or "")
    bits = np.zeros(4, dtype=np.uint32)
    assert filters.from_bitset(bits).parent is bits, "the filter must keep the bits alive"
    with pytest.raises(TypeError, match="uint8"):
        filters.from_bitset(bits.view(np.uint8))


def test_what_cuvs_raises_is_an_exception_of_its_own() -> None:
    assert CuvsException.__bases__ == (Exception,)


def test_rmm_takes_our_calls() -> None:
    pool = rmm.mr.PoolMemoryResource.__doc__ or ""
    assert "initial_pool_size" in pool
    assert "maximum_pool_size" in pool
    counted = rmm.mr.StatisticsResourceAdaptor(rmm.mr.LimitingResourceAdaptor(stand_ins.CudaMemory(), 4096))
    address = counted.allocate(1000)
    assert (counted.allocation_counts.current_bytes, counted.allocation_counts.peak_bytes) == (1000, 1000)
    with pytest.raises(MemoryError):
        counted.allocate(4000)
    counted.deallocate(address, 1000)
    assert (counted.allocation_counts.current_bytes, counted.allocation_counts.peak_bytes) == (0, 1000)
    assert callable(rmm.mr.set_current_device_resource)
    assert parameters(rmm_cupy_allocator)[0][0] == "nbytes"
    assert (cupy.cuda.set_allocator.__doc__ or "").startswith("set_allocator(allocator=")


def test_the_stand_ins_refuse_what_rapids_refuses() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.BruteForce.build(np.zeros((2, 4), dtype=np.float32), distance="l2")
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.Cagra.search(None, None, None, 1, prefilter=None)
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.IvfPq.search(None, None, None, 1, filter=None)
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.KMeans(seed=3)
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.CUPY.argsort([1], order="x")
    with pytest.raises(AttributeError):
        _ = stand_ins.CUPY.recarray
    with pytest.raises(AssertionError, match="handle"):
        stand_ins.BruteForce.build(np.zeros((2, 4), dtype=np.float32))
