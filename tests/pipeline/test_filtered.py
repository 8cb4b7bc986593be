"""Filters, recall targets and kinds of index on their way from the client and the command line to the workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import headrace
from headrace.cluster.calls import Call
from headrace.cluster.state import CollectionSpec, CollectionState, first_codebook
from headrace.gpu.index_spec import IndexSpec
from headrace.pipeline import cli
from headrace.pipeline.arguments import index_spec, share
from headrace.pipeline.reads import Router
from headrace.streams.broker import EmbeddedBroker

DIM = 8

Make = Callable[..., headrace.Collection]


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=DIM).astype(np.float32)


def rows() -> list[dict[str, Any]]:
    """40 rows: prices 0 to 39, brands in turn, every fourth sold, every fifth without a price."""
    made = []
    for number in range(40):
        row = {"id": f"r{number}", "vector": vector(number), "brand": "abc"[number % 3], "sold": number % 4 == 0}
        if number % 5:
            row["price"] = float(number)
        made.append(row)
    return made


@pytest.fixture
def make(db: headrace.Database, broker: EmbeddedBroker, topic: str) -> Iterator[Make]:
    """A collection that reads the test's topic."""

    def made(**options: Any) -> headrace.Collection:
        collection = db.create_collection(topic, **{"dim": DIM, **options})
        collection.ingest(broker.bootstrap)
        return collection

    yield made
    if topic in db.collections():
        db.drop_collection(topic)


@pytest.mark.parametrize("index", ["graph", "flat", "ivf_pq"])
def test_only_rows_that_pass_are_found(make: Make, index: str) -> None:
    collection = make(index=index)
    collection.upsert(rows(), wait="searchable")
    wanted = "price < 30 and brand in ['a', 'b'] and not sold"
    passing = {f"r{n}" for n in range(30) if n % 5 and n % 3 < 2 and n % 4}
    hits = collection.search(vector(3), limit=40, filter=wanted)
    assert {hit.id for hit in hits} == passing
    assert collection.search(vector(4), limit=1, filter=wanted)[0].id != "r4"  # sold, though nearest
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    several = collection.search([vector(3), vector(7)], limit=5, filter="price is None", recall_target=1.0)
    assert [len(each) for each in several] == [5, 5]
    assert all("price" not in hit.attributes for each in several for hit in each)
    assert collection.search(vector(3), filter="price > 1e300") == []
    assert collection.count() == 40
    assert collection.count(filter=wanted) == len(passing)
    assert collection.count(filter="price is None") == 8
    assert collection.count(filter="price < 10 or not price < 10") == 32


def test_deleted_and_overwritten_rows_do_not_pass(make: Make) -> None:
    collection = make()
    collection.upsert(rows(), wait="searchable")
    collection.upsert([{"id": "r1", "vector": vector(1), "price": 1000.0}], wait="searchable")
    collection.delete(["r2"], wait="searchable")
    assert {hit.id for hit in collection.search(vector(1), filter="price < 3")} == set()
    assert {hit.id for hit in collection.search(vector(1), filter="price > 999")} == {"r1"}
    assert collection.count(filter="price < 5") == 2  # r3, r4


def test_a_column_is_known_as_soon_as_its_record_must_be_seen(make: Make) -> None:
    collection = make()
    collection.upsert([{"id": "a", "vector": vector(0)}], wait="searchable")
    with pytest.raises(headrace.FilterError, match="no other is yet"):
        collection.search(vector(0), filter="fresh == 1")
    # Nothing has waited for it yet: the search itself does, and asks for the columns after that.
    collection.upsert([{"id": "b", "vector": vector(1), "fresh": 1}])
    assert [hit.id for hit in collection.search(vector(0), filter="fresh == 1")] == ["b"]


def test_an_empty_collection_tells_a_wrong_name_from_one_without_rows(make: Make) -> None:
    collection = make(attributes={"price": "float", "user-id": "int"})
    assert collection.search(vector(0), filter="price < 3 and col('user-id') == 1") == []
    assert collection.count(filter="price is None") == 0
    with pytest.raises(headrace.FilterError) as told:
        collection.search(vector(0), filter="prise < 3")
    assert str(told.value).splitlines() == [
        "filter, character 1: column 'prise' is not known: did you mean 'price'? There are price, user-id",
        "  prise < 3",
        "  ^^^^^",
    ]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"filter": "price <"}, headrace.FilterError),
        ({"filter": ""}, headrace.FilterError),
        ({"filter": 3}, headrace.FilterError),
        ({"recall_target": 0}, headrace.ConfigError),
        ({"recall_target": 1.5}, headrace.ConfigError),
        ({"recall_target": "high"}, headrace.ConfigError),
        ({"recall_target": float("nan")}, headrace.ConfigError),
    ],
)
def test_a_search_that_cannot_be(make: Make, asked: dict[str, Any], error: type[Exception]) -> None:
    collection = make(attributes={"price": "float"})
    with pytest.raises(error):
        collection.search(vector(0), **asked)


async def test_asynchronous_and_many_at_once(broker: EmbeddedBroker, topic: str) -> None:
    async with await headrace.connect_async(workers=2, backend="host") as db:
        collection = await db.create_collection(topic, dim=DIM, index="flat")
        await collection.ingest(broker.bootstrap)
        await collection.upsert(rows(), wait="searchable")
        limits = [1 + number % 3 for number in range(60)]
        asked = [
            collection.search(vector(number % 40), limit=limit, filter="sold" if number % 2 else None)
            for number, limit in enumerate(limits)
        ]
        for number, (limit, hits) in enumerate(zip(limits, await asyncio.gather(*asked), strict=True)):
            assert len(hits) == limit
            if number % 2:
                assert all(hit.attributes["sold"] for hit in hits)
            else:
                assert hits[0].id == f"r{number % 40}"
        assert await collection.count(filter="sold") == 10


