"""The store: versions decide, nothing blinks, and what was seen once stays as it was."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.gpu.backend import Backend, resolve
from headrace.gpu.merge import MergePolicy
from headrace.gpu.rows import DELETED, Action, row_hash
from headrace.gpu.segments import Sealed
from headrace.gpu.store import Applied, Store, StoreSettings
from tests.gpu.batches import DIM, batch_of, vector_of

BACKENDS = [pytest.param("host"), pytest.param("rapids", marks=pytest.mark.gpu)]
SMALL = StoreSettings(seal_rows=64, graph_degree=8, graph_effort=32, search_effort=64, merge=MergePolicy(fan_in=3))


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> Backend:
    return resolve(request.param)


@pytest.fixture
def store(backend: Backend) -> Store:
    return Store(backend, DIM, "cosine", SMALL)


def put(store: Store, *rows: dict[str, Any], stamp: dict[int, int] | None = None) -> Applied:
    return store.apply(batch_of(rows), stamp)


def versions(store: Store) -> dict[Any, tuple[int, int, int]]:
    """Every live row: id to topic partition, offset, cell. Fails if an id is there twice."""
    rows = [row for chunk in store.scan() for row in chunk]
    found = {row.id: (row.topic_partition, row.offset, row.cell) for row in rows}
    assert len(found) == len(rows) == store.view.rows, "an id is there twice, or the count is wrong"
    return found


def finish(store: Store) -> None:
    while store.maintain():
        pass


def nearest(store: Store, row_id: Any, offset: int) -> Any:
    found = store.search(vector_of(row_id, offset)[None], 1)
    return found.rows[0][0].id if found.rows[0] else None


def log_of(count: int, ids: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` records on 4 topic partitions, a fifth of them deletes; an id always comes from the same one."""
    rng = np.random.default_rng(seed)
    log = []
    for position in range(count):
        number = int(rng.integers(ids))
        deleted = rng.random() < 0.2
        cell = DELETED if deleted else int(rng.integers(5))
        log.append({"id": f"id-{number}", "partition": number % 4, "offset": position, "cell": cell})
    return log


