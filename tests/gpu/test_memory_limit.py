"""Memory: what is held is measured, rows are refused before the limit is passed, and what makes room goes through."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from headrace.gpu.backend import resolve
from headrace.gpu.budget import Budget, job_bytes
from headrace.gpu.errors import ConfigError, StoreFull
from headrace.gpu.index_spec import KINDS, IndexSpec, build_params
from headrace.gpu.merge import MergePolicy
from headrace.gpu.rows import DELETED, Action
from headrace.gpu.store import Store, StoreSettings
from tests.gpu.batches import batch_of, vector_of

HOST = resolve("host")
DIM = 64
LIMIT = 1_500_000
MERGE = MergePolicy(fan_in=3, floor_rows=64)


def store_of(limit: int | None = LIMIT, kind: str = "flat", **options: Any) -> Store:
    settings = StoreSettings(seal_rows=256, memory_limit=limit, merge=MERGE)
    return Store(HOST, DIM, "cosine", settings, index=IndexSpec(kind, graph_degree=8), ids="integer", **options)


def put(store: Store, first: int, count: int = 32, **fields: Any) -> None:
    rows = [{"id": n, "offset": n, **fields} for n in range(first, first + count)]
    store.apply(batch_of(rows, DIM), {0: first + count})


def fill(store: Store) -> int:
    """Rows that went in before the store was full."""
    for first in range(0, 100_000, 32):
        try:
            put(store, first)
        except StoreFull:
            return first
        while store.maintain():
            pass
    raise AssertionError("never full")


def held(store: Store) -> int:
    return int(store.statistics()["memory"]["held"])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_refused_before_the_limit_is_passed(kind: str) -> None:
    store = store_of(kind=kind)
    rows = fill(store)
    assert LIMIT // 2 < held(store) <= LIMIT
    assert rows * DIM * 4 > LIMIT // 3
    assert store.statistics()["memory"]["full"]
    with pytest.raises(StoreFull, match=r"store.memory-limit 1,500,000 are held"):
        put(store, rows)
    assert store.view.rows == rows
    assert store.view.stamp == {0: rows}
    assert store.get([rows])[0] == [None]
    assert store.search(vector_of(5, 5, DIM)[None], 1).rows[0][0].id == 5


def test_what_needs_no_room_goes_through_and_what_it_frees_is_used_again() -> None:
    store = store_of()
    rows = fill(store)
    put(store, 0, cell=3, action=Action.KEEP)
    assert store.cell_sizes()[3] == 32
    with pytest.raises(StoreFull):
        store.apply(batch_of([{"id": 1, "offset": rows, "cell": DELETED}, {"id": 2, "offset": rows + 1}], DIM))
    assert store.view.rows == rows, "a batch with a row to hold is refused as a whole"
    store.apply(batch_of([{"id": n, "offset": rows + n, "cell": DELETED} for n in range(rows // 2)], DIM))
    assert store.view.rows == rows - rows // 2
    before = held(store)
    while store.maintain():
        pass
    assert held(store) < 0.75 * before
    put(store, 5 * rows)
    assert not store.statistics()["memory"]["full"]


def test_dropped_cells_make_room() -> None:
    store = store_of()
    rows = fill(store)
    store.apply(batch_of([{"id": n, "offset": n, "cell": 1, "action": Action.KEEP} for n in range(0, rows, 2)], DIM))
    store.drop_cells(frozenset([0]))
    while store.maintain():
        pass
    put(store, 5 * rows)


def test_stores_of_one_worker_share_the_limit() -> None:
    budget = Budget(LIMIT, 1 << 30)
    one, two = store_of(budget=budget), store_of(budget=budget)
    rows = fill(one)
    assert fill(two) < rows
    assert two.statistics()["memory"]["all"] == held(one) + held(two)
    del one
    gc.collect()
    put(two, 100_000)
    alone = held(two)
    assert budget.held == alone


def test_without_a_limit_nothing_is_refused() -> None:
    budget = Budget(None, 1000)
    budget.admit(1 << 60)
    assert budget.room == 1000


class TestJobs:
    def test_a_job_takes_room_while_it_lasts(self) -> None:
        budget = Budget(None, 1000)
        with budget.job(600) as granted:
            assert granted
            assert (budget.working, budget.room) == (600, 400)
            with budget.job(500) as second:
                assert not second
            assert budget.working == 600
        assert (budget.working, budget.room) == (0, 1000)
        with pytest.raises(ZeroDivisionError), budget.job(1000):
            raise ZeroDivisionError
        assert budget.working == 0

    def test_room_is_what_the_stores_leave(self) -> None:
        class Owner:
            pass

        owner, budget = Owner(), Budget(800, 1000)
        assert (budget.room, budget.kept, budget.largest_job) == (800, 100, 100)
        budget.holds(owner, 750)
        assert budget.room == 50
        budget.holds(owner, 900)
        assert budget.room == 0

    def test_no_merge_is_begun_that_would_not_fit(self) -> None:
        settings = StoreSettings(seal_rows=64, maintenance_memory=180_000, merge=MERGE)
        store = Store(HOST, DIM, "cosine", settings, index=IndexSpec("flat"), ids="integer")
        for first in range(0, 64 * 12, 64):
            put(store, first, 64)
            while store.wants_maintenance():
                assert store.maintain()
        sizes = [part["rows"] for part in store.statistics()["segments"]]
        assert sum(sizes) == 64 * 12
        biggest = job_bytes(build_params(IndexSpec("flat"), max(sizes), DIM), max(sizes), DIM, 0)
        assert max(sizes) > 64
        assert biggest <= 180_000
        assert max(sizes) < 64 * 12

    def test_a_growing_segment_is_never_too_large_to_be_sealed(self) -> None:
        settings = StoreSettings(seal_rows=100_000, maintenance_memory=400_000)
        store = Store(HOST, DIM, "cosine", settings, index=IndexSpec("flat"), ids="integer")
        for first in range(0, 2000, 32):
            put(store, first)
        assert store.wants_maintenance()
        assert store.maintain()
        assert any(part["kind"] == "sealed" for part in store.statistics()["segments"])

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_the_estimate_covers_what_a_job_leaves(self, kind: str, dtype: str) -> None:
        rows, dim = 3000, 32
        spec = IndexSpec(kind, dtype)
        params = build_params(spec, rows, dim)
        vectors = np.random.default_rng(0).normal(size=(rows, dim)).astype(dtype)
        index = HOST.kinds[kind].build(vectors, "l2", params)
        left = vectors.nbytes + sum(HOST.kinds[kind].nbytes(index).values())
        assert left <= job_bytes(params, rows, dim, 0) <= 4 * left


@pytest.mark.parametrize("name", ["seal_rows", "build_threads", "maintenance_memory", "memory_limit"])
def test_settings_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        StoreSettings(**{name: 0})
