"""What the recorder writes down is what was done, from any number of threads, and the checker can judge it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.gpu.errors import ConsistencyTimeout
from tests.history.checker import check_all
from tests.history.digests import value_digest
from tests.history.events import History, Produced
from tests.history.histories import invariants
from tests.history.recorder import Recorder


class Dictionary:
    """A right collection in one dictionary, with the calls of a Collection."""

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}
        self.end, self.lock = 0, threading.Lock()

    def upsert(self, rows: list[dict[str, Any]], **_: Any) -> Any:
        acks = []
        with self.lock:
            for row in rows:
                attributes = {**{k: v for k, v in row.items() if k != "id"}, "absent": None}
                self.rows[row["id"]] = SimpleNamespace(
                    id=row["id"], topic_partition=0, offset=self.end, cell=0, score=1.0, attributes=attributes
                )
                acks.append((row["id"], 0, self.end))
                self.end += 1
        return SimpleNamespace(acks=tuple(acks))

    def delete(self, ids: list[int], **_: Any) -> Any:
        with self.lock:
            acks = tuple((id, 0, self.end + i) for i, id in enumerate(ids))
            self.end += len(ids)
            for id in ids:
                self.rows.pop(id, None)
        return SimpleNamespace(acks=acks)

    def get(self, ids: list[int], **options: Any) -> Any:
        if options.get("deadline") == 0:
            raise ConsistencyTimeout("offset 5 of topic partition 0 was missing")
        return [self.rows.get(id) for id in ids]

    def search(self, query: str | list[str], **_: Any) -> Any:
        return [self.rows_now()] * len(query) if isinstance(query, list) else self.rows_now()

    def rows_now(self) -> Any:
        class Hits(list[Any]):
            offsets: dict[int, int]

        with self.lock:
            hits = Hits(self.rows.values())
            hits.offsets = {0: self.end}
        return hits

    def scan(self, worker: str = "") -> Any:
        return list(self.rows.values())

    def status(self) -> dict[str, Any]:
        return {"workers": [{"address": "w", "watermarks": {0: self.end}, "state": "active"}]}

    def verify(self) -> Any:
        return SimpleNamespace(ok=True, differences=[])


def test_the_recorder_notes_a_run_of_several_threads(tmp_path: Any) -> None:
    recorder, store = Recorder(seed=3, command="pytest here"), Dictionary()

    def client(name: int) -> None:
        mine = recorder.wrap(store, f"client {name}")
        for turn in range(10):
            mine.upsert([{"id": name, "price": turn}, {"id": name, "price": turn + 0.5}], wait="searchable")
            mine.get([name, 99])
            mine.search(["a", "b"], exhaustive=True)
            if turn % 3 == 0:
                mine.delete([name])

    threads = [threading.Thread(target=client, args=(name,)) for name in range(3)]
    with recorder.sampling(store, lambda: {0: 0}, every=0.001), recorder.fault("nothing"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    recorder.sample(store, lambda: {0: store.end})
    with pytest.raises(ConsistencyTimeout):
        recorder.wrap(store).get([1], deadline=0)
    recorder.wrap(store, "last").upsert([{"id": 50, "price": 1}])
    recorder.final_state(store, replicas=1)
    recorder.save(tmp_path / "run.jsonl")
    report = check_all(History.load(tmp_path / "run.jsonl"))
    assert report.ok, str(report)
    assert report.figures["failed_reads"] == 1
    assert report.figures["fault_count"] == 60
    store.rows[50].attributes["price"] = 2
    recorder.final_state(store, replicas=1)
    store.rows.pop(50)
    recorder.wrap(store, "last").get([50])
    assert {v.invariant for v in check_all(recorder.history()).violations} == {"I2", "promise"}


def test_a_write_that_failed_is_noted_as_unsure() -> None:
    class Broken(Dictionary):
        def upsert(self, rows: list[dict[str, Any]], **options: Any) -> Any:
            super().upsert(rows[:1])
            raise ConsistencyTimeout("no answer")

    recorder, store = Recorder(), Broken()
    with pytest.raises(ConsistencyTimeout):
        recorder.wrap(store).upsert([{"id": 1}, {"id": 2}])
    assert [e.acked_at for e in recorder.history().events if isinstance(e, Produced)] == [None, None]
    recorder.final_state(store)
    assert check_all(recorder.history()).ok is False  # nothing is known to be there: not enough to judge by
    assert not invariants(list(recorder.history().events), required=())


def test_a_value_digest_ignores_what_storage_may_change() -> None:
    assert value_digest({"id": 1, "a": 1, "b": None, "vector": [1]}) == value_digest({"a": 1.0, "c": float("nan")})
    assert len({value_digest({"a": value}) for value in (1, True, "1", 2)}) == 4