def chunks(log: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """The log in batches in which every id is there once, its last version."""
    return [list({row["id"]: row for row in log[at : at + size]}.values()) for at in range(0, len(log), size)]


class TestVersions:
    def test_an_upsert_takes_the_place_of_the_older_row(self, store: Store) -> None:
        assert put(store, {"id": "a", "offset": 1, "attributes": {"x": 1, "y": "old"}}) == Applied(1, 0, 0, ())
        assert put(store, {"id": "a", "offset": 2, "cell": 3, "attributes": {"x": 2}}) == Applied(1, 1, 0, ())
        [row], _ = store.get(["a"], vectors=True)
        assert row is not None
        assert (row.offset, row.cell, row.attributes) == (2, 3, {"x": 2})
        np.testing.assert_array_equal(row.vector, vector_of("a", 2))
        assert versions(store) == {"a": (0, 2, 3)}

    @pytest.mark.parametrize("cell", [0, DELETED])
    def test_an_older_version_changes_nothing(self, store: Store, cell: int) -> None:
        put(store, {"id": "a", "offset": 5, "cell": 2})
        assert put(store, {"id": "a", "offset": 4, "cell": cell}) == Applied(0, 0, 0, ())
        assert versions(store) == {"a": (0, 5, 2)}

    def test_a_late_upsert_does_not_bring_a_deleted_row_back(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 1})
        assert put(store, {"id": "a", "offset": 5, "cell": DELETED}) == Applied(0, 1, 0, ())
        assert put(store, {"id": "a", "offset": 4}) == Applied(0, 0, 0, ())
        assert versions(store) == {}
        put(store, {"id": "a", "offset": 6})
        assert versions(store) == {"a": (0, 6, 0)}
        assert store.statistics()["remembered"] == 0

    def test_a_delete_that_comes_first_is_remembered(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 5, "cell": DELETED})
        put(store, {"id": "a", "offset": 4})
        assert versions(store) == {}

    def test_a_row_that_went_elsewhere_is_dropped_and_older_ones_stay_away(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 1})
        assert put(store, {"id": "a", "offset": 2, "cell": 9, "action": Action.DROP}).removed == 1
        put(store, {"id": "a", "offset": 1})
        assert versions(store) == {}

    def test_the_same_version_dropped_leaves_and_held_comes_back(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 1})
        assert put(store, {"id": "a", "offset": 1, "action": Action.DROP}).removed == 1
        assert versions(store) == {}
        assert put(store, {"id": "a", "offset": 1, "cell": 4}) == Applied(1, 0, 0, ())
        assert versions(store) == {"a": (0, 1, 4)}

    @pytest.mark.parametrize("action", [Action.KEEP, Action.HOLD])
    def test_the_same_version_takes_over_the_new_cell(self, store: Store, action: Action) -> None:
        put(store, {"id": "a", "offset": 1, "cell": 0}, {"id": "b", "offset": 2, "cell": 0})
        before = store.view.segments[0].segment.count
        assert put(store, {"id": "a", "offset": 1, "cell": 7, "action": action}) == Applied(0, 0, 0, ())
        assert versions(store) == {"a": (0, 1, 7), "b": (0, 2, 0)}
        assert store.view.segments[0].segment.count == before, "the row was written again"

    def test_keep_reports_what_is_not_here(self, store: Store) -> None:
        put(store, {"id": "old", "offset": 1}, {"id": "new", "offset": 9}, {"id": "same", "offset": 3})
        put(store, {"id": "gone", "offset": 4, "cell": DELETED})
        keep = {"cell": 6, "action": Action.KEEP}
        applied = put(
            store,
            {"id": "unknown", "offset": 5, **keep},
            {"id": "old", "offset": 2, **keep},
            {"id": "new", "offset": 8, **keep},
            {"id": "same", "offset": 3, **keep},
            {"id": "gone", "offset": 3, **keep},
            {"id": "gone-not", "offset": 11},
        )
        assert applied == Applied(1, 0, 0, (0, 1))
        expected = {"old": (0, 1, 0), "new": (0, 9, 0), "same": (0, 3, 6), "gone-not": (0, 11, 0)}
        assert versions(store) == expected

    def test_another_topic_partition_is_decided_by_timestamp_and_counted(self, store: Store) -> None:
        put(store, {"id": "a", "partition": 0, "offset": 100, "timestamp": 1000})
        older = {"id": "a", "partition": 1, "offset": 500, "timestamp": 999}
        assert put(store, older) == Applied(0, 0, 1, ())
        assert versions(store) == {"a": (0, 100, 0)}
        assert put(store, {**older, "offset": 3, "timestamp": 1001}) == Applied(1, 1, 1, ())
        assert versions(store) == {"a": (1, 3, 0)}

    def test_equal_timestamps_of_two_topic_partitions_end_alike_in_either_order(self, backend: Backend) -> None:
        rows = [{"id": "a", "partition": partition, "offset": 7 - partition, "timestamp": 5} for partition in (0, 1)]
        ends = []
        for order in (rows, rows[::-1]):
            store = Store(backend, DIM, "cosine", SMALL)
            for row in order:
                put(store, row)
            ends.append(versions(store))
        assert ends[0] == ends[1]

    def test_a_batch_with_wrong_vectors_changes_nothing(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 1}, stamp={0: 2})
        good = batch_of([{"id": "a", "offset": 2}, {"id": "b", "offset": 3}])
        for vectors in (good.vectors[:1], good.vectors[:, :-1], np.empty((0, DIM), dtype=np.float32)):
            with pytest.raises(ValueError, match=r"2 rows to hold need \(2, 8\)"):
                store.apply(replace(good, vectors=vectors), {0: 4})
        assert versions(store) == {"a": (0, 1, 0)}
        assert store.view.stamp == {0: 2}

    def test_vectors_and_attributes_belong_to_the_rows_that_are_held(self, store: Store) -> None:
        put(store, {"id": 4, "offset": 90})
        rows = [{"id": n, "offset": n, "attributes": {"n": n}, "cell": DELETED if n % 3 == 0 else 0} for n in range(10)]
        put(store, *rows)
        found, _ = store.get([1, 2, 4, 5, 8], vectors=True)
        assert [row and row.attributes for row in found] == [{"n": 1}, {"n": 2}, {}, {"n": 5}, {"n": 8}]
        for row in found:
            assert row is not None
            np.testing.assert_array_equal(row.vector, vector_of(row.id, row.offset))

    def test_a_growing_segment_grows(self, backend: Backend) -> None:
        store = Store(backend, DIM, "cosine", replace(SMALL, seal_rows=10_000))
        for start in (0, 900, 1800, 2700):
            rows = [{"id": n, "partition": 2, "offset": n, "cell": 3} for n in range(start, start + 900)]
            put(store, *({**row, "attributes": {"n": row["id"], f"from-{start}": True}} for row in rows))
        assert versions(store) == {n: (2, n, 3) for n in range(3600)}
        found, _ = store.get(range(0, 3600, 50), vectors=True)
        for row in found:
            assert row is not None
            assert row.attributes == {"n": row.id, f"from-{row.id // 900 * 900}": True}
            assert row.timestamp == row.id
            np.testing.assert_array_equal(row.vector, vector_of(row.id, row.offset))

    def test_integer_ids_are_not_the_strings_that_look_like_them(self, store: Store) -> None:
        put(store, {"id": 7, "offset": 1}, {"id": "7", "offset": 2})
        assert set(versions(store)) == {7, "7"}
        assert row_hash(7, 0, 1) != row_hash("7", 0, 1)
        assert type(next(row.id for chunk in store.scan() for row in chunk if row.id == 7)) is int


