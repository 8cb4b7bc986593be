"""The store: versions decide, nothing blinks, and what was seen once stays as it was."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.gpu import maintenance
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.calibrate import EXACT, Calibration
from headrace.gpu.errors import ConfigError, RecordError
from headrace.gpu.filters import parse
from headrace.gpu.ids import hash_ids, row_digests
from headrace.gpu.index_spec import KINDS, IndexSpec
from headrace.gpu.merge import MergePolicy
from headrace.gpu.rows import DELETED, Action
from headrace.gpu.segments import Sealed
from headrace.gpu.store import Applied, Store, StoreSettings
from tests.gpu.batches import DIM, batch_of, vector_of

BACKENDS = [pytest.param("host"), pytest.param("rapids", marks=pytest.mark.gpu)]
SMALL = StoreSettings(seal_rows=64, merge=MergePolicy(fan_in=3, tier=4.0, floor_rows=1, absorb=0))


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> Backend:
    return resolve(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def store_of(
    backend: Backend, ids: str = "integer", metric: str = "cosine", settings: StoreSettings = SMALL, kind: str = "graph"
) -> Store:
    return Store(backend, DIM, metric, settings, index=IndexSpec(kind, graph_degree=8, graph_effort=32), ids=ids)


@pytest.fixture
def store(backend: Backend) -> Store:
    """Its ids are texts."""
    return store_of(backend, "string")


@pytest.fixture
def numbers(backend: Backend) -> Store:
    """Its ids are integers."""
    return store_of(backend)


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
        before = len(store.view.segments[0].alive)
        assert put(store, {"id": "a", "offset": 1, "cell": 7, "action": action}) == Applied(0, 0, 0, ())
        assert versions(store) == {"a": (0, 1, 7), "b": (0, 2, 0)}
        assert len(store.view.segments[0].alive) == before, "the row was written again"

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
            store = store_of(backend, "string")
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

    def test_vectors_and_attributes_belong_to_the_rows_that_are_held(self, numbers: Store) -> None:
        store = numbers
        put(store, {"id": 4, "offset": 90})
        rows = [{"id": n, "offset": n, "attributes": {"n": n}, "cell": DELETED if n % 3 == 0 else 0} for n in range(10)]
        put(store, *rows)
        found, _ = store.get([1, 2, 4, 5, 8], vectors=True)
        assert [row and row.attributes for row in found] == [{"n": 1}, {"n": 2}, {}, {"n": 5}, {"n": 8}]
        for row in found:
            assert row is not None
            np.testing.assert_array_equal(row.vector, vector_of(row.id, row.offset))

    def test_a_growing_segment_grows(self, backend: Backend) -> None:
        store = store_of(backend, settings=replace(SMALL, seal_rows=10_000))
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

    def test_ids_come_back_as_they_were_given(self, store: Store, numbers: Store) -> None:
        put(store, {"id": "7", "offset": 1}, {"id": "", "offset": 2}, {"id": "\ud800\0é", "offset": 3})
        assert set(versions(store)) == {"7", "", "\ud800\0é"}
        put(numbers, {"id": 7, "offset": 1}, {"id": -(2**63), "offset": 2}, {"id": 2**63 - 1, "offset": 3})
        assert set(versions(numbers)) == {7, -(2**63), 2**63 - 1}
        assert all(type(row_id) is int for row_id in versions(numbers))

    def test_a_kind_of_ids_that_there_is_not(self, backend: Backend) -> None:
        with pytest.raises(ConfigError, match="'uuid': use 'string' or 'integer'"):
            store_of(backend, "uuid")

    def test_an_attribute_of_another_kind_changes_nothing(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 1, "attributes": {"n": 1}}, stamp={0: 2})
        with pytest.raises(RecordError):
            put(store, {"id": "a", "offset": 2, "attributes": {"n": "x"}}, {"id": "b", "offset": 3}, stamp={0: 4})
        assert versions(store) == {"a": (0, 1, 0)}
        assert store.view.stamp == {0: 2}
        put(store, {"id": "a", "offset": 2, "attributes": {"n": 7}})
        [row], _ = store.get(["a"])
        assert row is not None
        assert row.attributes == {"n": 7}


class TestReplay:
    @pytest.mark.parametrize("seal", [False, True], ids=["growing", "sealed"])
    def test_a_thousand_offsets_twice_and_out_of_order_equal_one_delivery(self, backend: Backend, seal: bool) -> None:
        log = log_of(1000, ids=150)
        once, often = store_of(backend, "string"), store_of(backend, "string")
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
        forward, backward = store_of(backend, "string"), store_of(backend, "string")
        put(forward, *rows, stamp={0: 200})
        for chunk in chunks(rows[::-1], 30):
            put(backward, *chunk)
        finish(backward)
        digests, stamp = forward.digests()
        assert digests == backward.digests()[0]
        assert stamp == {0: 200}
        mine = np.arange(1, 200, 3)
        hashes = hash_ids([f"r{n}" for n in mine], "string")
        truth = row_digests(hashes, np.zeros(67, dtype=np.int32), mine)
        assert digests[1] == (67, sum(truth.tolist()) % 2**64)
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

    def test_scan_of_some_cells(self, numbers: Store) -> None:
        store = numbers
        put(store, *({"id": number, "offset": number, "cell": number % 4} for number in range(150)))
        found = list(store.scan(frozenset([1, 3]), vectors=True, batch=10))
        assert max(map(len, found)) <= 10
        rows = [row for chunk in found for row in chunk]
        assert sorted(row.id for row in rows) == list(range(1, 150, 2))
        for row in rows:
            np.testing.assert_array_equal(row.vector, vector_of(row.id, row.offset))
        assert list(store.scan(frozenset())) == []


class TestForget:
    def test_only_deletions_below_stable_are_forgotten(self, numbers: Store) -> None:
        store = numbers
        count = 5000
        put(store, *({"id": n, "partition": n % 2, "offset": n, "cell": DELETED} for n in range(count)))
        assert store.statistics()["remembered"] == count
        store.forget({0: 1000, 1: 0})
        assert store.statistics()["remembered"] == count - 500
        put(store, {"id": 998, "partition": 0, "offset": 1}, {"id": 1000, "partition": 0, "offset": 1})
        put(store, {"id": 999, "partition": 1, "offset": 1})
        assert set(versions(store)) == {998}, "what is not stable everywhere must be remembered"

    def test_an_unknown_topic_partition_is_not_forgotten(self, numbers: Store) -> None:
        store = numbers
        put(store, *({"id": n, "partition": 3, "offset": n, "cell": DELETED} for n in range(5000)))
        store.forget({0: 10_000})
        assert store.statistics()["remembered"] == 5000


class TestReads:
    @pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
    def test_search_over_all_segments_agrees_with_a_full_sort(self, backend: Backend, metric: str, kind: str) -> None:
        store = store_of(backend, metric=metric, kind=kind)
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
            alone = store.search(query[None], 10)
            assert [row.id for row in alone.rows[0]] == [row.id for row in rows]
            np.testing.assert_allclose(alone.scores[0], scores, rtol=1e-4, atol=1e-5)

    def test_the_recall_target_sets_the_effort(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        store = store_of(backend)
        put(store, *({"id": n, "offset": n} for n in range(64)))
        finish(store)
        [sealed] = [part.segment for part in store.view.segments if isinstance(part.segment, Sealed)]
        sealed.calibration = Calibration(((16, 0.5), (32, 0.96), (64, 0.999)))
        efforts = []
        search = backend.kinds["graph"].search

        def watched(*args: Any, effort: int) -> Any:
            efforts.append(effort)
            return search(*args, effort=effort)

        monkeypatch.setattr(backend.kinds["graph"], "search", watched)
        query = vector_of("query")[None]
        store.search(query, 3)
        for target in (0.4, 0.99, 1.0):
            store.search(query, 3, recall_target=target)
        assert efforts == [32, 16, 57, EXACT]

    def test_fewer_rows_than_asked_for(self, numbers: Store) -> None:
        store = numbers
        assert store.search(np.zeros((2, DIM), dtype=np.float32), 3).rows == [[], []]
        assert store.search(np.zeros((0, DIM), dtype=np.float32), 3).rows == []
        put(store, *({"id": n, "offset": n} for n in range(64)))
        finish(store)
        put(store, {"id": -9, "offset": 100}, *({"id": n, "offset": 200 + n, "cell": DELETED} for n in range(62)))
        found = store.search(vector_of(-9, 100)[None], 10)
        assert {row.id for row in found.rows[0]} == {-9, 62, 63}
        assert found.rows[0][0].id == -9
        assert len(found.scores[0]) == 3

    def test_an_answer_carries_the_stamp_of_its_rows(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 1}, stamp={0: 2, 1: 7})
        assert store.search(vector_of("a", 1)[None], 1).stamp == {0: 2, 1: 7}
        assert store.get(["a"])[1].stamp == {0: 2, 1: 7}
        put(store, {"id": "b", "offset": 2})
        assert store.view.stamp == {0: 2, 1: 7}
        store.stamp({0: 9})
        assert store.view.stamp == {0: 9}
        with pytest.raises(TypeError):
            store.view.stamp[0] = 10  # type: ignore[index]

    def test_a_view_stays_as_it_was(self, numbers: Store) -> None:
        store = numbers
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
        assert part.segment.versions.offsets[:50].tolist() == list(range(50))
        assert [row.offset for row in first] == list(range(50))
        queries = np.array([vector_of(n, n) for n in range(50)])
        _, rows = part.segment.search(None, store.backend.xp.asarray(queries), 1, 1.0, 50)
        assert rows[:, 0].tolist() == list(range(50)), "an older view no longer finds its rows"

    def test_sample(self, numbers: Store) -> None:
        store = numbers
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

    def test_statistics(self, backend: Backend, kind: str) -> None:
        store = store_of(backend, kind=kind)
        rows = ({"id": n, "offset": n, "attributes": {"x": n}} for n in range(64))
        put(store, *rows, {"id": 70, "offset": 9, "cell": DELETED})
        finish(store)
        put(store, {"id": 71, "offset": 100}, {"id": 0, "offset": 101, "cell": DELETED})
        told = store.statistics()
        assert (told["rows"], told["remembered"]) == (64, 2)
        assert [{name: part[name] for name in ("kind", "index", "rows", "live")} for part in told["segments"]] == [
            {"kind": "sealed", "index": kind, "rows": 64, "live": 63},
            {"kind": "growing", "index": "exact", "rows": 1, "live": 1},
        ]
        sealed, growing = (part["bytes"] for part in told["segments"])
        assert sealed["vectors"] >= 64 * DIM * 4
        assert sealed["columns"] >= 64 * 8
        assert sealed["ids"] >= 64 * 8
        assert sealed["marks"] == 64 * 5
        assert sealed["versions"] == 64 * 20
        assert growing["vectors"] >= DIM * 4
        assert told["bytes"]["vectors"] == sealed["vectors"] + growing["vectors"]
        assert told["bytes"]["id map"] >= 66 * 16
        assert told["bytes"]["remembered"] >= 2 * 28
        memory = told["memory"]
        assert memory["held"] == sum(told["bytes"].values()) == memory["all"]
        assert (memory["limit"], memory["working"], memory["full"]) == (None, 0, False)

    def test_float16_halves_the_vectors(self, backend: Backend, kind: str) -> None:
        sizes = {}
        for dtype in ("float32", "float16"):
            index = IndexSpec(kind, dtype, graph_degree=8, graph_effort=32)
            store = Store(backend, DIM, "cosine", SMALL, index=index, ids="integer")
            put(store, *({"id": n, "offset": n} for n in range(64)))
            put(store, *({"id": n, "offset": n} for n in range(64, 100)))
            growing = store.statistics()["segments"][-1]["bytes"]["vectors"]
            finish(store)
            [sealed] = [part["bytes"] for part in store.statistics()["segments"] if part["kind"] == "sealed"]
            sizes[dtype] = growing, sealed["vectors"]
            rows, _ = store.get([5, 80], vectors=True)
            for row in rows:
                assert row is not None
                assert row.vector is not None
                assert row.vector.dtype == np.float32
                np.testing.assert_allclose(row.vector, vector_of(row.id, row.offset), atol=1e-3)
            assert all(nearest(store, n, n) == n for n in range(100))
        assert sizes["float16"] == tuple(size // 2 for size in sizes["float32"])

    def test_a_number_too_large_for_float16_changes_nothing(self, backend: Backend) -> None:
        store = Store(backend, DIM, "ip", SMALL, index=IndexSpec(dtype="float16"))
        batch = batch_of([{"id": "a", "offset": 1}])
        with pytest.raises(ValueError, match="70000, too large for float16"):
            store.apply(replace(batch, vectors=np.full((1, DIM), 7e4, dtype=np.float32)))
        assert versions(store) == {}

    @pytest.mark.parametrize("metric", ["cosine", "l2"])
    def test_only_some_cells(self, backend: Backend, kind: str, metric: str) -> None:
        store = store_of(backend, kind=kind, metric=metric)
        put(store, *({"id": n, "offset": n, "cell": n % 7} for n in range(70)))
        finish(store)
        put(store, *({"id": n, "offset": n, "cell": n % 7} for n in range(70, 120)))
        queries = np.array([vector_of("query", n) for n in range(4)])
        matrix = np.array([vector_of(n, n) for n in range(120)])
        truth = ((matrix[None] - queries[:, None]) ** 2).sum(axis=2) if metric == "l2" else -(queries @ matrix.T)
        for cells in ([3], [0, 6], range(7)):
            chosen = np.flatnonzero(np.isin(np.arange(120) % 7, list(cells)))
            found = store.search(queries, 9, cells=frozenset(cells))
            for rows, all_scores in zip(found.rows, truth, strict=True):
                assert [row.id for row in rows] == chosen[np.argsort(all_scores[chosen])[:9]].tolist()
        assert store.search(queries, 3, cells=frozenset([99])).rows == [[]] * 4
        assert store.search(queries, 3, cells=frozenset()).rows == [[]] * 4

    def test_a_filter_reads_the_columns_of_every_segment(self, backend: Backend, kind: str) -> None:
        store = store_of(backend, kind=kind)
        put(store, *({"id": n, "offset": n, "cell": n % 2, "attributes": {"price": n}} for n in range(64)))
        finish(store)
        rows = [{"id": n, "offset": n, "cell": n % 2, "attributes": {"brand": "ab"[n % 2]}} for n in range(64, 80)]
        put(store, *rows, {"id": 3, "offset": 100, "cell": DELETED})
        where = parse("price < 5 or brand == 'b'", {"price": "int", "brand": "str"})
        queries = np.array([vector_of("query", n) for n in range(3)])
        for found in store.search(queries, 50, where=where).rows:
            assert {row.id for row in found} == {0, 1, 2, 4, *range(65, 80, 2)}
        for found in store.search(queries, 50, where=where, cells=frozenset([0])).rows:
            assert {row.id for row in found} == {0, 2, 4}
        nothing = parse("price > 1000", {"price": "int"})
        assert store.search(queries, 50, where=nothing).rows == [[], [], []]


class TestMaintenance:
    def test_a_full_growing_segment_is_sealed_and_several_are_merged(self, backend: Backend, kind: str) -> None:
        store = store_of(backend, kind=kind)
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

    def test_dead_rows_are_rewritten_away(self, numbers: Store) -> None:
        store = numbers
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
        self, backend: Backend, merging: bool, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = store_of(backend, kind=kind)
        put(store, *({"id": n, "offset": n, "cell": 1} for n in range(64)))
        if merging:
            finish(store)
            put(store, *({"id": n, "offset": n, "cell": 1} for n in range(64, 128)))
            store.maintain()
            put(store, *({"id": n, "offset": n, "cell": 1} for n in range(128, 192)))
        build, extension = backend.kinds[kind].build, backend.kinds[kind].extension

        def meanwhile(index: Any) -> Any:
            put(store, {"id": 3, "offset": 1003, "cell": 2})
            put(store, {"id": 4, "offset": 1004, "cell": DELETED})
            put(store, {"id": 5, "offset": 5, "cell": 9, "action": Action.KEEP})
            put(store, {"id": 6, "offset": 6, "action": Action.DROP}, {"id": 900, "offset": 1006, "cell": 2})
            put(store, {"id": 7, "offset": 7, "action": Action.DROP})
            put(store, {"id": 7, "offset": 7, "cell": 8})
            return index

        def extending(index: Any) -> Any:
            extended = extension(index)
            return extended and (lambda *args, **settings: meanwhile(extended(*args, **settings)))

        monkeypatch.setattr(backend.kinds[kind], "build", lambda *args, **settings: meanwhile(build(*args, **settings)))
        monkeypatch.setattr(backend.kinds[kind], "extension", extending)
        assert store.maintain()
        monkeypatch.undo()
        now = versions(store)
        assert (now[3], now[5], now[900], now[7]) == ((0, 1003, 2), (0, 5, 9), (0, 1006, 2), (0, 7, 8))
        assert 4 not in now
        assert 6 not in now
        assert len(now) == (192 if merging else 64) - 2 + 1
        assert store.get([3])[0][0].offset == 1003  # type: ignore[union-attr]
        assert nearest(store, 3, 1003) == 3
        assert nearest(store, 4, 4) != 4
        put(store, {"id": 5, "offset": 2000})
        assert versions(store)[5] == (0, 2000, 0), "the place of a row was lost at the swap"

    @pytest.mark.parametrize("dropping", [False, True])
    def test_what_changes_before_all_places_are_entered(
        self, numbers: Store, dropping: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After the swap the map of ids still has the old places, until they have been entered piece by piece."""
        store = numbers
        put(store, *({"id": n, "offset": n, "cell": n % 2} for n in range(64)))
        monkeypatch.setattr(store._table.directory, "step", lambda count: False)
        assert store.maintain()
        monkeypatch.undo()
        store._table.directory.step(20)
        expected = {n: (0, n, n % 2) for n in range(64)}
        assert [row and row.offset for row in store.get(range(64))[0]] == list(range(64))
        if dropping:
            assert store.drop_cells(frozenset([1])) == 32
            expected = {n: (0, n, 1) for n in range(1, 64, 2)}
        changes = [{"id": n, "offset": 100 + n, "cell": 1} for n in range(0, 64, 3)]
        deletes = [{"id": n, "offset": 200 + n, "cell": DELETED} for n in range(0, 64, 7)]
        put(store, *changes)
        put(store, *deletes)
        expected |= {row["id"]: (0, row["offset"], 1) for row in changes}
        expected = {n: version for n, version in expected.items() if n % 7}
        assert versions(store) == expected
        assert {row.id for row in store.get(range(64))[0] if row} == set(expected)
        put(store, *({"id": n, "offset": n} for n in range(1000, 1064)))
        finish(store)
        put(store, *({"id": n, "offset": 300 + n, "cell": 1} for n in range(64)))
        expected = {n: (0, 300 + n, 1) for n in range(64)} | {n: (0, n, 0) for n in range(1000, 1064)}
        assert versions(store) == expected

    def test_applies_come_between_the_steps_of_entering_places(
        self, numbers: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, entered, steps = numbers, threading.Event(), []
        monkeypatch.setattr(maintenance, "_STEP", 1)
        put(store, *({"id": n, "offset": n} for n in range(500)))
        step = store._table.directory.step

        def slow(count: int) -> bool:
            entered.set()
            steps.append(count)
            time.sleep(0.002)
            return step(count)

        monkeypatch.setattr(store._table.directory, "step", slow)
        thread = threading.Thread(target=store.maintain)
        thread.start()
        assert entered.wait(30)
        for n in range(5):
            put(store, {"id": n, "offset": 1000 + n})
        assert len(steps) < 100, "five applies had to wait for most of it"
        monkeypatch.undo()
        thread.join()
        assert versions(store)[3] == (0, 1003, 0)

    def test_a_full_segment_is_sealed_while_a_merge_goes_on(
        self, numbers: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, kind = numbers, backend.kinds["graph"]
        merging, go_on, build = threading.Event(), threading.Event(), kind.build

        def slow(vectors: Any, *args: Any, **settings: Any) -> Any:
            if len(vectors) > 64:
                merging.set()
                assert go_on.wait(60)
            return build(vectors, *args, **settings)

        monkeypatch.setattr(kind, "build", slow)
        put(store, *({"id": n, "offset": n} for n in range(128)))
        thread = threading.Thread(target=store.maintain, kwargs={"settle": True})
        thread.start()
        assert merging.wait(60)
        assert not store.wants_maintenance(), "what is being rewritten is not wanted again"
        assert not store.maintain()
        put(store, *({"id": n, "offset": n} for n in range(128, 192)))
        put(store, {"id": 5, "offset": 1000})
        assert store.wants_maintenance()
        assert store.maintain()
        assert store.statistics()["rewriting"] > 0
        assert [one["kind"] for one in store.statistics()["segments"] if one["rows"] == 64].count("sealed") == 1
        go_on.set()
        thread.join()
        assert store.statistics()["rewriting"] == 0
        found = versions(store)
        assert sorted(found) == list(range(192))
        assert found[5] == (0, 1000, 0)
        assert found[130] == (0, 130, 0)

    def test_a_build_that_fails_loses_nothing_and_is_done_again(
        self, numbers: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = numbers
        put(store, *({"id": n, "offset": n} for n in range(64)))

        def fails(*args: Any, **settings: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(backend.kinds["graph"], "build", fails)
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


class TestSettling:
    def test_everything_becomes_one_segment(self, backend: Backend, kind: str) -> None:
        store = store_of(backend, kind=kind)
        put(store, *({"id": number, "offset": number} for number in range(100)))
        finish(store)
        put(store, *({"id": number, "offset": number} for number in range(100, 150)))
        put(store, {"id": 3, "offset": 200, "cell": DELETED, "action": Action.DROP})
        finish(store)
        assert len([part for part in store.view.segments if part.live]) > 1
        assert store.maintain(settle=True)
        (part,) = [part for part in store.view.segments if len(part.alive)]
        assert isinstance(part.segment, Sealed)
        assert part.live == store.view.rows == 149
        assert sorted(row.id for rows in store.scan() for row in rows) == [n for n in range(150) if n != 3]
        assert not store.maintain(settle=True), "it would be built again and again"
        put(store, {"id": 3, "offset": 300})
        assert [row and row.offset for row in store.get([3, 4])[0]] == [300, 4]

    def test_it_waits_for_a_rest(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        store = store_of(backend, settings=replace(SMALL, settle_after=10.0))
        put(store, *({"id": number, "offset": number} for number in range(50)))
        now = 1009.0
        assert not store.wants_maintenance()
        put(store, {"id": 7, "offset": 100})
        now = 1018.0
        assert not store.wants_maintenance(), "it was written to 9 s ago"
        store.stamp({0: 500})  # records of other cells
        now = 1020.0
        assert store.wants_maintenance()

    def test_it_waits_for_as_long_as_the_merge_would_take(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(maintenance, "_SECONDS_PER_ROW", 2.0)
        now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        store = store_of(backend, settings=replace(SMALL, settle_after=10.0))
        put(store, *({"id": number, "offset": number} for number in range(50)))
        now = 1099.0
        assert not store.wants_maintenance()
        now = 1101.0
        assert store.wants_maintenance()


class TestNothingBlinks:
    def test_live_ids_are_always_found_once(self, backend: Backend, kind: str) -> None:
        """Steady ids are searched for while they are upserted with the same vector, sealed, merged and relabelled."""
        store = store_of(backend, kind=kind)
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
            got, view = store.get(range(steady))
            assert all(row is not None and row.offset < view.stamp[0] for row in got)
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
        store = store_of(backend, settings=replace(SMALL, seal_rows=8))
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


class TestTheDoor:
    def test_what_cannot_be_asked(self, store: Store) -> None:
        put(store, {"id": "a", "offset": 0})
        query = vector_of("a")[None]
        for k in (0, -1, 1.5, True, None, "3"):
            with pytest.raises(ConfigError, match="ask for a whole number of rows"):
                store.search(query, k)  # type: ignore[arg-type]
        assert len(store.search(query, np.int64(3)).rows[0]) == 1  # type: ignore[arg-type]
        for target in (0, 1.5, -1, float("nan")):
            with pytest.raises(ConfigError, match="recall_target is"):
                store.search(query, 1, recall_target=target)
        for wrong in (query[0], query[:, 1:]):
            with pytest.raises(ValueError, match="queries have shape"):
                store.search(wrong, 1)

    def test_an_id_twice_in_one_batch(self, store: Store) -> None:
        with pytest.raises(RecordError, match="the id 'a' is in one batch twice"):
            put(store, {"id": "b", "offset": 0}, {"id": "a", "offset": 1}, {"id": "a", "offset": 2})
        assert store.view.rows == 0


class TestWhatIsPromised:
    def test_where_no_effort_reaches_the_target_the_search_is_exact_and_says_so(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        short = Calibration(((16, 0.5), (32, 0.8)))
        monkeypatch.setattr(maintenance, "calibrate", lambda *args, **more: short)
        monkeypatch.setattr("headrace.gpu.segments._FEW_ROWS", 100)
        settings = StoreSettings(seal_rows=4000, merge=MergePolicy(floor_rows=1))
        spec = IndexSpec("graph", graph_degree=2, graph_effort=2, recall_target=0.95)
        store = Store(resolve("host"), DIM, "l2", settings, index=spec, ids="integer")
        vectors = np.random.default_rng(0).normal(size=(3000, DIM)).astype(np.float32)
        store.apply(replace(batch_of([{"id": n, "offset": n} for n in range(3000)]), vectors=vectors))
        with caplog.at_level("WARNING", logger="headrace.gpu"):
            assert store.maintain(settle=True)
        [warning] = [record.getMessage() for record in caplog.records]
        assert "the highest effort tried, 32, reaches a recall of 0.800, not 0.95" in warning
        [segment] = [part for part in store.statistics()["segments"] if part["kind"] == "sealed"]
        assert (segment["recall"], segment["effort"], segment["reached"]) == (1.0, None, 0.8)
        queries = np.random.default_rng(1).normal(size=(60, DIM)).astype(np.float32)
        truth = np.argsort(((queries[:, None] - vectors[None]) ** 2).sum(axis=2), axis=1)[:, :10]

        def recall(target: float | None) -> float:
            found = [store.search(query[None], 10, recall_target=target).rows[0] for query in queries]
            pairs = zip(found, truth.tolist(), strict=True)
            return sum(len({row.id for row in rows} & set(best)) for rows, best in pairs) / truth.size

        assert recall(None) == 1
        assert recall(0.81) == 1
        assert recall(0.5) < 0.9

    def test_a_segment_that_reaches_it_tells_its_effort(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(maintenance, "calibrate", lambda *args, **more: Calibration(((16, 0.9), (32, 1.0))))
        store = store_of(resolve("host"))
        put(store, *({"id": n, "offset": n} for n in range(64)))
        assert store.maintain()
        segments = {part["kind"]: part for part in store.statistics()["segments"]}
        assert (segments["sealed"]["recall"], segments["sealed"]["effort"]) == (0.95, 24)
        assert (segments["growing"]["recall"], segments["growing"]["effort"]) == (1.0, None)
