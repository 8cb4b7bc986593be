"""Kafka is away for the workers' readers: status says so, since when, and which broker; and when it is back."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

import headrace
from headrace.pipeline import cli_cluster
from headrace.streams.broker import EmbeddedBroker

SOON = 40.0


def until(what: str, condition: Callable[[], object]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, f"not so: {what}"
        time.sleep(0.05)


def test_status_says_that_kafka_is_away_and_that_it_is_back(
    db: headrace.Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedBroker(topics={"away": 4}) as broker:
        collection = db.create_collection("away", dim=2, replicas=2)
        try:
            collection.ingest(broker.bootstrap)
            collection.upsert([{"id": "a", "vector": [1, 2]}], wait="searchable")
            assert collection.status()["ingest"]["kafka_away"] == []
            began = time.time()
            broker.down()
            until("both readers say so", lambda: len(collection.status()["ingest"]["kafka_away"]) == 2)
            status = collection.status()
            assert status["state"] == "degraded"
            for outage in status["ingest"]["kafka_away"]:
                assert outage["broker"] == broker.bootstrap
                assert began - 1.0 <= outage["since"] <= time.time()
                assert outage["error"]
                assert any(outage["worker"] in note and broker.bootstrap in note for note in status["notes"])
            cli_cluster._show(status)
            assert "away for" in capsys.readouterr().out
            assert [hit.id for hit in collection.search([1, 2], limit=1, consistency="eventual")] == ["a"]
            broker.up()
            until("it is back", lambda: not collection.status()["ingest"]["kafka_away"])
            assert collection.status()["state"] == "healthy"
            cli_cluster._show(collection.status())
            assert "answers" in capsys.readouterr().out
        finally:
            db.drop_collection("away")