class TestReplay:
    @pytest.mark.parametrize("seal", [False, True], ids=["growing", "sealed"])
    def test_a_thousand_offsets_twice_and_out_of_order_equal_one_delivery(self, backend: Backend, seal: bool) -> None:
        log = log_of(1000, ids=150)
        once, often = Store(backend, DIM, "cosine", SMALL), Store(backend, DIM, "cosine", SMALL)
        for chunk in chunks(log, 25):
            put(once, *chunk)
        again = chunks(log, 25) * 2
        for at in np.random.default_rng(1).permutation(len(again)):
            put(often, *again[at])
            if seal:
                finish(often)
        last = {row["id"]: row for row in log}
        assert versions(once) == versions(often)
        assert versions(often) == {
            row["id"]: (row["partition"], row["offset"], row["cell"]) for row in last.values() if row["cell"] != DELETED
        }
        assert once.digests()[0] == often.digests()[0]
        assert len(once.digests()[0]) == 5

    def test_digests_are_sums_over_rows_whatever_their_order(self, backend: Backend) -> None:
        rows = [{"id": f"r{number}", "offset": number, "cell": number % 3} for number in range(200)]
        forward, backward = Store(backend, DIM, "cosine", SMALL), Store(backend, DIM, "cosine", SMALL)
        put(forward, *rows, stamp={0: 200})
        for chunk in chunks(rows[::-1], 30):
            put(backward, *chunk)
        finish(backward)
        digests, stamp = forward.digests()
        assert digests == backward.digests()[0]
        assert stamp == {0: 200}
        assert digests[1] == (67, sum(row_hash(f"r{n}", 0, n) for n in range(1, 200, 3)) % 2**64)
        put(backward, {"id": "r4", "offset": 200, "cell": 1})
        changed = backward.digests()[0]
        assert changed[1] != digests[1]
        assert (changed[0], changed[2]) == (digests[0], digests[2])


