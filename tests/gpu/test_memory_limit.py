"""Memory: what is held is measured, rows are refused before the limit is passed, and what makes room goes through."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace.gpu.backend import resolve
from headrace.gpu.budget import Budget, job_bytes
from headrace.gpu.errors import ConfigError, RecordTooLarge, StoreFull
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
    assert store.get([1, 2])[0][0] is None, "what it deletes makes room"
    assert store.view.stamp == {0: 32}, "but nothing says that it was applied"
    rows -= 1
    assert store.view.rows == rows
    assert store.get([2])[0][0].offset == 2, "no row goes without the one that replaces it"
    rows += 1
    store.apply(batch_of([{"id": n, "offset": rows + n, "cell": DELETED} for n in range(rows // 2)], DIM))
    assert store.view.rows == rows - rows // 2, "row 1 was one of them"
    before = held(store)
    while store.maintain():
        pass
    assert held(store) < 0.75 * before
    put(store, 5 * rows)
    assert not store.statistics()["memory"]["full"]


def test_deletions_in_batches_that_are_refused_make_the_room_that_these_need() -> None:
    store = store_of()
    rows = fill(store)
    stuck = [{"id": n, "offset": rows + n, "cell": DELETED} for n in range(rows // 2)]
    stuck += [{"id": rows + n, "offset": 2 * rows + n} for n in range(16)]
    batch = batch_of(stuck, DIM)
    with pytest.raises(StoreFull):
        store.apply(batch, {0: 3 * rows})
    changed = store._table.changed_at
    with pytest.raises(StoreFull):
        store.apply(batch, {0: 3 * rows})
    assert store._table.changed_at == changed, "trying again is no writing: a store that rests tidies up"
    while store.maintain():
        pass
    store.apply(batch, {0: 3 * rows})
    assert store.view.stamp == {0: 3 * rows}
    assert store.view.rows == rows - rows // 2 + 16


def test_rows_that_live_elsewhere_now_go_even_from_a_batch_that_is_refused() -> None:
    store = store_of()
    rows = fill(store)
    moved = [{"id": 7, "offset": rows, "cell": 3, "action": Action.DROP}, {"id": -1, "offset": rows + 1}]
    with pytest.raises(StoreFull):
        store.apply(batch_of(moved, DIM), {0: rows + 2})
    assert store.get([7])[0] == [None]
    assert store.view.moved == {0: rows + 1}, "readers are told, though the stamp has not moved"


@pytest.mark.parametrize("share", [0.05, 0.25])
def test_a_full_store_gets_back_the_room_of_few_deleted_rows(share: float) -> None:
    settings = StoreSettings(seal_rows=128, memory_limit=LIMIT // 2, merge=MergePolicy(fan_in=50, floor_rows=64))
    store = Store(HOST, DIM, "cosine", settings, index=IndexSpec("flat"), ids="integer")
    rows = fill(store)
    gone = [n for n in range(rows) if n % round(1 / share) == 0]
    store.apply(batch_of([{"id": n, "offset": rows + n, "cell": DELETED} for n in gone], DIM))
    more = 0
    for first in range(10 * rows, 20 * rows, 16):
        while store.maintain():
            pass
        store.forget({0: 100 * rows})
        try:
            put(store, first, 16)
        except StoreFull:  # as ingest does: tidy up, and once more
            while store.maintain():
                pass
            try:
                put(store, first, 16)
            except StoreFull:
                break
        more += 16
    assert more >= 0.7 * len(gone) - 16, (more, len(gone), rows)


def test_a_row_that_an_empty_store_had_no_room_for_is_said_to_be_too_large() -> None:
    store = store_of()
    small = {"id": 1, "offset": 1}
    large = {"id": 0, "offset": 0, "attributes": {"t": "x" * LIMIT}}
    fits = {"id": 2, "offset": 2, "attributes": {"t": "x" * (LIMIT // 2)}}
    with pytest.raises(StoreFull) as caught:
        store.apply(batch_of([large, small], DIM))
    assert type(caught.value) is StoreFull, "nobody knows of which"
    with pytest.raises(RecordTooLarge, match=r"take 1,5\d\d,\d\d\d bytes, and an empty worker has room for"):
        store.apply(batch_of([large], DIM), {0: 1})
    assert store.view.rows == 0
    assert store.view.stamp == {}
    assert not store._budget.tight, "tidying up cannot help"
    assert not store.statistics()["memory"]["full"], "what was refused with it had room"
    fill(store)
    with pytest.raises(StoreFull) as caught:
        store.apply(batch_of([{**fits, "id": -2}], DIM))
    assert type(caught.value) is StoreFull, "it fits once others have gone"
    store_of().apply(batch_of([fits], DIM))


def test_a_limit_that_holds_nothing_is_not_the_record_s_fault() -> None:
    with pytest.raises(StoreFull) as caught:
        store_of(limit=10_000).apply(batch_of([{"id": 0, "offset": 0, "attributes": {"t": "x" * LIMIT}}], DIM))
    assert type(caught.value) is StoreFull


def until_full(more: Callable[[int], None], holds: Callable[[], bool], store: Store | None = None) -> int:
    """The number at which there was no room any more."""
    for first in range(256, 1_000_000, 256):
        try:
            more(first)
        except StoreFull:
            return first
        assert holds()
        while store is not None and store.maintain():
            pass
    raise AssertionError("never full")


def test_texts_and_ids_are_counted_before_they_are_there() -> None:
    limit = 1_000_000
    for ids, text in (("n{}", 4_000), ("n{}" + "y" * 3_000, 0), ("n{}", 300)):
        settings = StoreSettings(seal_rows=256, memory_limit=limit, merge=MERGE)
        store = Store(HOST, DIM, "cosine", settings, index=IndexSpec("flat"), ids="string")

        def more(first: int) -> None:
            rows = [
                {"id": ids.format(n), "offset": n, "attributes": {"t": f"{n} " + "x" * text}}  # noqa: B023
                for n in range(first, first + 32)
            ]
            store.apply(batch_of(rows, DIM))  # noqa: B023

        assert until_full(more, lambda: held(store) <= limit, store) < 100_000  # noqa: B023
        assert held(store) <= limit


@pytest.mark.parametrize("new", ["column", "text", "number", "flag", "nothing"])
def test_what_is_counted_covers_what_is_then_held(new: str) -> None:
    store = Store(HOST, DIM, "cosine", StoreSettings(seal_rows=1 << 14), index=IndexSpec("flat"), ids="string")
    value = {"text": "x{}", "number": 0.5, "flag": True, "nothing": None, "column": 7}[new]
    table, sum_counted = store._table, 0
    at_first = sum(table.growing.nbytes().values())
    for first in range(0, 4000, 100):
        name = f"c{first}" if new == "column" else "c"
        rows = [
            {"id": f"id {n}", "offset": n, "attributes": {name: value.format(n) if new == "text" else value}}
            for n in range(first, first + 100)
        ]
        batch = batch_of(rows, DIM)
        counted = table.growing.growth(batch.ids, batch.attributes)
        sum_counted += counted
        store.apply(batch)
    grown = sum(table.growing.nbytes().values()) - at_first
    assert grown <= sum_counted <= 1.6 * grown, (grown, sum_counted)


def test_deletions_of_ids_never_heard_of_have_an_end() -> None:
    store = Store(HOST, DIM, "cosine", StoreSettings(memory_limit=LIMIT), index=IndexSpec("flat"), ids="string")
    store.apply(batch_of([{"id": "here", "offset": 0}, {"id": "there", "offset": 1}], DIM))

    def delete(first: int) -> None:
        gone = [{"id": f"unknown {n}" + "y" * 100, "offset": n, "cell": DELETED} for n in range(first, first + 256)]
        store.apply(batch_of(gone, DIM), {0: first})

    first = until_full(delete, lambda: True)
    with pytest.raises(StoreFull, match="no room to remember deletions"):
        delete(first)
    assert held(store) <= 1.2 * LIMIT, "the map of ids grows in steps"
    assert held(store) > LIMIT * 0.88, "they may take what is kept for merging"
    assert store.statistics()["memory"]["full"]
    store.apply(batch_of([{"id": "here", "offset": first + 1000, "cell": DELETED}], DIM))
    assert store.get(["here"])[0] == [None], "what makes room goes through"
    mixed = [{"id": "there", "offset": first + 1001, "cell": DELETED}]
    mixed += [{"id": f"other {n}", "offset": first + 2000 + n, "cell": DELETED} for n in range(2000)]
    with pytest.raises(StoreFull):
        store.apply(batch_of(mixed, DIM))
    assert store.get(["there"])[0] == [None], "also from a batch that is refused"
    store.forget({0: first})
    delete(first)
    assert not store.statistics()["memory"]["full"]
    assert held(store) < LIMIT // 2


def test_a_few_remembered_deletions_are_not_looked_through_each_time() -> None:
    store = store_of(limit=None)
    store.apply(batch_of([{"id": n, "offset": n, "cell": DELETED} for n in range(100)], DIM))
    store.forget({0: 1000})
    assert store.statistics()["remembered"] == 100


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


def test_room_is_short_from_a_refusal_until_there_is_enough_again() -> None:
    class Owner:
        pass

    owner, budget = Owner(), Budget(800, 1000)
    budget.holds(owner, 690)
    budget.admit(10)
    assert not budget.tight
    with pytest.raises(StoreFull):
        budget.admit(20)
    assert budget.tight
    assert budget.lacking
    budget.holds(owner, 680)
    assert budget.tight
    assert not budget.lacking, "there is room for these 20"
    budget.admit(20)
    assert budget.tight
    budget.holds(owner, 500)
    assert not budget.tight
    budget.holds(owner, 690)
    assert not budget.tight, "until the next refusal"


def test_deletions_may_take_what_rows_may_not() -> None:
    class Owner:
        pass

    owner, budget = Owner(), Budget(800, 1000)
    budget.holds(owner, 750)
    budget.admit(0, 50)
    with pytest.raises(StoreFull, match="remember deletions"):
        budget.admit(0, 51)
    with pytest.raises(StoreFull, match="11 more bytes of rows"):
        budget.admit(1, 10)


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

    def test_rows_wait_for_a_job_that_takes_more_than_is_kept(self) -> None:
        budget, owner = Budget(8000, 8000), Budget(None, 0)
        budget.holds(owner, 2000)
        with budget.job(5000) as granted:
            assert granted
            budget.admit(1000)
            with pytest.raises(StoreFull, match=r"until segments are merged, which takes 5,000 now: 2,000 of"):
                budget.admit(1001)
            assert not budget.lacking, "tidying up is no cure"
        budget.admit(5000)

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
