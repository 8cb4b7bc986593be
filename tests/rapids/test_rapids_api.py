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

from cuvs.distance import DISTANCE_TYPES  # noqa: E402
from cuvs.neighbors import cagra, filters  # noqa: E402

from headrace.gpu import backend as backends  # noqa: E402
from headrace.gpu.backend import Backend  # noqa: E402
from tests.gpu import test_backend_conformance as suite  # noqa: E402
from tests.rapids import stand_ins  # noqa: E402

PARTS = {"frames": backends.Frames, "kmeans": backends.KMeans, "flat": backends.Flat, "graph": backends.Graph}


def twin(backend: str, part: str) -> ModuleType:
    return importlib.import_module(f"headrace.gpu.{backend}.{part}")


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter, without self."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values() if p.name != "self"]


def public(owner: Any) -> set[str]:
    return {name for name, value in vars(owner).items() if not name.startswith("_") and inspect.isfunction(value)}


# The conformance suite, run on our RAPIDS modules over stand-ins that take just what the real functions take.
globals().update({name: getattr(suite, name) for name in public(suite) if name.startswith("test_")})


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    modules = {part: twin("rapids", part) for part in PARTS}
    for module in modules.values():
        monkeypatch.setattr(module, "cp", stand_ins.CUPY)
    monkeypatch.setattr(modules["frames"], "cudf", stand_ins.CUDF)
    monkeypatch.setattr(modules["kmeans"], "KMeans", stand_ins.KMeans)
    monkeypatch.setattr(modules["flat"], "brute_force", stand_ins.BruteForce)
    monkeypatch.setattr(modules["graph"], "cagra", stand_ins.Cagra)
    return Backend(name="rapids", xp=np, **modules)


@pytest.mark.parametrize("wheel", ["cudf-cu13", "cuml-cu13", "cuvs-cu13"])
def test_the_release_is_the_one_that_is_pinned(wheel: str) -> None:
    assert version(wheel).startswith("26.10.")


@pytest.mark.parametrize("part", PARTS)
def test_twins_have_the_same_names_and_calls(part: str) -> None:
    host, rapids, protocol = twin("host", part), twin("rapids", part), PARTS[part]
    assert sorted(host.__all__) == sorted(rapids.__all__) == sorted(public(protocol))
    for name in host.__all__:
        calls = [parameters(getattr(owner, name)) for owner in (host, rapids, protocol)]
        assert calls[0] == calls[1] == calls[2], name


@pytest.mark.parametrize("part", PARTS)
def test_twins_make_nothing_else_public(part: str) -> None:
    for module in (twin("host", part), twin("rapids", part)):
        own = {name for name in public(module) if getattr(module, name).__module__ == module.__name__}
        assert own == set(module.__all__)


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


def test_metrics_are_known() -> None:
    assert {"inner_product", "sqeuclidean"} <= set(DISTANCE_TYPES)


def test_a_set_bit_means_alive() -> None:
    assert "Bit value of 1: The sample is greenlit" in (filters.from_bitset.__doc__ or "")
    bits = np.zeros(4, dtype=np.uint32)
    assert filters.from_bitset(bits).parent is bits, "the filter must keep the bits alive"
    with pytest.raises(TypeError, match="uint8"):
        filters.from_bitset(bits.view(np.uint8))


def test_the_stand_ins_refuse_what_rapids_refuses() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.BruteForce.build(np.zeros((2, 4), dtype=np.float32), distance="l2")
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.Cagra.search(None, None, None, 1, prefilter=None)
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.KMeans(seed=3)
    with pytest.raises(TypeError, match="unexpected keyword"):
        stand_ins.CUPY.argsort([1], order="x")
    with pytest.raises(AttributeError):
        _ = stand_ins.CUPY.recarray
