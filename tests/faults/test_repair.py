"""A copy is damaged behind everybody's back: `verify` finds it, with ids, and mends it; and never cries wolf."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
import numpy as np
import pytest
from click.testing import CliRunner

import headrace
from headrace.cluster.compare import Heard
from headrace.cluster.correcting import Told, batch_of, header_without_rows
from headrace.cluster.replica import Replica
from headrace.cluster.worker import WorkerNode
from headrace.gpu.errors import ClusterError
from headrace.gpu.rows import Action
from headrace.gpu.store import Store
from headrace.pipeline import cli
from headrace.pipeline.cli_common import Session
from headrace.pipeline.mending import Mender
from headrace.streams.broker import EmbeddedBroker
from tests.faults import damage

DIM, ROWS, CELLS = 8, 300, 6
FAR = 1 << 40


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(DIM).astype(np.float32)


@pytest.fixture(scope="module")
def three() -> Iterator[headrace.Database]:
    """Three workers and two copies of each cell: for every cell somebody holds nothing of it."""
    with (
        dask.config.set({"headrace.codebook.min-rows": 200}),
        headrace.connect(workers=3, backend="host") as running,
    ):
        yield running


def settled(db: headrace.Database, docs: headrace.Collection) -> bool:
    """The codebook is trained, rows have moved, and all workers know it."""
    status, known = docs.status(), damage.replicas(db, docs.name).values()
    still = status["codebook"] == 1 and not status["moving"]
    return still and {one.state.epoch for one in known} == {status["epoch"]} and len(known) == 3


@pytest.fixture
def docs(three: headrace.Database, broker: EmbeddedBroker, topic: str) -> Iterator[headrace.Collection]:
    made = three.create_collection(topic, dim=DIM, cells=CELLS, replicas=2, metric="l2")
    made.ingest(broker.bootstrap)
    made.upsert([{"id": f"d{n}", "vector": vector(n), "n": n} for n in range(ROWS)], wait="searchable")
    made.upsert([{"id": f"d{n}", "vector": vector(n), "n": n} for n in range(ROWS, ROWS + 20)], wait="searchable")
    made.delete([f"d{n}" for n in range(ROWS, ROWS + 20)], wait="searchable")
    until = time.monotonic() + 20
    while not settled(three, made):
        assert time.monotonic() < until
        time.sleep(0.02)
    yield made
    three.drop_collection(topic)


class Copies:
    """The copies of one collection and what they hold."""

    def __init__(self, db: headrace.Database, docs: headrace.Collection) -> None:
        self.db, self.docs = db, docs
        self.stores = {address: one.store for address, one in damage.replicas(db, docs.name).items()}

    def holders(self, row_id: str) -> list[Store]:
        # Not at "session": a version of the future would be waited for by all later ones.
        row = self.docs.get([row_id], consistency="eventual")[0]
        assert row is not None
        return [self.stores[worker] for worker in self.docs.status()["placement"][row.cell]]

    def stranger(self, row_id: str) -> Store:
        """Somebody who is not to hold the id's row."""
        mine = self.holders(row_id)
        return next(store for store in self.stores.values() if store not in mine)

    def cell(self, row_id: str) -> int:
        row = self.docs.get([row_id])[0]
        assert row is not None
        return row.cell

    def version(self, row_id: str) -> tuple[int, int]:
        row = self.docs.get([row_id])[0]
        assert row is not None
        return row.topic_partition, row.offset

    def rows(self) -> dict[str, dict[Any, Any]]:
        """Everything that every worker holds."""
        return {
            address: {
                row.id: (
                    row.topic_partition,
                    row.offset,
                    row.cell,
                    row.attributes,
                    row.vector.tobytes(),
                )
                for rows in store.scan(vectors=True)
                for row in rows
                if row.vector is not None
            }
            for address, store in self.stores.items()
        }


def changed(before: dict[str, dict[Any, Any]], after: dict[str, dict[Any, Any]]) -> dict[Any, Any]:
    """What is not as it was."""
    pairs = {(worker, row_id) for rows in (before, after) for worker in rows for row_id in rows[worker]}
    both = {(worker, row_id): (before[worker].get(row_id), after[worker].get(row_id)) for worker, row_id in pairs}
    return {where: found for where, found in both.items() if found[0] != found[1]}


@pytest.fixture
def copies(three: headrace.Database, docs: headrace.Collection) -> Copies:
    return Copies(three, docs)


