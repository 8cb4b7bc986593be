"""What our RAPIDS modules do by themselves, over stand-ins for the device: widths, bits, efforts, files, fallbacks."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.rapids_api

pytest.importorskip("cuvs", reason="the RAPIDS wheels are not installed")

from headrace.gpu import archive, filtered, ranking  # noqa: E402
from headrace.gpu.errors import BackendError  # noqa: E402
from headrace.gpu.host import exact as truth  # noqa: E402
from headrace.gpu.index_spec import DTYPES, KINDS, IndexSpec, build_params  # noqa: E402
from headrace.gpu.rapids import graph, ivf_pq, kept, memory, scan  # noqa: E402
from tests.rapids import stand_ins  # noqa: E402
from tests.rapids.test_rapids_api import twin  # noqa: E402

METRICS = ["cosine", "ip", "l2"]
N = 3000


def rows(n: int, dim: int, metric: str = "ip", seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True) if metric == "cosine" else drawn


def built(kind: str, vectors: np.ndarray, metric: str, dtype: str = "float32", **wanted: Any) -> tuple[ModuleType, Any]:
    module = twin("rapids", kind)
    spec = IndexSpec(kind, dtype, **wanted)
    return module, module.build(vectors, metric, build_params(spec, *vectors.shape))


def check(
    answer: Any, vectors: np.ndarray, allowed: Any, queries: np.ndarray, k: int, metric: str, recall: float = 0.9
) -> None:
    """The scores are those of the rows, the rows are allowed, and only those that the stand-in lost are missing."""
    scores, found = answer
    assert (scores.dtype, found.dtype, scores.shape) == (np.float32, np.int64, (len(queries), k))
    best, _ = truth.search(vectors, allowed, queries, k, metric)
    full = min(k, len(vectors) if allowed is None else int(allowed.sum()))
    assert (found[:, full:] == -1).all()
    assert (found[:, :full] >= 0).all()
    assert allowed is None or allowed[found[:, :full]].all()
    own = vectors[found[:, :full]].astype(np.float64)
    wide = queries[:, None].astype(np.float64)
    exact = ((own - wide) ** 2).sum(axis=2) if metric == "l2" else (own * wide).sum(axis=2)
    np.testing.assert_allclose(scores[:, :full], exact, rtol=2e-5, atol=2e-5)
    hits = np.isclose(np.sort(scores[:, :full]), np.sort(best[:, :full]), rtol=1e-3, atol=1e-3)
    assert full == 0 or hits.mean() > recall


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_under_every_share(rapids: SimpleNamespace, kind: str, metric: str, dtype: str) -> None:
    vectors, queries = rows(N, 20, metric), rows(7, 20, metric, seed=1)
    module, index = built(kind, vectors, metric, dtype)
    kept_as = vectors.astype(dtype).astype(np.float32)
    drawn = np.random.default_rng(2).random(N)
    for effort in (module.efforts(index, 10)[0], module.efforts(index, 10)[-1]):
        check(module.search(index, None, queries, 10, effort=effort), kept_as, None, queries, 10, metric)
        for share in (1.0, 0.6, 0.2, 0.1, 0.002, 0.0):
            allowed = drawn < share
            check(module.search(index, allowed, queries, 10, effort=effort), kept_as, allowed, queries, 10, metric)
    np.testing.assert_array_equal(module.vectors(index, np.array([5, 2999])), kept_as[[5, 2999]])
    assert module.vectors(index, np.array([5])).dtype == np.float32
    assert module.search(index, None, queries[:0], 3, effort=64)[0].shape == (0, 3)
    assert module.search(index, None, queries, 0, effort=64)[1].shape == (7, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 40])
def test_few_rows_are_all_scored(rapids: SimpleNamespace, kind: str, n: int) -> None:
    vectors = rows(n, 6)
    module, index = built(kind, vectors, "l2")
    assert len(module.efforts(index, 10)) == 1
    check(module.search(index, None, vectors, 50, effort=0), vectors, None, vectors, 50, "l2")
    assert not rapids.cagra.asked
    assert not rapids.ivf_pq.asked


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_kept_is_refused(rapids: SimpleNamespace, kind: str) -> None:
    with pytest.raises(BackendError, match="0 vectors"):
        built(kind, rows(0, 4), "ip")
    large = rows(5, 4)
    large[3, 1] = -70_000
    with pytest.raises(BackendError, match="70000"):
        built(kind, large, "ip", "float16")
    built(kind, large, "ip")


# --- exact


@pytest.mark.parametrize("metric", METRICS)
def test_float16_rows_are_scored_in_blocks(
    rapids: SimpleNamespace, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_BLOCK_BYTES", 4 * 8 * 100)
    vectors, queries = rows(1050, 8, metric).astype(np.float16), rows(5, 8, metric, seed=1)
    for share in (1.0, 0.5, 0.01):
        allowed = np.random.default_rng(4).random(len(vectors)) < share
        got = twin("rapids", "exact").search(vectors, allowed, queries, 12, metric)
        wanted = truth.search(vectors.astype(np.float32), allowed, queries, 12, metric)
        np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got[1], wanted[1])


def test_only_where_rounding_may_decide_is_every_row_measured(
    rapids: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = ranking.measure

    def noted(xp: Any, vectors: Any, allowed: Any, queries: Any, k: int) -> Any:
        measured.append(len(queries))
        return measure(xp, vectors, allowed, queries, k)

    monkeypatch.setattr(ranking, "measure", noted)
    for mean, wanted in ((0, []), (1000, [7])):
        vectors = rows(N, 32) + np.float32(mean)
        _, found = twin("rapids", "exact").search(vectors, None, vectors[:7], 10, "l2")
        wide = vectors.astype(np.float64)
        best = [np.argsort(((wide - query) ** 2).sum(axis=1))[:10].tolist() for query in wide[:7]]
        assert found.tolist() == best
        assert measured == wanted


def test_rare_rows_are_gathered(rapids: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    build = stand_ins.BruteForce.build

    def noted(dataset: Any, **named: Any) -> Any:
        sizes.append(len(dataset))
        return build(dataset, **named)

    monkeypatch.setattr(stand_ins.BruteForce, "build", noted)
    vectors = rows(800, 4)
    for count in (800, 100, 99):
        twin("rapids", "exact").search(vectors, np.arange(800) < count, vectors[:1], 5, "ip")
    assert sizes == [800, 800, 99]


def test_a_flat_index_is_prepared_once(rapids: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = rows(50, 4)
    module, index = built("flat", vectors, "l2")
    assert module.nbytes(index) == {"vectors": 50 * 4 * 4 + 50 * 4}
    monkeypatch.setattr(scan, "prepare", None)
    check(module.search(index, None, vectors, 3, effort=0), vectors, None, vectors, 3, "l2")


# --- graph


@pytest.mark.parametrize(("dtype", "dim", "width"), [("float32", 6, 8), ("float16", 6, 8), ("float16", 12, 16)])
def test_rows_are_widened_so_that_cagra_need_not_copy_them(
    rapids: SimpleNamespace, dtype: str, dim: int, width: int
) -> None:
    _, index = built("graph", rows(N, dim), "l2", dtype)
    assert index.cagra.data is index.rows
    assert index.rows.shape == (N, width)
    assert not index.rows[:, dim:].any()


def test_the_list_of_candidates_follows_effort_and_share(rapids: SimpleNamespace) -> None:
    vectors = rows(4096, 8)
    module, index = built("graph", vectors, "ip")
    for effort, k, every, wanted in [
        (64, 10, 1, 64),
        (65, 10, 1, 96),
        (10, 200, 1, 224),
        (64, 10, 2, 128),
        (512, 10, 1, 512),
        (64, 10, 8, 512),
    ]:
        allowed = np.arange(4096) % every == 0
        module.search(index, allowed, vectors[:2], k, effort=effort)
        assert rapids.cagra.asked.pop().itopk_size == wanted
    for effort, k, every in [(513, 10, 1), (64, 10, 9), (32, 513, 1)]:
        module.search(index, np.arange(4096) % every == 0, vectors[:2], k, effort=effort)
        assert not rapids.cagra.asked, "beyond the longest list all allowed rows are scored"
    assert module.efforts(index, 100) == (128, 192, 256, 384, 512)


def test_what_is_not_allowed_is_dropped_from_longer_lists(
    rapids: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    search = stand_ins.Cagra.search

    def noted(params: Any, index: Any, queries: Any, k: int, **named: Any) -> Any:
        asked.append((len(queries), k, params.itopk_size, named.get("filter")))
        return search(params, index, queries, k, **named)

    monkeypatch.setattr(rapids.cagra, "search", noted)
    vectors = rows(N, 8)
    module, index = built("graph", vectors, "ip")
    module.search(index, None, vectors[:2], 10, effort=64)
    module.search(index, np.ones(N, dtype=bool), vectors[:2], 10, effort=64)
    module.search(index, np.arange(N) % 2 > 0, vectors[:2], 10, effort=64)
    assert asked == [(2, 10, 64, None)] * 2 + [(2, filtered.depth(10, N // 2, N), 128, None)]
    # Only for the query among whose nearest rows too few are allowed is the list made longer.
    asked.clear()
    far = truth.search(vectors, None, vectors[:1], N, "ip")[1][0, 60:]
    allowed = np.isin(np.arange(N), far)
    queries = np.concatenate([vectors[:1], -vectors[:1]])
    check(module.search(index, allowed, queries, 10, effort=64), vectors, allowed, queries, 10, "ip")
    assert [(count, length) for count, _, length, _ in asked] == [(2, 96), (1, 384)]


def test_a_list_that_cannot_be_made_longer_ends_in_scoring(rapids: SimpleNamespace) -> None:
    vectors = rows(N, 8)
    module, index = built("graph", vectors, "ip")
    far = truth.search(vectors, None, vectors[:1], N, "ip")[1][0, 1000:]
    allowed = np.isin(np.arange(N), far)
    check(module.search(index, allowed, vectors[:1], 10, effort=64), vectors, allowed, vectors[:1], 10, "ip", 0.99)
    assert [params.itopk_size for params in rapids.cagra.asked] == [96, 384]


def test_a_graph_is_never_asked_for_more_links_than_there_are_rows(
    rapids: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_FEW_ROWS", 10)
    _, index = built("graph", rows(20, 4), "ip", graph_degree=64, graph_effort=200)
    assert index.cagra.graph_degree == 19


# --- ivf_pq


def test_more_lists_and_candidates_where_allowed_rows_are_rare(rapids: SimpleNamespace) -> None:
    vectors = rows(8000, 16)
    module, index = built("ivf_pq", vectors, "l2", lists=40)
    assert module.efforts(index, 10) == (1, 2, 4, 8, 16, 32, 40)
    for every, wanted in ((1, 3), (4, 12), (8, 24)):
        module.search(index, np.arange(8000) % every == 0, vectors[:4], 10, effort=3)
        assert rapids.ivf_pq.asked.pop().n_probes == wanted
    module.search(index, np.arange(8000) % 17 == 0, vectors[:4], 10, effort=3)
    module.search(index, None, vectors[:4], 600, effort=3)
    assert not rapids.ivf_pq.asked
    module.search(index, None, vectors[:4], 10, effort=1000)
    assert rapids.ivf_pq.asked.pop().n_probes == 40
    assert module.nbytes(index)["vectors"] == vectors.nbytes
    assert module.nbytes(index)["codes"] == 40 * 224 * (16 + 8)


def test_candidates_that_are_all_forbidden_are_made_good(rapids: SimpleNamespace) -> None:
    vectors = rows(8000, 16)
    module, index = built("ivf_pq", vectors, "l2", lists=40)
    far = truth.search(vectors, None, vectors[:1], 8000, "l2")[1][0, 7000:]
    allowed = np.isin(np.arange(8000), far)
    check(module.search(index, allowed, vectors[:1], 10, effort=3), vectors, allowed, vectors[:1], 10, "l2", 0.99)
    assert rapids.ivf_pq.asked


# --- files


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [30, N])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_here_loaded_here_and_on_the_host(
    rapids: SimpleNamespace, tmp_path: Path, kind: str, n: int, metric: str, dtype: str
) -> None:
    vectors, queries = rows(n, 12, metric), rows(5, 12, metric, seed=1)
    module, index = built(kind, vectors, metric, dtype)
    module.save(index, tmp_path / "index")
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    again = module.load(tmp_path / "index")
    assert module.nbytes(again) == module.nbytes(index)
    assert module.efforts(again, 10) == module.efforts(index, 10)
    effort = module.efforts(index, 10)[-1]
    for one, other in zip(
        module.search(index, None, queries, 4, effort=effort),
        module.search(again, None, queries, 4, effort=effort),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    host = twin("host", kind)
    there = host.load(tmp_path / "index")
    every = np.arange(n)
    np.testing.assert_array_equal(host.vectors(there, every), module.vectors(index, every))
    kept_as = vectors.astype(dtype).astype(np.float32)
    if kind != "graph":  # the stand-in's graph is a ring, on which nothing is near
        answer = host.search(there, None, queries, 4, effort=host.efforts(there, 4)[-1])
        check(answer, kept_as, None, queries, 4, metric, 0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_host_saved_is_built_again(
    rapids: SimpleNamespace, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = rows(N, 12)
    host, module = twin("host", kind), twin("rapids", kind)
    host.save(host.build(vectors, "l2", build_params(IndexSpec(kind, "float16"), N, 12)), tmp_path / "index")
    with caplog.at_level(logging.INFO, "headrace.gpu"):
        index = module.load(tmp_path / "index")
    assert "built on the host" in caplog.text
    kept_as = vectors.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(module.vectors(index, np.arange(N)), kept_as)
    effort = module.efforts(index, 5)[-1]
    check(module.search(index, None, vectors[:9], 5, effort=effort), kept_as, None, vectors[:9], 5, "l2")


def test_codes_of_another_release_are_built_again(
    rapids: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, index = built("ivf_pq", rows(N, 12), "l2")
    ivf_pq.save(index, tmp_path / "index")
    monkeypatch.setattr(stand_ins.IvfPq, "load", None)
    monkeypatch.setattr(ivf_pq.cuvs, "__version__", "27.02.00")
    with caplog.at_level(logging.INFO, "headrace.gpu"):
        again = ivf_pq.load(tmp_path / "index")
    assert "26.10.00" in caplog.text
    assert again.params.lists == index.params.lists


@pytest.mark.parametrize("kind", ["graph", "ivf_pq"])
def test_an_archive_of_another_kind_is_refused(rapids: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    archive.write(tmp_path / "index", "flat", "l2", rows(40, 4))
    for backend in ("rapids", "host"):
        with pytest.raises(BackendError, match="load it as what it is"):
            twin(backend, kind).load(tmp_path / "index")


def test_an_index_that_cannot_be_written_says_so(rapids: SimpleNamespace, tmp_path: Path) -> None:
    for kind in KINDS:
        module, index = built(kind, rows(N, 4), "l2")
        with pytest.raises(BackendError, match=r"cannot (write|use)"):
            module.save(index, tmp_path / "nowhere" / "index")
    with pytest.raises(BackendError, match="cannot use"), kept.scratch(tmp_path / "index"):
        raise kept.CuvsException("no space")
    assert not list(tmp_path.iterdir())


# --- memory


def test_the_pool_counts_and_is_limited(rapids: SimpleNamespace) -> None:
    assert memory.used() is None
    assert memory.statistics() == {"free": stand_ins.FREE, "total": stand_ins.TOTAL}
    memory.start(1_000_100)
    pool = rapids.rmm.current
    assert rapids.rmm.allocators == [memory.rmm_cupy_allocator]
    first = pool.allocate(300_000)
    pool.allocate(200_000)
    pool.deallocate(first, 300_000)
    assert memory.used() == 200_000
    assert memory.statistics() == {
        "free": stand_ins.FREE,
        "total": stand_ins.TOTAL,
        "used": 200_000,
        "peak": 500_000,
        "reserved": 249_856,
    }
    with pytest.raises(MemoryError):
        pool.allocate(900_000)
    memory.start(1_000_100)
    assert rapids.rmm.current is pool
    with pytest.raises(BackendError, match="1000100 bytes already, not 7"):
        memory.start(7)


def test_without_a_limit_the_pool_may_take_what_is_free(rapids: SimpleNamespace) -> None:
    memory.start(None)
    assert rapids.rmm.current.get_upstream().get_allocation_limit() == stand_ins.FREE // 256 * 256


@pytest.mark.parametrize("limit", [0, 1023])
def test_a_limit_that_holds_nothing_is_refused(rapids: SimpleNamespace, limit: int) -> None:
    with pytest.raises(BackendError, match="holds nothing"):
        memory.start(limit)


def test_a_limit_above_what_the_device_has(rapids: SimpleNamespace) -> None:
    with pytest.raises(BackendError, match=f"where {stand_ins.FREE} are free"):
        memory.start(5 * stand_ins.FREE)
    assert memory.used() is None


@pytest.mark.parametrize("limit", [None, 4096])
def test_a_pool_that_is_there_is_kept(rapids: SimpleNamespace, limit: int | None) -> None:
    theirs = stand_ins.rmm.mr.LimitingResourceAdaptor(stand_ins.CudaMemory(), 8192)
    rapids.rmm.current = theirs
    memory.start(limit)
    rapids.rmm.current.allocate(4000)
    assert memory.used() == 4000
    assert theirs.get_allocated_bytes() >= 4000
    assert "reserved" not in memory.statistics()
    if limit:
        with pytest.raises(MemoryError):
            rapids.rmm.current.allocate(200)