class TestCells:
    def test_dropped_cells_are_gone_and_can_come_back(self, store: Store) -> None:
        rows = [{"id": f"r{number}", "offset": number, "cell": number % 4} for number in range(100)]
        put(store, *rows)
        finish(store)
        put(store, {"id": "late", "offset": 100, "cell": 3})
        assert store.cell_sizes() == {0: 25, 1: 25, 2: 25, 3: 26}
        assert store.drop_cells(frozenset([0, 2])) == 51
        assert store.cell_sizes() == {0: 25, 2: 25}
        assert {cell for _, _, cell in versions(store).values()} == {0, 2}
        assert store.get(["r1", "late", "r2"])[0][:2] == [None, None]
        assert nearest(store, "r1", 1) != "r1"
        assert store.drop_cells(frozenset([0, 2])) == 0
        assert put(store, rows[1], {"id": "late", "offset": 99}) == Applied(1, 0, 0, ())
        assert set(store.cell_sizes().items()) == {(0, 25), (2, 25), (1, 1)}
        assert store.drop_cells(frozenset()) == 51
        assert versions(store) == {}

    def test_scan_of_some_cells(self, store: Store) -> None:
        put(store, *({"id": number, "offset": number, "cell": number % 4} for number in range(150)))
        found = list(store.scan(frozenset([1, 3]), vectors=True, batch=10))
        assert max(map(len, found)) <= 10
        rows = [row for chunk in found for row in chunk]
        assert sorted(row.id for row in rows) == list(range(1, 150, 2))
        for row in rows:
            np.testing.assert_array_equal(row.vector, vector_of(row.id, row.offset))
        assert list(store.scan(frozenset())) == []


class TestForget:
    def test_only_deletions_below_stable_are_forgotten(self, store: Store) -> None:
        count = 5000
        put(store, *({"id": n, "partition": n % 2, "offset": n, "cell": DELETED} for n in range(count)))
        assert store.statistics()["remembered"] == count
        store.forget({0: 1000, 1: 0})
        assert store.statistics()["remembered"] == count - 500
        put(store, {"id": 998, "partition": 0, "offset": 1}, {"id": 1000, "partition": 0, "offset": 1})
        put(store, {"id": 999, "partition": 1, "offset": 1})
        assert set(versions(store)) == {998}, "what is not stable everywhere must be remembered"

    def test_an_unknown_topic_partition_is_not_forgotten(self, store: Store) -> None:
        put(store, *({"id": n, "partition": 3, "offset": n, "cell": DELETED} for n in range(5000)))
        store.forget({0: 10_000})
        assert store.statistics()["remembered"] == 5000


