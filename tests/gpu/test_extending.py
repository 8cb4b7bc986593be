"""Indexes that take in more rows, and stores that add to them what waits for its index."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.gpu.backend import Backend
from headrace.gpu.index_spec import DTYPES, KINDS, IndexSpec, build_params
from headrace.gpu.merge import MergePolicy
from headrace.gpu.rows import DELETED
from headrace.gpu.segments import Sealed
from headrace.gpu.store import Store, StoreSettings
from tests.gpu.batches import DIM, batch_of, vector_of
from tests.gpu.searches import METRICS, check_search, clustered, on_host

SETTINGS = StoreSettings(seal_rows=64, merge=MergePolicy(fan_in=3, tier=4.0, floor_rows=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_with_more_rows_is_as_good_as_one_built_of_all(
    backend: Backend, kind: str, metric: str, dtype: str, tmp_path: Path
) -> None:
    xp, module = backend.xp, backend.kinds[kind]
    vectors, queries = clustered(3000, 16, metric)
    kept, everything = vectors.astype(dtype), np.ones(len(vectors), dtype=bool)
    params = build_params(IndexSpec(kind=kind, dtype=dtype), *vectors.shape)
    index = module.build(xp.asarray(kept[:2000]), metric, params)
    extended = module.extension(index)
    if extended is None:
        assert (backend.name, kind) != ("host", "graph")
        return
    before = module.search(index, None, xp.asarray(queries), 10, effort=64)
    larger = extended(xp.asarray(kept[2000:]))
    module.save(larger, tmp_path / "index")
    for one in (larger, module.load(tmp_path / "index")):
        answer = tuple(map(on_host, module.search(one, None, xp.asarray(queries), 10, effort=64)))
        assert check_search(answer, kept, everything, queries, 10, metric, exact=False) >= 0.98
        np.testing.assert_array_equal(on_host(module.vectors(one, xp.arange(3000))), kept.astype(np.float32))
    for was, now in zip(before, module.search(index, None, xp.asarray(queries), 10, effort=64), strict=True):
        np.testing.assert_array_equal(on_host(was), on_host(now))
    assert extended(xp.asarray(kept[:0])) is index, "nothing to add, nothing to copy"


@pytest.fixture
def store(backend: Backend) -> Store:
    return Store(
        backend, DIM, "cosine", SETTINGS, index=IndexSpec("graph", graph_degree=8, graph_effort=32), ids="integer"
    )


def put(store: Store, *rows: dict[str, Any]) -> None:
    store.apply(batch_of(rows))


def upserts(first: int, last: int, offset: int = 0) -> list[dict[str, Any]]:
    return [{"id": n, "offset": offset + n, "cell": n % 5} for n in range(first, last)]


def sealed(store: Store) -> list[tuple[int, int]]:
    """Rows and live rows of each sealed segment."""
    return [(len(part.alive), part.live) for part in store.view.segments if isinstance(part.segment, Sealed)]


def check(store: Store, offsets: dict[int, int]) -> None:
    """These ids, in these versions, are all that there is, and each is found by its own vector."""
    rows = [row for chunk in store.scan() for row in chunk]
    assert {row.id: row.offset for row in rows} == offsets
    assert len(rows) == len(offsets)
    found, _ = store.get(sorted(offsets), vectors=True)
    assert [row.offset for row in found if row] == [offsets[id_] for id_ in sorted(offsets)]
    for row in found:
        assert row is not None
        np.testing.assert_array_equal(row.vector, vector_of(row.id, row.offset))
    queries = np.stack([vector_of(id_, offset) for id_, offset in offsets.items()])
    assert [rows[0].id for rows in store.search(queries, 1, recall_target=1.0).rows] == list(offsets)


def extends(store: Store) -> bool:
    return any(isinstance(part.segment, Sealed) and part.segment.extends for part in store.view.segments)


@pytest.fixture
def begun(store: Store) -> Store:
    """Its first 64 rows lie behind a graph that can take in more."""
    put(store, *upserts(0, 64))
    assert store.maintain()
    if not extends(store):
        pytest.skip("this backend builds anew")
    return store


def before_adding(monkeypatch: pytest.MonkeyPatch, backend: Backend, do: Callable[[], object]) -> None:
    """Have something done when rows are about to be added to a graph."""
    kind = backend.kinds["graph"]
    extension = kind.extension

    def watched(index: Any) -> Any:
        extended = extension(index)
        return lambda *args, **settings: (do(), extended(*args, **settings))[1]

    monkeypatch.setattr(kind, "extension", watched)


def test_what_waits_is_added_to_a_segment_and_dead_rows_stay_until_they_are_many(begun: Store) -> None:
    store = begun
    put(store, *upserts(5, 10, 1000), {"id": 12, "offset": 1012, "cell": DELETED})
    put(store, *upserts(64, 123))
    assert store.maintain()
    assert sealed(store) == [(128, 122)]
    offsets = {n: n for n in range(123) if n != 12} | {n: 1000 + n for n in range(5, 10)}
    check(store, offsets)
    put(store, {"id": 12, "offset": 2012}, *upserts(30, 60, 2000), *upserts(200, 233))
    assert store.maintain()
    assert sorted(sealed(store)) == [(64, 64), (128, 92)], "too many of the old one's rows are dead"
    offsets |= {12: 2012} | {n: 2000 + n for n in range(30, 60)} | {n: n for n in range(200, 233)}
    check(store, offsets)
    put(store, {"id": 90, "offset": 2090}, {"id": 91, "offset": 2091}, {"id": 92, "offset": 2092})
    offsets |= {90: 2090, 91: 2091, 92: 2092}
    assert store.maintain()
    assert sorted(sealed(store)) == [(64, 64), (89, 89)]
    assert store.maintain(settle=True)
    assert sealed(store) == [(156, 156)]
    check(store, offsets)


def test_what_changes_while_rows_are_added_is_carried_over(
    begun: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun
    put(store, {"id": 3, "offset": 900, "cell": DELETED}, *upserts(64, 128))

    def meanwhile() -> None:
        put(store, {"id": 3, "offset": 1003}, {"id": 4, "offset": 1004, "cell": DELETED})
        put(store, {"id": 70, "offset": 1070}, {"id": 71, "offset": 1071, "cell": DELETED})

    before_adding(monkeypatch, backend, meanwhile)
    assert store.maintain()
    monkeypatch.undo()
    assert sealed(store) == [(128, 124)]
    offsets = {n: n for n in range(128) if n not in (4, 71)} | {3: 1003, 70: 1070}
    check(store, offsets)


def test_one_more_waits_while_rows_are_added_and_two_do_not(
    begun: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, adding, go_on = begun, threading.Event(), threading.Event()
    put(store, *upserts(64, 128))
    before_adding(monkeypatch, backend, lambda: (adding.set(), go_on.wait(60)))
    thread = threading.Thread(target=store.maintain)
    thread.start()
    assert adding.wait(60)
    monkeypatch.undo()
    put(store, *upserts(128, 192))
    assert not store.wants_maintenance()
    assert not store.maintain()
    put(store, *upserts(192, 256))
    assert store.wants_maintenance()
    assert store.maintain()
    assert sorted(sealed(store)) == [(64, 64), (128, 128)]
    go_on.set()
    thread.join()
    put(store, *upserts(256, 320))
    assert store.maintain()
    check(store, {n: n for n in range(320)})
    assert sorted(sealed(store)) == [(128, 128), (192, 192)]


def test_a_few_rows_added_to_many_do_not_say_how_long_a_row_takes(backend: Backend) -> None:
    store = Store(backend, DIM, "cosine", StoreSettings(seal_rows=4096), index=IndexSpec("graph"), ids="integer")
    put(store, *upserts(0, 4096))
    assert store.maintain()
    before = store._maintenance._seconds_per_row
    put(store, *upserts(4096, 4196))
    assert store.maintain(settle=True)
    assert store._maintenance._seconds_per_row == before
    put(store, *upserts(4196, 4396))
    assert store.maintain(settle=True)
    assert store._maintenance._seconds_per_row != before


def test_nothing_blinks_while_rows_are_added(store: Store) -> None:
    put(store, *upserts(0, 64))
    offsets = {n: n for n in range(64)}
    failed: list[BaseException] = []
    done = threading.Event()

    def maintain() -> None:
        try:
            while not done.is_set():
                store.maintain()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    threads = [threading.Thread(target=maintain) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(1, 40):
            rows = [{"id": n, "offset": 1000 * turn + n} for n in range(turn, 64 + 16 * turn, 3)]
            put(store, *rows)
            offsets |= {row["id"]: row["offset"] for row in rows}
            asked = list(offsets)[:: max(1, len(offsets) // 40)]
            queries = np.stack([vector_of(id_, offsets[id_]) for id_ in asked])
            found = store.search(queries, 1, recall_target=1.0)
            assert [(one[0].id, one[0].offset) for one in found.rows] == [(id_, offsets[id_]) for id_ in asked]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failed
    check(store, offsets)