def lost(copies: Copies) -> str:
    damage.lose(copies.holders("d1")[0], "d1")
    return "lacks it"


def half_lost(copies: Copies) -> str:
    damage.lose(copies.holders("d1")[1], "d1", half=True)
    return "lacks it"


def older(copies: Copies) -> str:
    damage.age(copies.holders("d1")[0], "d1", -copies.version("d1")[1] - 1)
    return "instead of offset"


def too_new(copies: Copies) -> str:
    damage.age(copies.holders("d1")[1], "d1", FAR)
    return "where the log has no record"


def too_new_everywhere(copies: Copies) -> str:
    """No copy has the rightful version any more; only the log does."""
    for store in copies.holders("d1"):
        damage.age(store, "d1", FAR)
    table = copies.stranger("d1")._table
    with table.lock:
        table.remembered._limit = 0
        table.remembered.forget(dict.fromkeys(range(4), FAR))
    damage.age(copies.holders("d1")[0], "d1", 1)
    return "where the log has no record"


def wrong_but_in_the_log(copies: Copies) -> str:
    """A version that is another record's."""
    damage.age(copies.holders("d1")[0], "d1", 1)
    return "instead of offset"


def ghost(copies: Copies) -> str:
    damage.add(copies.holders("d1")[0], "ghost", cell=copies.cell("d1"), offset=0)
    return "lacks it"


def ghost_of_the_future(copies: Copies) -> str:
    damage.add(copies.holders("d1")[0], "ghost", cell=copies.cell("d1"), offset=FAR)
    return "where the log has no record"


def ghost_at_a_stranger(copies: Copies) -> str:
    damage.add(copies.stranger("d1"), "ghost", cell=copies.cell("d1"), offset=0)
    return ""


def stays_at_a_stranger(copies: Copies) -> str:
    store, (partition, offset) = copies.stranger("d1"), copies.version("d1")
    damage.add(store, "d1", cell=copies.cell("d1"), offset=offset + FAR, partition=partition)
    damage.age(store, "d1", -FAR)
    return "has a row too many"


def lost_delete(copies: Copies) -> str:
    """One copy has a row again that was deleted, and nobody remembers the deletion."""
    store = copies.holders("d1")[0]
    row_id = f"d{ROWS + 3}"
    for one in copies.stores.values():
        table = one._table
        with table.lock:
            table.remembered._limit = 0
            table.remembered.forget(dict.fromkeys(range(4), FAR))
    damage.add(store, row_id, cell=copies.cell("d1"), offset=0, partition=0)
    return "lacks it"


def believed_deleted(copies: Copies) -> str:
    partition, _ = copies.version("d1")
    damage.remember(copies.holders("d1")[0], "d1", offset=FAR, partition=partition)
    return "where the log has no record"


def other_cell(copies: Copies) -> str:
    store = copies.holders("d1")[1]
    mine = copies.docs.status()["placement"]
    address = next(address for address, one in copies.stores.items() if one is store)
    cell = next(cell for cell, workers in mine.items() if cell != copies.cell("d1") and address in workers)
    damage.relabel(store, "d1", cell)
    return "another copy in"


DAMAGES: list[Callable[[Copies], str]] = [
    lost,
    half_lost,
    older,
    too_new,
    too_new_everywhere,
    wrong_but_in_the_log,
    ghost,
    ghost_of_the_future,
    ghost_at_a_stranger,
    stays_at_a_stranger,
    lost_delete,
    believed_deleted,
    other_cell,
]


@pytest.mark.parametrize("hurt", DAMAGES, ids=lambda hurt: hurt.__name__)
def test_damage_is_found_and_mended_and_nothing_else_is_changed(copies: Copies, hurt: Callable[[Copies], str]) -> None:
    before = copies.rows()
    fault = hurt(copies)
    assert changed(before, copies.rows())
    found = copies.docs.verify()
    assert not found.ok
    assert found.differing == 1, found
    assert found.repaired == 0
    (one,) = found.ids
    assert one.id in ("d1", "ghost", f"d{ROWS + 3}")
    assert any(fault in text for text in one.copies.values()), one
    assert len(found.differences) == 1
    assert copies.docs.verify().ids == found.ids, "looking changes nothing"
    mended = copies.docs.verify(repair=True)
    assert (mended.ok, mended.differing, mended.repaired) == (True, 1, 1), mended
    assert not changed(before, copies.rows())
    for store in copies.stores.values():
        assert store.view.rows == sum(store.cell_sizes().values())
    assert copies.docs.verify() == headrace.Verification(True, CELLS, 2 * CELLS)


