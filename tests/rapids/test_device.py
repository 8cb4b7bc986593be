"""On a device only: how well what it builds is found, there and on the host. The rest is tested without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.gpu.backend import Backend, resolve
from headrace.gpu.index_spec import DTYPES, IndexSpec, build_params
from tests.gpu.searches import METRICS, on_host
from tests.gpu.test_cagra_graph import clustered

pytestmark = pytest.mark.gpu

N, DIM = 100_000, 96


@pytest.fixture(scope="module")
def device() -> Backend:
    return resolve("rapids")


@pytest.fixture(scope="module")
def host() -> Backend:
    return resolve("host")


def nearest(device: Backend, vectors: np.ndarray, queries: np.ndarray, metric: str) -> np.ndarray:
    xp = device.xp
    return on_host(device.exact.search(xp.asarray(vectors), None, xp.asarray(queries), 10, metric)[1])


def recall(backend: Backend, kind: str, index: Any, truth: np.ndarray, queries: np.ndarray, effort: int) -> float:
    _, rows = backend.kinds[kind].search(index, None, backend.xp.asarray(queries), 10, effort=effort)
    return float(np.mean([len({*a} & {*b}) / 10 for a, b in zip(on_host(rows).tolist(), truth.tolist(), strict=True)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_graph_is_found_on_the_device_and_on_the_host(
    device: Backend, host: Backend, tmp_path: Path, metric: str, dtype: str
) -> None:
    vectors, queries = clustered(N, DIM, metric), clustered(500, DIM, metric, seed=1)
    truth = nearest(device, vectors.astype(dtype), queries, metric)
    kind = device.kinds["graph"]
    index = kind.build(device.xp.asarray(vectors), metric, build_params(IndexSpec("graph", dtype), N, DIM))
    assert recall(device, "graph", index, truth, queries, kind.efforts(index, 10)[-1]) >= 0.99
    kind.save(index, tmp_path / "graph")
    for other in (device, host):
        again = other.kinds["graph"].load(tmp_path / "graph")
        assert recall(other, "graph", again, truth, queries, 256) >= 0.95, other.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_codes_are_found_again(device: Backend, tmp_path: Path, metric: str, dtype: str) -> None:
    vectors, queries = clustered(N, DIM, metric), clustered(500, DIM, metric, seed=1)
    truth = nearest(device, vectors.astype(dtype), queries, metric)
    kind = device.kinds["ivf_pq"]
    index = kind.build(device.xp.asarray(vectors), metric, build_params(IndexSpec("ivf_pq", dtype), N, DIM))
    best = recall(device, "ivf_pq", index, truth, queries, kind.efforts(index, 10)[-1])
    assert best >= 0.95
    kind.save(index, tmp_path / "codes")
    again = kind.load(tmp_path / "codes")
    assert recall(device, "ivf_pq", again, truth, queries, kind.efforts(again, 10)[-1]) == best


def test_what_an_index_says_it_holds_is_what_the_pool_has_given(device: Backend) -> None:
    device.memory.start(None)
    vectors = device.xp.asarray(clustered(N, DIM, "l2"))
    for kind, module in device.kinds.items():
        before = device.memory.used()
        index = module.build(vectors.copy(), "l2", build_params(IndexSpec(kind), N, DIM))
        held = device.memory.used() - before
        said = sum(module.nbytes(index).values())
        assert 0.8 * held <= said <= 1.2 * held, (kind, said, held)
        del index
