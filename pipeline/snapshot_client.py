"""The clients' half of snapshots: what is asked of the scheduler, and what is looked at before it is asked.

Whether a snapshot can go on reading its topic is decided here, because here Kafka can be asked: offsets of another
topic do not compare with those of its rows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from headrace.cluster.calls import Call
from headrace.cluster.wire import offsets_from_wire
from headrace.gpu.errors import (
    BrokerError,
    ClusterError,
    ConfigError,
    EncoderError,
    HeadraceError,
    SnapshotError,
    TopicError,
)
from headrace.pipeline import config
from headrace.pipeline.arguments import count, snapshot_url
from headrace.pipeline.results import Loaded, Restoration, Snapshot
from headrace.streams.topic_identity import another
from headrace.streams.topics import Offsets

__all__ = ["check_encoder", "check_topic", "listed", "load", "newest", "restoration", "shown", "take"]

log = logging.getLogger("headrace.pipeline")

_CHECKING = 24 * 3600.0
"""Seconds: as long as reading all of a place may take."""

Ask = Callable[..., Awaitable[dict[str, Any]]]
"""``await ask(op, deadline=seconds, **message)`` of the scheduler."""


async def take(ask: Ask, collection: str, url: Any, every: Any, keep: Any, deadline: float) -> Snapshot:
    """Have a snapshot taken; see `Collection.snapshot`."""
    place = _place(url)
    if every is not None and (isinstance(every, bool) or not isinstance(every, int | float) or not 0 <= every < 1e9):
        raise ConfigError(f"every={every!r} cannot be: give seconds, or 0 to take no more by itself")
    told = await ask(
        "snapshot",
        deadline=deadline,
        collection=collection,
        url=place,
        keep=count("keep", keep),
        every=None if every is None else float(every),
    )
    return _snapshot(told, place)


async def listed(ask: Ask, url: Any, check: bool = False) -> list[dict[str, Any]]:
    """All snapshots at a place, oldest first, as `snapshots.Manifest.told`; with `check` all their files are read."""
    answer = await ask("snapshots", deadline=_CHECKING if check else 60.0, url=_place(url), check=bool(check))
    return list(answer["snapshots"])


def shown(told: Sequence[Mapping[str, Any]], url: Any) -> list[Snapshot]:
    return [_snapshot(one, _place(url)) for one in told]


def newest(told: Sequence[Mapping[str, Any]], url: str, wanted: str | None) -> Mapping[str, Any]:
    """The snapshot that will probably be loaded: the scheduler looks closer, and has the last word."""
    good = [one for one in told if not one["problem"] and wanted in (None, one["snapshot"])]
    if not good:
        known = "; ".join(f"{one['snapshot']}: {one['problem'] or 'good'}" for one in told) or "none"
        what = "no snapshot that can be used" if wanted is None else f"no good snapshot {wanted!r}"
        raise SnapshotError(f"there is {what} at {url} (there are: {known}); check the URL, or take one first")
    return good[-1]


async def check_encoder(call: Call, workers: Sequence[str], collection: str, encoder: str | None) -> None:
    """Raise `EncoderError` if some worker cannot encode the collection's texts."""
    if encoder is None:
        return
    asking = (
        call(worker, "encode", deadline=120.0, collection=collection, encoder=encoder, texts=["."])
        for worker in workers
    )
    for worker, answer in zip(workers, await asyncio.gather(*asking, return_exceptions=True), strict=True):
        if isinstance(answer, HeadraceError):
            raise EncoderError(
                f"collection {collection!r} was made with encoder {encoder}, which {worker} cannot use: {answer}"
            )
        if isinstance(answer, BaseException):
            raise answer


def check_topic(told: Mapping[str, Any]) -> None:
    """Raise `TopicError` if the log that a snapshot is to be followed by is not the one it was taken from. Blocks.

    A log that was truncated above the snapshot is no error: what is missing is told by an alarm when it is read. Nor is
    a broker that does not answer: it is read from when it does.
    """
    source = told["source"]
    if source is None:
        return
    cure = "restore its rows alone with ingest=False (--no-ingest), or build a new collection from the topic"
    topic = source["topic"]
    try:
        offsets = Offsets(source["bootstrap"], topic, settings=config.kafka_settings())
        seen, ends = offsets.topic_id(), offsets.latest()
    except TopicError as error:
        raise TopicError(f"the snapshot's topic cannot be read: {error}; or {cure}") from error
    except BrokerError as error:
        log.warning("whether topic %r is still the one of the snapshot is not known: %s", topic, error)
        return
    if another(source.get("topic_id", ""), seen):
        raise TopicError(
            f"topic {topic!r} at {source['bootstrap']} was made anew since the snapshot (id {seen}, before "
            f"{source['topic_id']}), and versions of the two do not compare: {cure}"
        )
    if offsets.partitions != source["partitions"]:
        raise TopicError(
            f"topic {topic!r} has {offsets.partitions} topic partitions and the snapshot is of {source['partitions']}: "
            f"ids map to others; {cure}"
        )
    for tp, offset in offsets_from_wire(told["offsets"]).items():
        if ends.get(tp, 0) < offset:
            raise TopicError(
                f"topic {topic!r}, topic partition {tp}, ends at offset {ends.get(tp, 0)} and the snapshot at "
                f"{offset}: the topic was made anew or has lost records; {cure}"
            )


async def load(ask: Ask, name: str, until: float, /, **message: Any) -> dict[str, Any]:
    """Have a snapshot loaded as collection `name`; see `Database.restore`.

    Parameters
    ----------
    until : float
        When the answer must be there, ``time.monotonic()``.

    Raises
    ------
    ClusterError
        It was not; the message says what becomes of the collection.
    """
    deadline = max(0.001, until - time.monotonic())
    try:
        return await ask("restore", deadline=deadline, **message)
    except ClusterError as error:
        if not isinstance(error.__cause__, TimeoutError):
            raise
        raise ClusterError(
            f"collection {name!r} was not loaded within {deadline:.3g} s, and the cluster goes on loading it: look at "
            "it with 'headrace status', or drop it to call it off"
        ) from error


def restoration(told: Mapping[str, Any], collection: str, replayed: int, caught_up: float | None) -> Restoration:
    """What `restore` answers, from what the scheduler and the log have said."""
    workers = tuple(Loaded(worker, **{name: one[name] for name in _LOADED}) for worker, one in told["workers"])
    return Restoration(
        collection=collection,
        snapshot=_snapshot(told, told["url"]),
        workers=workers,
        seconds=told["seconds"],
        replayed=replayed,
        catch_up_seconds=caught_up,
        passed_over=tuple(told["passed_over"]),
    )


_LOADED = ("cells", "rows", "bytes", "adopted", "rebuilt", "seconds")


def _snapshot(told: Mapping[str, Any], url: str) -> Snapshot:
    return Snapshot(
        name=told["snapshot"],
        collection=told.get("collection", ""),
        url=url,
        rows=told.get("rows", 0),
        bytes=told.get("bytes", 0),
        bytes_written=told.get("bytes_written", 0),
        seconds=told.get("seconds", 0.0),
        created=told.get("created", 0.0),
        offsets=offsets_from_wire(told.get("offsets", ())),
        problem=told["problem"],
    )


def _place(url: Any) -> str:
    place = snapshot_url(url)
    if not place:
        raise ConfigError("url='' cannot be: give a folder, or a URL such as 's3://bucket/docs'")
    return place