def test_a_session_that_was_shown_a_version_of_the_future_goes_on_after_the_repair(copies: Copies) -> None:
    damage.age(copies.holders("d1")[1], "d1", FAR)
    until_shown = itertools.takewhile(lambda row: row.offset < FAR, iter(lambda: copies.docs.get(["d1"])[0], None))
    assert len(list(until_shown)) < 1000
    with pytest.raises(headrace.ConsistencyTimeout):
        copies.docs.get(["d1"], deadline=0.5)
    assert copies.docs.verify(repair=True).repaired == 1
    assert copies.docs.get(["d1", "d2"], deadline=5.0)[1] is not None


def test_a_vector_that_is_damaged_is_seen_by_a_deep_look_only(copies: Copies) -> None:
    before = copies.rows()
    damage.bend(copies.holders("d7")[0], "d7")
    assert copies.docs.verify().ok
    found = copies.docs.verify(deep=True)
    assert [one.id for one in found.ids] == ["d7"]
    assert "has another vector than" in next(iter(found.ids[0].copies.values()))
    mended = copies.docs.verify(deep=True, repair=True)
    assert (mended.ok, mended.repaired) == (True, 1), mended
    assert not changed(before, copies.rows())


def test_where_the_log_was_cut_the_copies_decide(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = Mender._bounds

    def cut(mender: Mender) -> tuple[dict[int, int], dict[int, int]]:
        _, ends = bounds(mender)
        return ends, ends

    monkeypatch.setattr(Mender, "_bounds", cut)
    before = copies.rows()
    lost(copies)
    damage.age(copies.holders("d2")[0], "d2", -copies.version("d2")[1] - 1)
    mended = copies.docs.verify(repair=True)
    assert (mended.ok, mended.differing, mended.repaired) == (True, 2, 2), mended
    assert not changed(before, copies.rows())
    damage.bend(copies.holders("d7")[0], "d7")
    told = copies.docs.verify(deep=True, repair=True)
    assert (told.ok, told.differing, told.repaired) == (False, 1, 0)
    assert "nobody knows which copy is right" in told.differences[0]


def test_deletions_are_remembered_while_copies_are_mended(copies: Copies) -> None:
    """The record that is read may have been deleted by the time it arrives."""
    one = next(iter(damage.replicas(copies.db, copies.docs.name).values()))
    copies.docs.delete(["d5"], wait="searchable")
    one.store._table.remembered._limit = 0
    one.remember(30.0)
    one.apply(None, {}, dict.fromkeys(range(4), FAR), one.state.epoch)
    (heard,), _ = one.store.heard(["d5"])
    assert heard is not None
    one._remembering_until = 0.0
    one.apply(None, {}, dict.fromkeys(range(4), FAR), one.state.epoch)
    (heard,), _ = one.store.heard(["d5"])
    assert heard is None
    empty = header_without_rows(["d5"], [None], DIM)
    batch = batch_of(empty, [Told(0, Action.DROP, Heard(0, 0, 0, 0))])
    with pytest.raises(ClusterError, match="takes no mended rows"):
        one.apply(batch, {}, {}, one.state.epoch)


def test_many_ids_are_counted_and_the_first_hundred_shown(copies: Copies) -> None:
    before = copies.rows()
    store = copies.holders("d1")[0]
    mine = [row.id for rows in store.scan() for row in rows]
    for row_id in mine:
        damage.lose(store, row_id)
    assert store.view.rows == 0
    found = copies.docs.verify()
    assert (found.differing, len(found.ids)) == (len(mine), min(100, len(mine)))
    mended = copies.docs.verify(repair=True, deadline=30)
    assert (mended.ok, mended.repaired) == (True, len(mine)), mended
    assert not changed(before, copies.rows())


def revived(copies: Copies) -> str:
    store = copies.holders("d1")[0]
    part, row = damage.place_of(store, "d1")
    copies.docs.delete(["d1"], wait="searchable")
    damage.revive(store, part, row)
    return "does not know of"


def doubled(copies: Copies) -> str:
    damage.double(copies.holders("d1")[0], "d1")
    return "answers with two rows of it"


def doubled_in_another_cell(copies: Copies) -> str:
    store, mine = copies.holders("d1")[1], copies.docs.status()["placement"]
    address = next(address for address, one in copies.stores.items() if one is store)
    cell = next(cell for cell, workers in mine.items() if cell != copies.cell("d1") and address in workers)
    damage.double(store, "d1", cell)
    return "does not know of"


@pytest.mark.parametrize("hurt", [revived, doubled, doubled_in_another_cell], ids=lambda hurt: hurt.__name__)
def test_rows_that_answer_and_should_not_are_found_and_mended(copies: Copies, hurt: Callable[[Copies], str]) -> None:
    before = copies.rows()
    fault = hurt(copies)
    found = copies.docs.verify()
    assert not found.ok
    assert found.differing == 1, found
    (one,) = found.ids
    assert one.id == "d1"
    assert any(fault in text for text in one.copies.values()), one
    mended = copies.docs.verify(repair=True)
    assert (mended.ok, mended.differing, mended.repaired) == (True, 1, 1), mended
    if hurt is not revived:
        assert not changed(before, copies.rows())
    answered = [hit.id for hit in copies.docs.search(vector(1), limit=2 * ROWS)]
    assert len(answered) == len(set(answered)) == ROWS - (hurt is revived)
    for store in copies.stores.values():
        rows = [row.id for some in store.scan() for row in some]
        assert len(rows) == len(set(rows)) == store.view.rows
        while store.maintain(settle=True):
            pass
    assert copies.docs.verify() == headrace.Verification(True, CELLS, 2 * CELLS)


class Writing:
    """Upserts and deletes as fast as they go, until the block ends."""

    def __init__(self, docs: headrace.Collection, first: int) -> None:
        self.docs, self.first, self.written = docs, first, 0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def _run(self) -> None:
        rng = np.random.default_rng(self.first)
        while not self._stop.is_set():
            numbers = rng.integers(self.first, ROWS, 20).tolist()
            self.docs.upsert([{"id": f"d{n}", "vector": rng.standard_normal(DIM)} for n in sorted(set(numbers))])
            self.docs.delete([f"d{n}" for n in sorted(set(numbers[:5]))])
            self.written += len(numbers)

    def __enter__(self) -> Writing:
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._running.result()


def test_under_load_healthy_copies_never_differ(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, rng = WorkerNode._begun, np.random.default_rng(0)

    async def later(self: WorkerNode, collection: str, incarnation: int) -> Replica | None:
        """Batches arrive late, and one before the other."""
        await asyncio.sleep(float(rng.exponential(0.01)))
        return await begun(self, collection, incarnation)

    monkeypatch.setattr(WorkerNode, "_begun", later)
    looks = 0
    with Writing(copies.docs, 0) as writing:
        until = time.monotonic() + 4
        while time.monotonic() < until:
            for store in copies.stores.values():  # nobody may rely on what is remembered
                store._table.remembered._limit = 0
            found = copies.docs.verify(deep=looks % 3 == 2)
            assert found.ok, found
            assert found.differing == 0
            looks += 1
    assert looks > 5
    assert writing.written > 100
    assert copies.docs.verify().ok


def test_under_load_damage_is_mended_and_no_write_is_lost(copies: Copies) -> None:
    docs = copies.docs
    with Writing(docs, 50):
        for number, hurt in enumerate([lost, too_new, older, believed_deleted, ghost, ghost_of_the_future]):
            hurt(copies)
            mended = docs.verify(repair=True, deadline=30)
            assert mended.ok, (hurt, mended)
            assert mended.repaired == mended.differing >= 1, (number, mended)
    live = docs.count(consistency="strong")
    assert docs.verify(deep=True).ok
    assert docs.count() == live
    assert docs.get(["ghost"]) == [None]
    row = docs.get(["d1"], vectors=True)[0]
    assert row is not None
    assert row.vector is not None
    np.testing.assert_array_equal(row.vector, vector(1))


def test_the_command_tells_and_mends(copies: Copies) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        given = ["verify", copies.docs.name, "--cluster", copies.db.address, *arguments]
        result = CliRunner().invoke(cli.commands, given, obj=Session(), standalone_mode=False)
        assert result.exception is None, result.exception
        return result.return_value, result.stdout

    damage.lose(copies.holders("d1")[0], "d1")
    code, text = run()
    assert code == 1
    assert "d1" in text
    assert "lacks it" in text
    code, text = run("--repair", "--json")
    told = json.loads(text)
    assert (code, told["ok"], told["repaired"], told["ids"][0]["id"]) == (0, True, 1, "d1")
    assert run()[0] == 0