class TestIndex:
    @pytest.mark.parametrize(
        ("given", "wanted"),
        [
            ({}, IndexSpec()),
            ({"index": "flat"}, IndexSpec("flat")),
            ({"index": "ivf_pq", "dtype": "float16"}, IndexSpec("ivf_pq", dtype="float16")),
            ({"index": {"kind": "graph", "graph_degree": 16}}, IndexSpec("graph", graph_degree=16)),
            ({"index": IndexSpec(lists=7), "recall_target": 0.99}, IndexSpec(lists=7, recall_target=0.99)),
        ],
    )
    def test_what_is_asked_for_reaches_everybody(
        self, db: headrace.Database, topic: str, given: dict[str, Any], wanted: IndexSpec
    ) -> None:
        collection = db.create_collection(topic, dim=DIM, **given)
        assert collection.spec.index == wanted
        with headrace.connect(db.address) as other:
            assert other.collection(topic).spec.index == wanted
        db.drop_collection(topic)

    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ({"index": "tree"}, "'tree'"),
            ({"index": 3}, "index=3"),
            ({"index": {"kind": "graph", "degree": 3}}, "'degree'"),
            ({"dtype": "int8"}, "'int8'"),
            ({"recall_target": 2}, "recall_target=2"),
            ({"index": {"kind": "ivf_pq", "pq_dim": 3}}, "pq_dim 3"),
        ],
    )
    def test_what_cannot_be_is_refused_at_once(
        self, db: headrace.Database, topic: str, given: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(headrace.ConfigError, match=why):
            db.create_collection(topic, dim=DIM, **given)
        assert topic not in db.collections()

    def test_arguments(self) -> None:
        assert index_spec(DIM, None, None, None) == IndexSpec()
        assert index_spec(DIM, IndexSpec("flat"), "float16", 1) == IndexSpec("flat", "float16", 1.0)
        assert share("recall_target", None) is None
        assert share("recall_target", np.float32(0.5)) == 0.5


class TestCommandLine:
    def test_create_and_search(
        self, make: Make, db: headrace.Database, topic: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make().upsert(rows(), wait="searchable")
        query = json.dumps(vector(3).tolist())
        asked = ["search", topic, query, "--cluster", db.address, "--json", "--recall-target", "0.99"]
        assert cli.main([*asked, "--filter", "price < 3"]) == 0
        assert {hit["id"] for hit in json.loads(capsys.readouterr().out)["hits"]} == {"r1", "r2"}
        assert cli.main([*asked, "--filter", "prise < 3"]) == 1
        told = capsys.readouterr().err.splitlines()
        assert told[0].startswith("headrace: filter, character 1: column 'prise' is not known: did you mean 'price'?")
        assert told[1:] == ["  prise < 3", "  ^^^^^"]

    def test_create(self, db: headrace.Database, topic: str, capsys: pytest.CaptureFixture[str]) -> None:
        asked = ["create", topic, "--dim", "16", "--index", "ivf_pq", "--dtype", "float16", "--recall-target", "0.9"]
        assert cli.main([*asked, "--cluster", db.address, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["index"] == IndexSpec("ivf_pq", "float16", 0.9).to_wire()
        db.drop_collection(topic)
        assert cli.main([*asked, "--cluster", db.address]) == 0
        assert "ivf_pq" in capsys.readouterr().out
        db.drop_collection(topic)
        assert cli.main(["create", topic, "--dim", "16", "--recall-target", "3", "--cluster", db.address]) == 2
        assert "recall_target=3.0" in capsys.readouterr().err


class TestRouter:
    """Which columns a filter is read by, without a cluster."""

    @staticmethod
    def router(learnt: str, asked: list[str]) -> Router:
        """A column is known from the first call of `learnt` on; what is called goes into `asked`."""
        spec, held = CollectionSpec("docs", DIM), {0: ("w",)}
        state = CollectionState(spec, first_codebook(DIM), epoch=3, members={"w": "active"}, copies=held, serving=held)

        async def call(address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
            asked.append(op)
            if op != "describe":
                return {}
            schema = {"n": "int"} if learnt in asked[:-1] else {}
            wire = state.with_(schema=schema).to_wire()
            return {"state": None if message["epoch"] == 3 else wire, "schema": schema, "alarms": []}

        played: Call = call
        return Router("docs", played, "scheduler")

    async def test_a_known_column_costs_no_call(self) -> None:
        asked: list[str] = []
        router = self.router("describe", asked)
        await router.state()
        await router.state(newest=True)
        assert (await router.filter("n < 3", {0: 5}, 1.0)) is not None
        assert await router.filter(None, {0: 5}, 1.0) is None
        assert asked == ["describe"] * 2

    async def test_an_unknown_column_is_asked_for_once_more(self) -> None:
        asked: list[str] = []
        router = self.router("describe", asked)
        await router.state()
        assert (await router.filter("n < 3", {}, 1.0)) is not None
        assert asked == ["describe"] * 2

    async def test_what_must_be_seen_is_waited_for_before_a_column_is_called_unknown(self) -> None:
        asked: list[str] = []
        router = self.router("wait", asked)
        await router.state()
        assert (await router.filter("n < 3", {0: 5}, 1.0)) is not None
        assert "wait" in asked
        with pytest.raises(headrace.FilterError, match="'m' is not known"):
            await router.filter("m < 3", {0: 5}, 1.0)
