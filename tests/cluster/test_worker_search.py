"""What a worker answers to a search: filtered, gathered with others of its kind, never of a state that has passed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headrace.cluster import holding
from headrace.cluster.planning import adopt_codebook, settle
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.cluster.wire import floats_to_wire, rows_from_wire
from headrace.cluster.worker import WorkerNode
from headrace.gpu.errors import ClusterError, FilterError, StaleEpoch
from headrace.gpu.filters import parse
from headrace.gpu.ids import hash_ids
from headrace.gpu.rows import Action
from headrace.pipeline.answers import size_of
from tests.gpu.batches import DIM, batch_of, vector_of

STATE = CollectionState(
    CollectionSpec("docs", DIM), first_codebook(DIM), epoch=1, members={"w": "active"}, copies={0: ("w",)},
    serving={0: ("w",)},
)  # fmt: skip


class Node(WorkerNode):
    """A worker without a cluster."""

    async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]:
        return {}


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    made = Node("host")
    worker = SimpleNamespace(address="w", handlers={})
    await made.setup(worker)
    await made.adopt(STATE)
    rows = [{"id": f"r{n}", "offset": n, "attributes": {"n": n, "even": n % 2 == 0}} for n in range(20)]
    made.replicas["docs"].apply(batch_of(rows), {0: (0, 20)}, {}, 1)
    yield made
    await made.teardown(worker)


async def asked(node: Node, *numbers: int, where: str | None = None, limit: int = 3, epoch: int = 1) -> dict[str, Any]:
    queries = np.stack([vector_of(f"r{number}", number) for number in numbers])
    sent = where and parse(where, {"n": "int", "even": "bool"}).to_wire()
    return await node.on_search("docs", epoch, floats_to_wire(queries), limit, [], 1.0, where=sent)


def ids(answer: dict[str, Any]) -> list[list[Any]]:
    return [[row.id for row in rows_from_wire(rows) if row] for rows in answer["rows"]]


async def test_a_search_is_filtered_though_the_workers_own_schema_is_older(node: Node) -> None:
    assert node.replicas["docs"].state.schema == {}
    assert [found[0] for found in ids(await asked(node, 3, 4))] == ["r3", "r4"]
    assert sorted(ids(await asked(node, 3, where="n > 17 or n is None"))[0]) == ["r18", "r19"]
    count = await node.on_count("docs", 1, [], 1.0, where=parse("even", {"even": "bool"}).to_wire())
    assert count["cell_sizes"] == [[0, 10]]
    assert count["ids"] is None
    assert (count["applied"], count["moved"]) == ([[0, 20]], [])


async def test_while_rows_get_other_cells_a_count_says_whose_they_are(node: Node) -> None:
    replica = node.replicas["docs"]
    replica.state = adopt_codebook(replica.state, np.eye(2, DIM, dtype=np.float32))
    even = parse("even", {"even": "bool"}).to_wire()
    count = await node.on_count("docs", replica.state.epoch, [], 1.0, where=even)
    assert set(np.frombuffer(count["ids"], "<u8")) == set(hash_ids([f"r{n}" for n in range(0, 20, 2)], "string"))
    # Rows that are about to be dropped are not counted.
    replica.state = settle(replica.state)
    assert (await node.on_count("docs", replica.state.epoch, [], 1.0))["cell_sizes"] == []


async def test_what_a_stranger_sends_is_refused(node: Node) -> None:
    for wire in ({"text": "n <", "kinds": {}}, {"text": "n < 3", "kinds": {"n": "object"}}, {"text": "n", "kinds": {}}):
        with pytest.raises(FilterError):
            await node.on_search("docs", 1, floats_to_wire(np.ones((1, DIM), np.float32)), 3, [], 1.0, where=wire)
    with pytest.raises(FilterError, match="'n' holds int"):
        await node.on_search(
            "docs", 1, floats_to_wire(np.ones((1, DIM), np.float32)), 3, [], 1.0,
            where={"text": "n == 'a'", "kinds": {"n": "str"}},
        )  # fmt: skip


async def test_many_at_once_are_gathered_by_kind_and_answered_apart(node: Node) -> None:
    calls = [asked(node, n % 20, limit=1 + n % 2, where="even" if n % 3 == 0 else None) for n in range(60)]
    for number, answer in enumerate(await asyncio.gather(*calls)):
        (found,) = ids(answer)
        assert len(found) == 1 + number % 2
        if number % 3:
            assert found[0] == f"r{number % 20}"
        else:
            assert all(int(each[1:]) % 2 == 0 for each in found)
    assert node._gatherer.queries == 60
    assert node._gatherer.searches < 20


async def test_no_queries_have_no_answers_but_a_place(node: Node) -> None:
    answer = await node.on_search("docs", 1, floats_to_wire(np.empty((0, DIM), np.float32)), 3, [], 1.0)
    assert (answer["rows"], answer["scores"]) == ([], [])
    assert answer["applied"] == [[0, 20]]


async def test_an_answer_of_a_state_that_has_passed_is_not_given(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = node._searched

    async def meanwhile(sought: Any, queries: Any) -> Any:
        await node.adopt(STATE.with_(epoch=2, serving={0: ()}))
        return await searched(sought, queries)

    monkeypatch.setattr(node._gatherer, "_search", meanwhile)
    with pytest.raises(StaleEpoch, match="epoch 2"):
        await asked(node, 3)
    assert ids(await asked(node, 3, epoch=2))[0][0] == "r3"


async def test_a_read_of_an_older_state_is_answered_where_nothing_has_gone(node: Node) -> None:
    """When a worker is lost, those that are left refuse nobody: all clients would have to ask for the state first."""
    await node.adopt(STATE.with_(epoch=2, copies={0: ("w", "new")}, members={"w": "active", "new": "joining"}))
    answers = [
        await asked(node, 3),
        await node.on_get("docs", 1, ["r3"], False, [], 1.0),
        await node.on_count("docs", 1, [], 1.0),
    ]
    assert [answer["epoch"] for answer in answers] == [2, 2, 2], "and is told that there is a newer one"


async def test_a_read_that_waited_is_not_answered_from_a_state_that_has_passed(node: Node) -> None:
    """Rows that others hold now may have been dropped while it waited."""
    waiting = asyncio.ensure_future(node.on_get("docs", 1, ["r3"], False, [[0, 21]], 30.0))
    counting = asyncio.ensure_future(node.on_count("docs", 1, [[0, 21]], 30.0))
    await asyncio.sleep(0)
    gone = STATE.with_(
        epoch=2, copies={0: ("other",)}, serving={0: ("other",)}, members={"w": "active", "other": "active"}
    )
    await node.adopt(gone)
    assert not node.replicas["docs"].store.view.rows
    node.replicas["docs"].apply(None, {0: (20, 21)}, {}, 2)
    for read in (waiting, counting):
        with pytest.raises(StaleEpoch, match="epoch 2"):
            await read


async def test_a_record_of_a_newer_state_ends_reads_of_the_older(node: Node) -> None:
    """It was routed by a placement that this worker has not heard of, and may have taken a row away from here."""
    moved = batch_of([{"id": "r3", "offset": 20, "cell": 5, "action": Action.DROP}])
    node.replicas["docs"].apply(moved, {0: (20, 21)}, {}, 2)
    with pytest.raises(StaleEpoch, match="epoch 2"):
        await node.on_get("docs", 1, ["r3"], False, [], 1.0)
    with pytest.raises(StaleEpoch, match="epoch 2"):
        await asked(node, 3)
    answer = await node.on_get("docs", 2, ["r3"], False, [], 1.0)
    assert (answer["applied"], answer["moved"]) == ([[0, 21]], [[0, 21]])
    assert (await asked(node, 3, epoch=2))["moved"] == [[0, 21]]


async def test_a_worker_that_ends_does_not_say_that_the_collection_is_gone(node: Node) -> None:
    """Found while workers were retired under load: a client takes `CollectionNotFound` for the last word."""
    queries = floats_to_wire(vector_of("r3", 3)[None])
    waiting = asyncio.ensure_future(node.on_search("docs", 1, queries, 3, [[0, 99]], 9.0))
    await asyncio.sleep(0)
    await node.teardown(node.worker)
    with pytest.raises(ClusterError, match="w is ending"):
        await waiting
    with pytest.raises(ClusterError, match="w is ending"):
        await asked(node, 3)


async def test_a_read_of_another_incarnation_waits_for_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """By offsets, the old topic's rows are newer than the new topic's end."""
    required = [[0, 2]]

    def get() -> Any:
        return node.on_get("docs", 2, ["r1"], False, required, 5.0, incarnation=1)

    reading = asyncio.ensure_future(get())
    await asyncio.sleep(0.02)
    assert not reading.done()
    await node.adopt(replace(STATE, epoch=2, incarnation=1))
    node.replicas["docs"].apply(batch_of([{"id": "r0", "offset": 0}]), {0: (0, 1)}, {}, 2)
    await asyncio.sleep(0.02)
    assert not reading.done(), "it does not wait for what it requires of the new one"
    node.replicas["docs"].apply(batch_of([{"id": "r1", "offset": 1}]), {0: (1, 2)}, {}, 2)
    answer = await reading
    assert [row.offset for row in rows_from_wire(answer["rows"]) if row] == [1]
    monkeypatch.setattr(holding, "_PAUSE", 0.0)
    with pytest.raises(StaleEpoch, match="has not begun incarnation 2"):
        await node.on_count("docs", 2, [], 5.0, incarnation=2)


async def test_a_read_is_answered_from_the_moment_that_it_asks_for(node: Node) -> None:
    """Another worker has not applied record 20, which takes a row away from here."""
    replica = node.replicas["docs"]
    replica.state = replica.state.with_(source=Source("localhost:9092", "docs", 1, "json", {0: 0}))
    away = batch_of([{"id": "r7", "offset": 20, "cell": 3, "action": Action.DROP}])
    replica.apply(away, {0: (20, 21)}, {}, 1)
    query = floats_to_wire(np.stack([vector_of("r7", 7)]))
    now = await node.on_search("docs", 1, query, 3, [], 1.0)
    assert "r7" not in ids(now)[0]
    assert (now["applied"], now["moved"], now["near"]) == ([[0, 21]], [[0, 21]], [[0, 21]])
    before = await node.on_search("docs", 1, query, 3, [], 1.0, cut=[[0, 20]])
    assert ids(before)[0][0] == "r7"
    assert (before["applied"], before["moved"], before["near"]) == ([[0, 20]], [], [])
    assert (await node.on_search("docs", 1, query, 3, [[0, 21]], 1.0, cut=[[0, 20]]))["applied"] == [[0, 21]]
    counts = [await node.on_count("docs", 1, [], 1.0, cut=cut) for cut in (None, [[0, 20]])]
    assert [count["cell_sizes"] for count in counts] == [[[0, 19]], [[0, 20]]]
    far = -vector_of("r7", 7)[None]
    assert (await node.on_search("docs", 1, floats_to_wire(far), 3, [], 1.0))["near"] in ([], [[0, 0]])


async def test_a_count_by_a_state_in_which_rows_move_is_refused_once_a_worker_knows_that_they_have() -> None:
    first = replace(STATE, spec=CollectionSpec("docs", DIM, replicas=1), members={"w": "active", "x": "active"})
    moving = adopt_codebook(first, np.eye(2, DIM, dtype=np.float32))
    (theirs,) = [cell for cell in moving.codebook.cells if moving.copies[cell] == ("x",)]
    nodes = {}
    for name in first.members:
        nodes[name] = Node("host")
        await nodes[name].setup(SimpleNamespace(address=name, handlers={}))
        await nodes[name].adopt(first)
    rows = [{"id": f"r{n}", "offset": n} for n in range(20)]
    nodes["w"].replicas["docs"].apply(batch_of(rows), {0: (0, 20)}, {}, 1)
    for each in nodes.values():
        await each.adopt(moving)
    # A row that gets another cell on another worker stays where it was until all have: ids tell that it is one row.
    moved = [{"id": f"r{n}", "offset": n, "cell": theirs} for n in range(10)]
    nodes["x"].replicas["docs"].apply(batch_of(moved), {}, {}, moving.epoch)
    assert size_of([await each.on_count("docs", moving.epoch, [], 1.0) for each in nodes.values()]) == 20
    await nodes["x"].adopt(settle(moving))
    with pytest.raises(StaleEpoch):
        await nodes["x"].on_count("docs", moving.epoch, [], 1.0)
    for each in nodes.values():
        await each.teardown(None)
