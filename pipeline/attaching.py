"""Beginning to take in a topic: asked of Kafka by the client, told to the scheduler, and waited for."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from headrace.cluster.roles import may_ingest
from headrace.cluster.wire import offsets_to_wire
from headrace.gpu.errors import ClusterError, ConfigError
from headrace.pipeline import config
from headrace.pipeline.reads import Router
from headrace.streams.topics import Offsets

__all__ = ["described", "until_read"]

log = logging.getLogger("headrace.pipeline")


async def described(bootstrap: str, topic: str, format: str) -> dict[str, Any]:
    """What the scheduler is told of a topic (`cluster.state.Source`).

    Raises
    ------
    ConfigError
        An argument cannot be.
    BrokerError, TopicError
        Kafka does not answer, or does not have the topic.
    """
    if not isinstance(topic, str):
        raise ConfigError(f"topic={topic!r} cannot be: give a topic's name")
    if not isinstance(bootstrap, str) or not bootstrap.strip():
        raise ConfigError(f"bootstrap={bootstrap!r} cannot be: give a broker's address, such as 'localhost:9092'")
    if format not in ("json", "binary"):
        raise ConfigError(f"record format {format!r} is not known: use 'json' or 'binary'")

    def look() -> dict[str, Any]:
        offsets = Offsets(bootstrap, topic, settings=config.kafka_settings())
        return {
            "bootstrap": bootstrap,
            "topic": topic,
            "partitions": offsets.partitions,
            "format": format,
            "origins": offsets_to_wire(offsets.earliest()),
            "topic_id": offsets.topic_id(),
        }

    return await asyncio.to_thread(look)


async def until_read(router: Router, partitions: int, deadline: float = 60.0) -> None:
    """Return once every topic partition is read: the workers load their encoder first, which takes a second.

    Where no worker may read topics (its role), it returns at once, with a warning: records wait for one.

    Raises
    ------
    ClusterError
        Not all were within `deadline` seconds.
    """
    until = time.monotonic() + deadline
    while True:
        answers = await router.ask_all("ingest_status", deadline)
        if {tp for answer in answers for tp in answer["reading"]} == set(range(partitions)):
            return
        state = await router.state(newest=True)
        if not may_ingest(state.members, state.roles):
            log.warning("collection %r: no worker that may read its topic is there; records wait for one", router.name)
            return
        if time.monotonic() >= until:
            raise ClusterError(
                f"collection {router.name!r}: not all {partitions} topic partitions were being read after "
                f"{deadline:g} s; the workers' logs say why"
            )
        await asyncio.sleep(0.02)