class TestReads:
    @pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
    def test_search_over_all_segments_agrees_with_a_full_sort(self, backend: Backend, metric: str) -> None:
        store = Store(backend, DIM, metric, SMALL)
        put(store, *({"id": n, "offset": n} for n in range(70)))
        finish(store)
        put(store, *({"id": n, "offset": 100 + n} for n in range(60, 140)))
        finish(store)
        put(store, *({"id": n, "offset": 300 + n} for n in range(135, 150)))
        put(store, *({"id": n, "offset": 500 + n, "cell": DELETED} for n in range(0, 150, 5)))
        kinds = [type(part.segment) for part in store.view.segments if part.live]
        assert kinds.count(Sealed) == 2
        assert len(kinds) == 3
        live = {id_: offset for id_, (_, offset, _) in versions(store).items()}
        matrix = np.array([vector_of(id_, offset) for id_, offset in live.items()])
        queries = np.array([vector_of("query", n) for n in range(6)])
        found = store.search(queries, 10)
        for query, rows, scores in zip(queries, found.rows, found.scores, strict=True):
            truth = ((matrix - query) ** 2).sum(axis=1) if metric == "l2" else matrix @ query
            order = np.argsort(truth if metric == "l2" else -truth)[:10]
            assert [row.id for row in rows] == [list(live)[at] for at in order]
            np.testing.assert_allclose(scores, truth[order], rtol=1e-4, atol=1e-5)

    def test_fewer_rows_than_asked_for(self, store: Store) -> None:
        assert store.search(np.zeros((2, DIM), dtype=np.float32), 3).rows == [[], []]
        assert store.search(np.zeros((0, DIM), dtype=np.float32), 3).rows == []
        put(store, *({"id": n, "offset": n} for n in range(64)))
        finish(store)
        put(store, {"id": "x", "offset": 100}, *({"id": n, "offset": 200 + n, "cell": DELETED} for n in range(62)))
        found = store.search(vector_of("x", 100)[None], 10)
        assert {row.id for row in found.rows[0]} == {"x", 62, 63}
        assert found.rows[0][0].id == "x"
        assert len(found.scores[0]) == 3

    def test_an_answer_carries_the_stamp_of_its_rows(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 1}, stamp={0: 2, 1: 7})
        assert store.search(vector_of("a", 1)[None], 1).stamp == {0: 2, 1: 7}
        assert store.get(["a"])[1] == {0: 2, 1: 7}
        put(store, {"id": "b", "offset": 2})
        assert store.view.stamp == {0: 2, 1: 7}
        store.stamp({0: 9})
        assert store.view.stamp == {0: 9}
        with pytest.raises(TypeError):
            store.view.stamp[0] = 10  # type: ignore[index]

    def test_a_view_stays_as_it_was(self, store: Store) -> None:
        put(store, *({"id": n, "offset": n, "cell": 1} for n in range(50)), stamp={0: 50})
        view = store.view
        scan = store.scan(vectors=True)
        first = next(scan)
        picture = [(part.alive.copy(), part.cells.copy()) for part in view.segments]
        put(store, *({"id": n, "offset": n, "cell": 3, "action": Action.KEEP} for n in range(40, 50)))
        put(store, *({"id": n, "offset": 100 + n, "cell": 2} for n in range(40)), stamp={0: 200})
        put(store, *({"id": n, "offset": 300 + n} for n in range(100, 1300)))
        finish(store)
        store.drop_cells(frozenset())
        assert (view.rows, dict(view.stamp)) == (50, {0: 50})
        for part, (alive, cells) in zip(view.segments, picture, strict=True):
            np.testing.assert_array_equal(part.alive, alive)
            np.testing.assert_array_equal(part.cells, cells)
        [part] = [part for part in view.segments if len(part.alive)]
        assert [part.segment.version(row)[1] for row in range(50)] == list(range(50))
        assert [row.offset for row in first] == list(range(50))
        queries = np.array([vector_of(n, n) for n in range(50)])
        _, rows = part.segment.search(part.alive, store._backend.xp.asarray(queries), 1, 64)
        assert rows[:, 0].tolist() == list(range(50)), "an older view no longer finds its rows"

    def test_sample(self, store: Store) -> None:
        assert store.sample(5).shape == (0, DIM)
        put(store, *({"id": n, "offset": n} for n in range(100)))
        finish(store)
        put(store, *({"id": n, "offset": n} for n in range(100, 150)))
        put(store, *({"id": n, "offset": 200 + n, "cell": DELETED} for n in range(0, 150, 2)))
        alive = {vector_of(n, n).tobytes() for n in range(1, 150, 2)}
        for size in (10, 40, 75, 1000):
            drawn = [vector.tobytes() for vector in store.sample(size, seed=3)]
            assert len(set(drawn)) == len(drawn), "drawn twice"
            assert set(drawn) <= alive
            assert min(size, 75) - 2 <= len(drawn) <= size
        assert {vector.tobytes() for vector in store.sample(1000)} == alive
        np.testing.assert_array_equal(store.sample(10, seed=3), store.sample(10, seed=3))
        assert not np.array_equal(store.sample(10, seed=3), store.sample(10, seed=4))

    def test_statistics(self, store: Store) -> None:
        put(
            store,
            *({"id": n, "offset": n, "attributes": {"x": n}} for n in range(64)),
            {"id": "d", "offset": 9, "cell": -1},
        )
        finish(store)
        put(store, {"id": "a", "offset": 100}, {"id": 0, "offset": 101, "cell": DELETED})
        told = store.statistics()
        assert (told["rows"], told["remembered"]) == (64, 2)
        assert told["segments"] == [
            {"kind": "sealed", "rows": 64, "live": 63},
            {"kind": "growing", "rows": 1, "live": 1},
        ]
        assert told["bytes"]["index"] >= 64 * DIM * 4
        assert told["bytes"]["vectors"] >= DIM * 4
        assert told["bytes"]["columns"] >= 64 * 20


