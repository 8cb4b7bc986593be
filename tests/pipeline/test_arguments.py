"""A wrong argument is one sentence that names it, whatever its type, and nothing has been sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import headrace
from headrace.gpu.errors import ConfigError, HeadraceError, RecordError
from headrace.pipeline.arguments import check_ids, seconds
from headrace.pipeline.results import bounded
from headrace.streams.broker import EmbeddedBroker


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
    "scan, no such worker": lambda docs: list(docs.scan(worker="x")),
    "verify, deadline": lambda docs: docs.verify(deadline="x"),
    "ingest, no broker": lambda docs: docs.ingest("", "arguments"),
    "ingest, a number": lambda docs: docs.ingest(9092, "arguments"),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_in_a_call(docs: headrace.Collection, call: Callable[[Any], object]) -> None:
    with pytest.raises(HeadraceError):
        call(docs)
    assert docs.count(consistency="strong") == 0
