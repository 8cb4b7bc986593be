"""What every index kind must do alike, over every metric and dtype, on every backend."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.gpu.backend import Backend
from headrace.gpu.calibrate import calibrate
from headrace.gpu.errors import BackendError
from headrace.gpu.index_spec import DTYPES, KINDS, IndexSpec, build_params
from tests.gpu.searches import METRICS, check_search, clustered, on_host, random_rows

MANY = 200
"""An effort at which every kind finds nearly everything in these small indexes."""

every_kind = pytest.mark.parametrize("kind", KINDS)
every_metric = pytest.mark.parametrize("metric", METRICS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def built(backend: Backend, kind: str, vectors: np.ndarray, metric: str, dtype: str = "float32", **spec: Any) -> Any:
    params = build_params(IndexSpec(kind=kind, dtype=dtype, **spec), *vectors.shape)
    return backend.kinds[kind].build(backend.xp.asarray(vectors), metric, params)


def found(
    backend: Backend, kind: str, index: Any, allowed: Any, queries: np.ndarray, k: int, effort: int = MANY
) -> Any:
    xp = backend.xp
    allowed = None if allowed is None else xp.asarray(allowed)
    answer = backend.kinds[kind].search(index, allowed, xp.asarray(queries), k, effort=effort)
    return tuple(map(on_host, answer))


# --- recall


@every_kind
@every_metric
@every_dtype
def test_the_calibrated_effort_gives_its_recall_under_every_filter(
    backend: Backend, kind: str, metric: str, dtype: str
) -> None:
    vectors, queries = clustered(4000, 32, metric)
    kept = vectors.astype(dtype)
    index = built(backend, kind, vectors, metric, dtype)
    calibration = calibrate(backend, backend.kinds[kind], index, backend.xp.asarray(kept), metric)
    random = np.random.default_rng(2).random(len(vectors))
    for target, share in itertools.product((0.9, 0.99), (1.0, 0.8, 0.5, 0.05, 0.001)):
        allowed = random < share
        answer = found(backend, kind, index, allowed, queries, 10, calibration.effort(target))
        recall = check_search(answer, kept, allowed, queries, 10, metric, exact=kind == "flat")
        assert recall >= (0.99 if share == 0.001 else target - 0.01), (target, share)


@every_kind
@every_metric
def test_no_filter_is_a_filter_that_lets_all_through(backend: Backend, kind: str, metric: str) -> None:
    vectors, queries = clustered(2500, 16, metric)
    index = built(backend, kind, vectors, metric)
    everything = np.ones(len(vectors), dtype=bool)
    for asked in (queries, queries[:1]):
        one, two = (found(backend, kind, index, allowed, asked, 10, 16) for allowed in (None, everything))
        np.testing.assert_array_equal(one[1], two[1])
        np.testing.assert_array_equal(one[0], two[0])
        check_search(one, vectors, everything, asked, 10, metric, exact=False)


@every_kind
@every_metric
def test_what_is_deleted_gives_way_to_what_is_next(backend: Backend, kind: str, metric: str) -> None:
    vectors, queries = clustered(2500, 16, metric)
    index = built(backend, kind, vectors, metric)
    alive = np.ones(len(vectors), dtype=bool)
    for _ in range(4):
        rows = found(backend, kind, index, alive, queries[:1], 30)[1]
        alive[rows] = False
    assert alive.sum() == len(vectors) - 120
    answer = found(backend, kind, index, alive, queries, 10)
    assert check_search(answer, vectors, alive, queries, 10, metric, exact=False) >= 0.97


@every_kind
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_allowed_rows_far_from_the_query_are_all_found(backend: Backend, kind: str, metric: str) -> None:
    # The search goes to the query's own cluster, where nothing is allowed: a plain filtered walk comes back empty.
    vectors, _ = clustered(6000, 16, "l2")
    allowed = ((vectors - vectors[0]) ** 2).sum(axis=1) > 20
    assert allowed.sum() > 100
    index = built(backend, kind, vectors, metric, graph_degree=8, graph_effort=40)
    answer = found(backend, kind, index, allowed, vectors[:1], 50, effort=2)
    check_search(answer, vectors, allowed, vectors[:1], 50, metric, exact=False)


@every_kind
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_query_that_comes_back_short_is_asked_exactly(backend: Backend, kind: str, metric: str) -> None:
    # Half of the rows are allowed, too many to score them all at once, but none near the query.
    vectors, _ = clustered(6000, 16, "l2")
    distances = ((vectors - vectors[0]) ** 2).sum(axis=1)
    allowed = distances > np.median(distances)
    index = built(backend, kind, vectors, metric)
    answer = found(backend, kind, index, allowed, vectors[:1], 10, effort=16 if kind == "graph" else 2)
    check_search(answer, vectors, allowed, vectors[:1], 10, metric, exact=False)


# --- edges


@every_kind
@every_metric
@every_dtype
@pytest.mark.parametrize("n", [1, 2, 40])
def test_few_rows(backend: Backend, kind: str, metric: str, dtype: str, n: int) -> None:
    vectors = random_rows(n, 6, metric)
    index = built(backend, kind, vectors, metric, dtype)
    for allowed in (np.ones(n, dtype=bool), np.arange(n) % 2 > 0):
        answer = found(backend, kind, index, allowed, vectors, 7)
        check_search(answer, vectors.astype(dtype), allowed, vectors, 7, metric)


@every_kind
@every_metric
def test_more_rows_asked_for_than_there_are(backend: Backend, kind: str, metric: str) -> None:
    vectors, queries = clustered(2500, 8, metric)
    index = built(backend, kind, vectors, metric)
    for k, last in ((3000, 2500), (500, 300), (20, 3)):
        allowed = np.arange(len(vectors)) < last
        answer = found(backend, kind, index, allowed, queries[:3], k, effort=16)
        check_search(answer, vectors, allowed, queries[:3], k, metric)


@every_kind
@every_metric
def test_nothing_asked_and_nothing_allowed(backend: Backend, kind: str, metric: str) -> None:
    vectors = random_rows(2200, 8, metric)
    index = built(backend, kind, vectors, metric)
    nothing = np.zeros(len(vectors), dtype=bool)
    check_search(found(backend, kind, index, nothing, vectors[:2], 3), vectors, nothing, vectors[:2], 3, metric)
    for allowed in (None, nothing, ~nothing):
        scores, rows = found(backend, kind, index, allowed, vectors[:0], 3)
        assert scores.shape == rows.shape == (0, 3)


@every_kind
@every_metric
@every_dtype
def test_equal_rows(backend: Backend, kind: str, metric: str, dtype: str) -> None:
    vectors = np.repeat(random_rows(2, 8, metric), 1100, axis=0)
    allowed = np.arange(2200) % 2 == 0
    index = built(backend, kind, vectors, metric, dtype)
    for mask in (allowed, np.ones(2200, dtype=bool)):
        answer = found(backend, kind, index, mask, vectors[:2], 20)
        check_search(answer, vectors.astype(dtype), mask, vectors[:2], 20, metric)


@every_kind
def test_over_nothing(backend: Backend, kind: str) -> None:
    with pytest.raises(BackendError, match="0 vectors"):
        built(backend, kind, np.empty((0, 4), dtype=np.float32), "l2")


@every_kind
def test_arrays_that_are_not_row_by_row(backend: Backend, kind: str) -> None:
    wide = random_rows(5000, 24)
    vectors, queries = wide[::2, 3:19], np.asfortranarray(wide[:5, 3:19])
    allowed = np.arange(2500) % 2 == 0
    index = built(backend, kind, vectors, "ip")
    answer = found(backend, kind, index, allowed, queries, 4)
    check_search(answer, vectors, allowed, queries, 4, "ip", exact=False)


@every_kind
def test_a_query_that_is_no_number_does_not_touch_its_neighbour(backend: Backend, kind: str) -> None:
    vectors = random_rows(2200, 8, "cosine")
    index = built(backend, kind, vectors, "cosine")
    rows = found(backend, kind, index, None, np.stack([np.full(8, np.nan, dtype=np.float32), vectors[7]]), 1)[1]
    assert rows[1].tolist() == [7]


@every_kind
def test_numbers_too_large_for_float16_are_refused(backend: Backend, kind: str) -> None:
    vectors = random_rows(50, 4) * 1e5
    with pytest.raises(BackendError, match=r"float16 ends at 65504.*float32"):
        built(backend, kind, vectors, "l2", "float16")
    built(backend, kind, vectors, "l2", "float32")


# --- what is kept


@every_kind
@pytest.mark.parametrize("given", DTYPES)
@every_dtype
@pytest.mark.parametrize("n", [10, 2200])
def test_vectors_are_kept_as_they_are(backend: Backend, kind: str, given: str, dtype: str, n: int) -> None:
    vectors = random_rows(n, 6).astype(given)
    vectors[0] = 2e-8 if dtype == "float32" or given == "float32" else 6e-8  # float16 has a few numbers as small
    index = built(backend, kind, vectors, "ip", dtype)
    kept = vectors.astype(dtype).astype(np.float32)
    picked = backend.xp.asarray([n - 1, 0, n - 1])
    got = backend.kinds[kind].vectors(index, picked)
    assert on_host(got).dtype == np.float32
    np.testing.assert_array_equal(on_host(got), kept[[n - 1, 0, n - 1]])
    got[:] = 7  # a copy, which outlives the index
    np.testing.assert_array_equal(on_host(backend.kinds[kind].vectors(index, picked))[1], kept[0])
    none = backend.kinds[kind].vectors(index, backend.xp.asarray([], dtype=np.int64))
    assert none.shape == (0, 6)
    sizes = backend.kinds[kind].nbytes(index)
    assert set(sizes) <= {"vectors", "links", "codes", "centroids"}
    assert sizes["vectors"] >= kept.size * np.dtype(dtype).itemsize
    assert all(0 <= size < 100 * vectors.nbytes + 10_000 for size in sizes.values())


@every_kind
@every_metric
@every_dtype
@pytest.mark.parametrize("n", [3, 2300])
def test_what_was_saved_answers_the_same(
    backend: Backend, tmp_path: Path, kind: str, metric: str, dtype: str, n: int
) -> None:
    vectors = random_rows(n, 12, metric)
    module = backend.kinds[kind]
    index = built(backend, kind, vectors, metric, dtype)
    path = tmp_path / f"{kind} {metric}.index"
    path.write_bytes(b"what was there before")
    module.save(index, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "something was left behind"
    again = module.load(path)
    path.unlink()
    for allowed in (None, np.arange(n) % 5 > 0):
        one, two = (found(backend, kind, which, allowed, vectors[:4], 5, 32) for which in (index, again))
        np.testing.assert_array_equal(one[1], two[1])
        np.testing.assert_array_equal(one[0], two[0])
    assert module.nbytes(index) == module.nbytes(again)
    assert module.efforts(index, 10) == module.efforts(again, 10)
    everything = backend.xp.arange(n)
    np.testing.assert_array_equal(
        on_host(module.vectors(again, everything)), on_host(module.vectors(index, everything))
    )


@every_kind
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "text", "half", "tail", "bit"])
def test_a_damaged_file_is_refused(backend: Backend, tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / "some.index"
    backend.kinds[kind].save(built(backend, kind, random_rows(2200, 8), "ip"), path)
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "missing": None,
        "empty": b"",
        "short": content[:10],
        "text": b"no index at all, but a text that is long enough to be one",
        "half": content[:middle],
        "tail": content + b"more",
        "bit": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
    }[damage]
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    with pytest.raises(BackendError, match=r"some\.index"):
        backend.kinds[kind].load(path)


@pytest.mark.parametrize(("saved", "read"), list(itertools.permutations(KINDS, 2)))
def test_a_file_of_another_kind_is_refused(backend: Backend, tmp_path: Path, saved: str, read: str) -> None:
    path = tmp_path / "some.index"
    backend.kinds[saved].save(built(backend, saved, random_rows(2200, 8), "ip"), path)
    with pytest.raises(BackendError, match=r"some\.index"):
        backend.kinds[read].load(path)


@every_kind
def test_a_file_that_cannot_be_written(backend: Backend, tmp_path: Path, kind: str) -> None:
    index = built(backend, kind, random_rows(3, 8), "ip")
    with pytest.raises(BackendError, match="nowhere"):
        backend.kinds[kind].save(index, tmp_path / "nowhere" / "some.index")


# --- at once


@every_kind
def test_searches_of_many_threads_do_not_disturb_each_other(backend: Backend, kind: str) -> None:
    vectors, queries = clustered(3000, 16, "ip")
    index = built(backend, kind, vectors, "ip")
    random = np.random.default_rng(4)
    tasks = [
        (None if share is None else random.random(len(vectors)) < share, queries[at : at + count], k, effort)
        for at, (share, count, k, effort) in enumerate(
            itertools.product((None, 0.6, 0.1, 0.01), (1, 5), (3, 12), (8, 40))
        )
    ]

    def run(task: Any) -> Any:
        return found(backend, kind, index, *task)

    alone = [run(task) for task in tasks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, tasks * 3))
    for one, two in zip(alone * 3, together, strict=True):
        np.testing.assert_array_equal(one[1], two[1])
        np.testing.assert_array_equal(one[0], two[0])


# --- effort


@every_kind
@pytest.mark.parametrize("n", [1, 100, 2100, 5000])
def test_efforts_rise(backend: Backend, kind: str, n: int) -> None:
    index = built(backend, kind, random_rows(n, 8), "ip", graph_degree=8, graph_effort=16)
    for k in (1, 10, 500):
        efforts = backend.kinds[kind].efforts(index, k)
        assert efforts
        assert list(efforts) == sorted(set(efforts))
        assert (efforts == (0,)) == (kind == "flat" or (kind == "ivf_pq" and n < 2048))


@pytest.mark.parametrize("spec", [{}, {"pq_bits": 8}, {"pq_bits": 8, "pq_dim": 4}, {"lists": 20}, {"pq_bits": 6}])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_every_kind_of_code_can_be_built_and_searched(backend: Backend, metric: str, spec: dict[str, int]) -> None:
    vectors, queries = clustered(2500, 16, metric)
    index = built(backend, "ivf_pq", vectors, metric, **spec)
    allowed = np.arange(len(vectors)) % 3 > 0
    for mask in (allowed, np.ones(len(vectors), dtype=bool)):
        answer = found(backend, "ivf_pq", index, mask, queries, 10, effort=12)
        assert check_search(answer, vectors, mask, queries, 10, metric, exact=False) >= 0.95