class TestMaintenance:
    def test_a_full_growing_segment_is_sealed_and_several_are_merged(self, store: Store) -> None:
        assert not store.wants_maintenance()
        put(store, *({"id": n, "offset": n, "attributes": {"n": n}} for n in range(63)))
        assert not store.wants_maintenance()
        assert store.maintain() is False
        for start in range(63, 63 + 4 * 64, 64):
            put(store, *({"id": n, "offset": n, "attributes": {"n": n, "m": -n}} for n in range(start, start + 64)))
            assert store.wants_maintenance()
            finish(store)
            assert not store.wants_maintenance()
        kinds = [segment["kind"] for segment in store.statistics()["segments"]]
        assert kinds.count("growing") == 1
        assert kinds.count("sealed") < 4
        rows, _ = store.get([5, 100, 200], vectors=True)
        assert [row.attributes for row in rows if row] == [{"n": 5}, {"n": 100, "m": -100}, {"n": 200, "m": -200}]
        for row in rows:
            assert row is not None
            np.testing.assert_array_equal(row.vector, vector_of(row.id, row.offset))
        assert all(nearest(store, n, n) == n for n in range(0, 319, 7))

    def test_dead_rows_are_rewritten_away(self, store: Store) -> None:
        put(store, *({"id": n, "offset": n} for n in range(64)))
        finish(store)
        put(store, *({"id": n, "offset": 100 + n, "cell": DELETED} for n in range(32)))
        assert store.wants_maintenance()
        finish(store)
        assert [part["rows"] for part in store.statistics()["segments"]] == [32, 0]
        put(store, *({"id": n, "offset": 200 + n, "cell": DELETED} for n in range(64)))
        finish(store)
        assert [part["rows"] for part in store.statistics()["segments"]] == [0]
        assert store.view.rows == 0

    @pytest.mark.parametrize("merging", [False, True], ids=["seal", "merge"])
    def test_what_changes_during_a_build_is_carried_over(
        self, backend: Backend, merging: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = Store(backend, DIM, "cosine", SMALL)
        put(store, *({"id": n, "offset": n, "cell": 1} for n in range(64)))
        if merging:
            finish(store)
            put(store, *({"id": n, "offset": n, "cell": 1} for n in range(64, 128)))
            store.maintain()
            put(store, *({"id": n, "offset": n, "cell": 1} for n in range(128, 192)))
            store.maintain()
        build = backend.graph.build

        def meanwhile(*args: Any, **settings: Any) -> Any:
            index = build(*args, **settings)
            put(store, {"id": 3, "offset": 1003, "cell": 2})
            put(store, {"id": 4, "offset": 1004, "cell": DELETED})
            put(store, {"id": 5, "offset": 5, "cell": 9, "action": Action.KEEP})
            put(store, {"id": 6, "offset": 6, "action": Action.DROP}, {"id": "new", "offset": 1006, "cell": 2})
            put(store, {"id": 7, "offset": 7, "action": Action.DROP})
            put(store, {"id": 7, "offset": 7, "cell": 8})
            return index

        monkeypatch.setattr(backend.graph, "build", meanwhile)
        assert store.maintain()
        monkeypatch.undo()
        now = versions(store)
        assert (now[3], now[5], now["new"], now[7]) == ((0, 1003, 2), (0, 5, 9), (0, 1006, 2), (0, 7, 8))
        assert 4 not in now
        assert 6 not in now
        assert len(now) == (192 if merging else 64) - 2 + 1
        assert store.get([3])[0][0].offset == 1003  # type: ignore[union-attr]
        assert nearest(store, 3, 1003) == 3
        assert nearest(store, 4, 4) != 4
        put(store, {"id": 5, "offset": 2000})
        assert versions(store)[5] == (0, 2000, 0), "the place of a row was lost at the swap"

    def test_a_build_that_fails_loses_nothing_and_is_done_again(
        self, store: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(store, *({"id": n, "offset": n} for n in range(64)))

        def fails(*args: Any, **settings: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(backend.graph, "build", fails)
        with pytest.raises(MemoryError):
            store.maintain()
        monkeypatch.undo()
        assert nearest(store, 5, 5) == 5
        assert store.wants_maintenance()
        assert store.maintain()
        assert nearest(store, 5, 5) == 5


def run_together(seconds: float, *jobs: Callable[[], None]) -> None:
    """Run every job over and over, each in a thread, until the time is over or one has failed."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def loop(job: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                job()
        except BaseException as error:  # noqa: BLE001 - handed to the test below
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=loop, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


class TestNothingBlinks:
    def test_live_ids_are_always_found_once(self, backend: Backend) -> None:
        """Steady ids are searched for while they are upserted with the same vector, sealed, merged and relabelled."""
        store = Store(backend, DIM, "cosine", SMALL)
        steady = 40
        vectors = np.array([vector_of(n) for n in range(steady)])
        rng = np.random.default_rng(0)
        clock = iter(range(10**9))
        rounds = {"written": 0, "read": 0}

        def write() -> None:
            chosen = rng.choice(steady, 8, replace=False).tolist()
            offset = next(clock)
            filler = 1000 + offset % 200
            rows = [
                {"id": n, "offset": offset, "cell": offset % 3, "attributes": {f"a{offset % 50}": offset}}
                for n in chosen
            ]
            batch = batch_of([*rows, {"id": filler, "offset": offset, "cell": DELETED if offset % 5 == 0 else 1}])
            same = batch.vectors.copy()
            same[: len(chosen)] = vectors[chosen]
            store.apply(replace(batch, vectors=same), {0: offset + 1})
            rounds["written"] += 1

        def read() -> None:
            found = store.search(vectors, 5)
            for number, rows in enumerate(found.rows):
                ids = [row.id for row in rows]
                assert ids[0] == number, f"{number} was missed: {ids}"
                assert len(set(ids)) == len(ids), f"twice in one answer: {ids}"
                assert rows[0].offset < found.stamp[0], "a row newer than the stamp"
            got, stamp = store.get(range(steady))
            assert all(row is not None and row.offset < stamp[0] for row in got)
            rounds["read"] += 1

        for _ in range(100):
            write()
        run_together(1.5, write, read, lambda: finish(store))
        versions(store)
        # That all of it happened at the same time, on however slow a machine.
        assert rounds["written"] > 100
        assert rounds["read"] > 1
        assert any(isinstance(part.segment, Sealed) for part in store.view.segments)

    def test_no_row_is_lost_when_a_segment_freezes_while_maintenance_looks(self, backend: Backend) -> None:
        """Inserts only, so that every row ever written must be there in the end."""
        store = Store(backend, DIM, "cosine", replace(SMALL, seal_rows=8))
        clock = iter(range(10**9))
        written: list[int] = []

        def write() -> None:
            offset = next(clock)
            put(store, {"id": offset, "offset": offset}, stamp={0: offset + 1})
            written.append(offset)

        def look() -> None:
            view = store.view
            assert view.rows == view.stamp.get(0, 0), "rows and stamp are of two moments"

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            run_together(1.0, write, look, lambda: finish(store))
        finally:
            sys.setswitchinterval(interval)
        assert len(written) > 100
        assert sorted(versions(store)) == written
        assert all(row is not None for row in store.get(written)[0])
