"""A wrong argument is one sentence that names it, whatever its type, and nothing has been sent."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

import headrace
from headrace.cluster.state import CollectionSpec
from headrace.gpu.errors import ConfigError, HeadraceError, RecordError
from headrace.pipeline.arguments import check_ids, seconds
from headrace.pipeline.queries import texts_in, vectors_in
from headrace.pipeline.results import Hit, Hits, bounded
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.encode import encode_binary, encode_json


@pytest.mark.parametrize("wrong", ["5", 0, -1, float("nan"), float("inf"), True, [1]])
def test_seconds_that_cannot_be_waited(wrong: object) -> None:
    with pytest.raises(ConfigError, match="deadline="):
        seconds("deadline", wrong, 1.0)


def test_seconds() -> None:
    assert seconds("deadline", None, 1.5) == 1.5
    assert seconds("deadline", np.float32(2), 1.5) == 2.0


@pytest.mark.parametrize(
    ("ids", "kind"),
    [(None, "string"), (b"a", "string"), (["a", 1], "string"), (5, "string"), ("a", "integer"), ([True], "integer")],
)
def test_ids_of_another_kind(ids: Any, kind: str) -> None:
    with pytest.raises(RecordError):
        check_ids(ids, kind, "docs")


def test_an_id_that_is_no_utf_8_is_refused() -> None:
    with pytest.raises(RecordError, match=r"number 1.*half a surrogate pair"):
        check_ids(["ä", "a\ud800"], "string", "docs")


def test_ids() -> None:
    assert check_ids("a", "string", "docs") == ["a"]
    assert check_ids(iter(["a", "b"]), "string", "docs") == ["a", "b"]
    assert check_ids(np.arange(2), "integer", "docs") == [0, 1]
    assert all(type(row_id) is int for row_id in check_ids(np.arange(2), "integer", "docs"))


@pytest.mark.parametrize("wrong", ["x", None, -1, float("nan"), float("inf")])
def test_a_staleness_that_cannot_be(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="staleness"):
        bounded(wrong)


@pytest.fixture(scope="module")
def docs(db: headrace.Database, broker: EmbeddedBroker) -> headrace.Collection:
    broker.create_topic("arguments", 2)
    collection = db.create_collection("arguments", dim=2)
    collection.ingest(broker.bootstrap, "arguments")
    return collection


@pytest.mark.parametrize("address", [5, "nonsense", "tcp://", "tcp://host", "host:port", ""])
def test_what_is_no_address(address: Any) -> None:
    with pytest.raises(ConfigError, match="no scheduler's address"):
        headrace.connect(address)


@pytest.mark.parametrize("workers", ["x", 0, 1.5, True])
def test_a_number_of_workers_that_cannot_be(workers: Any) -> None:
    with pytest.raises(ConfigError, match="workers cannot hold"):
        headrace.connect(workers=workers)


@pytest.mark.parametrize("given", [{"workers": 2}, {"processes": True}, {"dashboard": ":0"}, {"port": 8786}])
def test_what_only_a_cluster_that_is_started_can_be_told(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}=.* runs already"):
        headrace.connect("tcp://127.0.0.1:1", **given)


async def test_nor_can_an_asynchronous_one() -> None:
    with pytest.raises(ConfigError, match="workers=3"):
        await headrace.connect_async("tcp://127.0.0.1:1", workers=3)


async def test_an_asynchronous_connection_can_be_entered(db: headrace.Database) -> None:
    async with headrace.connect_async(db.address) as entered:
        awaited = await headrace.connect_async(db.address)
        assert await entered.collections() == await awaited.collections()
        await awaited.close()


def test_a_closed_connection_says_so(db: headrace.Database) -> None:
    other = headrace.connect(db.address)
    other.close()
    with pytest.raises(headrace.ClusterError, match="connect again"):
        other.collections()


SPECS: dict[str, dict[str, Any]] = {
    "name, a number": {"name": 5},
    "name, a dot alone": {"name": "."},
    "name, too long": {"name": "n" * 250},
    "cells, too many": {"cells": 10**8},
    "replicas, too many": {"replicas": 100},
    "attributes, a list": {"attributes": ["a"]},
    "attributes, no such kind": {"attributes": {"a": "date"}},
    "attributes, a number": {"attributes": {1: "int"}},
    "attributes, no name": {"attributes": {"": "int"}},
    "attributes, half a character": {"attributes": {"\ud800": "int"}},
    "attributes, the id": {"attributes": {"id": "str"}},
    "attributes, the vector": {"attributes": {"vector": "float"}},
    "attributes, a text that is none": {"attributes": {"text": "int"}},
    "dim, a text": {"dim": "4"},
}


@pytest.mark.parametrize("given", SPECS.values(), ids=SPECS.keys())
def test_a_collection_that_cannot_be(db: headrace.Database, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        db.create_collection(**{"name": "wrong", "dim": 2, **given})
    assert "wrong" not in db.collections()


WRONG: dict[str, Callable[[Any], object]] = {
    "upsert nothing": lambda docs: docs.upsert(None),
    "upsert a text": lambda docs: docs.upsert("a"),
    "upsert a number": lambda docs: docs.upsert([7]),
    "upsert, deadline": lambda docs: docs.upsert([{"id": "a", "vector": [1, 2]}], deadline="x"),
    "delete, another kind": lambda docs: docs.delete([1]),
    "delete nothing": lambda docs: docs.delete(None),
    "get, another kind": lambda docs: docs.get([1]),
    "get nothing": lambda docs: docs.get(None),
    "get, deadline": lambda docs: docs.get("a", deadline=-1),
    "count, deadline": lambda docs: docs.count(deadline="soon"),
    "search, deadline": lambda docs: docs.search([1, 2], deadline="soon"),
    "search, too large for float32": lambda docs: docs.search([1e39, 0]),
    "search, no text": lambda docs: docs.search("a"),
    "upsert, no direction": lambda docs: docs.upsert([{"id": "a", "vector": [0, 0]}]),
    "upsert, too long a vector": lambda docs: docs.upsert([{"id": "a", "vector": [1e25, 0]}]),
    "upsert, two kinds in a column": lambda docs: docs.upsert(
        [{"id": "a", "vector": [1, 2], "n": 1}, {"id": "b", "vector": [1, 2], "n": "one"}]
    ),
    "upsert, beyond int64": lambda docs: docs.upsert([{"id": "a", "vector": [1, 2], "n": 2**70}]),
    "delete, beyond int64": lambda docs: docs.delete([2**70]),
    "scan, no such worker": lambda docs: list(docs.scan(worker="x")),
    "verify, deadline": lambda docs: docs.verify(deadline="x"),
    "ingest, no broker": lambda docs: docs.ingest("", "arguments"),
    "ingest, a number": lambda docs: docs.ingest(9092, "arguments"),
    "ingest, a topic that is a number": lambda docs: docs.ingest("localhost:9092", 5),
    "upsert, texts for numbers": lambda docs: docs.upsert([{"id": "a", "vector": ["1", "2"]}]),
    "upsert, truths for numbers": lambda docs: docs.upsert([{"id": "a", "vector": [True, False]}]),
    "upsert, complex numbers": lambda docs: docs.upsert([{"id": "a", "vector": np.array([1j, 2])}]),
    "upsert, two columns of a name": lambda docs: docs.upsert(
        pd.DataFrame([["a", [1.0, 2.0], 1, 2]], columns=["id", "vector", "z", "z"])
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_in_a_call(docs: headrace.Collection, call: Callable[[Any], object]) -> None:
    with pytest.raises(HeadraceError):
        call(docs)
    assert docs.count(consistency="strong") == 0


def test_a_column_that_is_known_decides(docs: headrace.Collection, db: headrace.Database) -> None:
    docs.upsert([{"id": "a", "vector": [1, 2], "n": 1}], wait="searchable")
    with headrace.connect(db.address) as other:  # whose picture of the columns is new
        again = other.collection("arguments")
        with pytest.raises(RecordError, match="this column holds int"):
            again.upsert([{"id": "b", "vector": [1, 2], "n": "one"}])
        frame = pd.DataFrame({"id": ["b", "c"], "vector": [[1, 2], [3, 4]], "n": [7, None]})
        again.upsert(frame, wait="searchable")  # pandas has made 7.0 of it
        rows = again.get(["b", "c"])
    assert [row and row.attributes for row in rows] == [{"n": 7}, {}]
    docs.delete(["a", "b", "c"], wait="searchable")


def test_large_numbers_have_a_direction_too() -> None:
    spec = CollectionSpec("docs", dim=2)
    vectors, single = vectors_in([3e38, 3e38], spec)
    assert single
    np.testing.assert_allclose(vectors, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)
    with pytest.raises(RecordError, match="overflows"):
        vectors_in([3e38, 3e38], CollectionSpec("docs", dim=2, metric="l2"))


def test_complex_numbers_are_no_query() -> None:
    for query in (np.array([1j, 2]), [1 + 2j, 0]):
        with pytest.raises(RecordError, match="complex"):
            vectors_in(query, CollectionSpec("docs", dim=2))


def test_other_things_that_are_no_query() -> None:
    spec = CollectionSpec("docs", 2, "cosine", None, 1, 1, "string")
    for query in (
        [True, False],
        [True, 1.0],
        np.array(["1", "2"]),
        np.array([1, 2], dtype="m8[s]"),
        [[1, 2], ["3", "4"]],
    ):
        with pytest.raises(RecordError, match="real numbers"):
            vectors_in(query, spec)


@pytest.mark.parametrize(
    "wrong", [["1", "2"], [True, False], [True, 1.0], [1j, 2], [1, "2"], np.array([1, True], object)]
)
def test_vectors_that_are_not_made_of_numbers(wrong: Any) -> None:
    for encode in (encode_json, encode_binary):
        with pytest.raises(RecordError, match="not made of numbers"):
            encode("a", vector=wrong)


@pytest.mark.parametrize(
    "good", [[1, 2.0], (1, 2), np.array([1, 2]), np.array([1, 2.0], object), [np.float16(1), Decimal(2)]]
)
def test_vectors_that_are(good: Any) -> None:
    assert np.frombuffer(encode_binary("a", good)[1], "<f4").tolist() == [1, 2]


def test_no_hits_have_columns_too() -> None:
    assert list(Hits([], {}).to_pandas().columns) == ["id", "score"]
    assert Hits([Hit("a", 0.5, {"n": 1}, 0, 0)], {}).to_pandas().to_dict("records") == [
        {"id": "a", "score": 0.5, "n": 1}
    ]


def test_an_attribute_called_score_does_not_hide_the_score() -> None:
    hit = Hit("a", 0.5, {"score": 3, "id": "x"}, 0, 0)
    assert Hits([hit], {}).to_pandas().to_dict("records") == [
        {"id": "a", "score": 0.5, "attributes.score": 3, "attributes.id": "x"}
    ]


def test_a_limit_may_be_any_integer(docs: headrace.Collection) -> None:
    assert docs.search([1, 2], limit=np.int64(3)) == docs.search([1, 2], limit=3)


def test_a_text_that_is_none() -> None:
    with pytest.raises(RecordError, match="no text in UTF-8"):
        texts_in("a\ud800b", CollectionSpec("docs", dim=2, encoder="minilm@1"))
