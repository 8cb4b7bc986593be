"""The commands that move records: ``produce`` writes them to Kafka, ``ingest`` takes them in, ``search`` finds them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

import click

from headrace.gpu.errors import BrokerError, ConfigError, RecordError, TopicError
from headrace.pipeline.cli_common import (
    Command,
    broker_option,
    cluster_option,
    connected,
    json_option,
    plain_json,
    table,
    typed,
)

if TYPE_CHECKING:
    from headrace.pipeline.client import Collection

__all__ = ["ingest", "produce", "search"]

Written = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]] | None]

CHUNK = 1000
"""Records sent before the broker's word is waited for: enough to fill its batches."""
LOOK_AGAIN = 0.25
"""Seconds between two looks at how far the workers are."""
CREATE_SECONDS = 10.0
"""Seconds that a broker may take to create a topic."""
LEVELS = ("strong", "session", "bounded", "eventual")


@click.command(cls=Command, short_help="Write records to a Kafka topic.")
@click.argument("topic")
@click.argument("file", type=click.File("rb"))
@broker_option
@click.option("--id-field", default="id", show_default=True, help="The field that holds the id.")
@click.option("--binary", is_flag=True, help="Write vectors as raw float32: a third of the bytes.")
@click.option("--delete", is_flag=True, help="Delete the ids of the lines; nothing else of a line is read.")
@click.option("--profile", default="durable", show_default=True, type=click.Choice(["durable", "fast"]))
@click.option("--create-partitions", type=click.IntRange(1), metavar="N", help="Create TOPIC if it is missing.")
@json_option
def produce(
    topic: str,
    file: IO[bytes],
    broker: str,
    id_field: str,
    binary: bool,
    delete: bool,
    profile: str,
    create_partitions: int | None,
    as_json: bool,
) -> int:
    """Write the lines of FILE, one JSON object each, to a Kafka topic; - is standard input.

    A line has an id, and a text or a vector; its other fields are attributes. A line that cannot be written is told
    with its number and the reason, the others go on, and the exit code is 1.

    \b
    Examples:
      headrace produce docs docs.jsonl
      headrace produce docs - --id-field sku --create-partitions 8 < products.jsonl
      headrace produce docs gone.jsonl --delete
    """
    from headrace.pipeline import config
    from headrace.streams.producer import RecordProducer

    if create_partitions:
        _create_topic(broker, topic, create_partitions)
    began, settings = time.monotonic(), config.kafka_settings()
    counts = {"written": 0, "refused": 0}
    offsets: dict[int, int] = {}
    with RecordProducer(broker, topic, profile=profile, settings=settings) as producer, _progress(file) as advance:
        waiting: list[Written] = []

        def send() -> None:
            landed = producer.write(waiting, deadline=60.0)
            counts["written"] += landed.count
            offsets.update(landed.offsets)
            waiting.clear()

        for number, line in enumerate(file, 1):
            advance(len(line))
            if not line.strip():
                continue
            try:
                record = _record(line, id_field, binary, delete)
                producer.check_size(*record)
                waiting.append(record)
            except RecordError as error:
                counts["refused"] += 1
                click.echo(f"headrace: line {number} was refused: {error}", err=True)
            if len(waiting) == CHUNK:
                send()
        send()
    seconds = time.monotonic() - began
    if as_json:
        click.echo(plain_json({"topic": topic, **counts, "offsets": offsets, "seconds": round(seconds, 3)}))
    else:
        refused = f", {counts['refused']} lines refused" if counts["refused"] else ""
        click.echo(f"{counts['written']} records written to {topic} in {seconds:.1f} s{refused}")
        if offsets:
            rows = sorted(offsets.items())
            table("", ["topic partition", "next offset"], rows, right=["topic partition", "next offset"])
    return 1 if counts["refused"] else 0


@click.command(cls=Command, short_help="Let a collection take in a topic.")
@click.argument("name")
@broker_option
@click.option("--topic", help="The topic to read; the collection's own name if left out.")
@click.option("--format", "format_", default="json", show_default=True, type=click.Choice(["json", "binary"]))
@cluster_option
@click.option("--wait", is_flag=True, help="Wait until all that is in the topic now can be searched.")
def ingest(name: str, broker: str, topic: str | None, format_: str, cluster: str, wait: bool) -> None:
    """Let collection NAME take in a Kafka topic, from now on, until it is dropped.

    \b
    Examples:
      headrace ingest docs --broker localhost:9092
      headrace ingest docs --topic products --wait
    """
    with connected(cluster) as database:
        collection = database.collection(name)
        collection.ingest(broker, topic, format=format_)
        click.echo(f"{name} takes in {topic or name} from {broker}")
        if wait:
            _wait(collection, broker, topic or name)


@click.command(cls=Command, short_help="Find what is nearest.")
@click.argument("name")
@click.argument("query")
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1), help="How many to find.")
@click.option(
    "--filter", "filter_", metavar="CONDITION", help='Only records whose attributes pass: "price < 50 and not sold".'
)
@click.option("--recall-target", type=float, metavar="SHARE", help="Of this search, instead of the collection's.")
@click.option(
    "--consistency",
    default="eventual",
    show_default=True,
    help="strong: all that is in Kafka now; bounded:MS: no older than that; eventual: what is there.",
)
@cluster_option
@json_option
def search(
    name: str,
    query: str,
    limit: int,
    filter_: str | None,
    recall_target: float | None,
    consistency: str,
    cluster: str,
    as_json: bool,
) -> None:
    """Find what is nearest to QUERY in collection NAME: a text, or a vector as a JSON list of numbers.

    \b
    Examples:
      headrace search docs "moving average of a series"
      headrace search docs "red shoes" --limit 3 --consistency strong --json
      headrace search points "[0.1, 0.2, 0.3]"
      headrace search shoes "red" --filter "price < 50 and brand in ['a', 'b'] and not sold"
    """
    from headrace.pipeline.arguments import share

    # Before the connection is made, so that what was typed wrong is told at once.
    with typed():
        wanted, asked = _level(consistency), _query(query)
        recall_target = share("recall_target", recall_target)
    with connected(cluster) as database:
        hits = database.collection(name).search(
            asked, limit=limit, filter=filter_, recall_target=recall_target, consistency=wanted
        )
    if as_json:
        found = [{"id": hit.id, "score": hit.score, "attributes": hit.attributes} for hit in hits]
        click.echo(plain_json({"hits": found, "offsets": hits.offsets}))
        return
    rows = [(n, f"{hit.score:.3f}", hit.id, _about(hit.attributes)) for n, hit in enumerate(hits, 1)]
    table("", ["", "score", "id", "text"], rows, right=["", "score"])


def _record(line: bytes, id_field: str, binary: bool, delete: bool) -> Written:
    from headrace.gpu.json_check import parse
    from headrace.streams.encode import RESERVED, encode_binary, encode_json, encode_key

    # The workers' own reader: it keeps whole numbers beyond 64 bits as they are, to be refused, and sees double fields.
    read = parse([line.strip()])
    if read.bad:
        raise RecordError(f"it cannot be read: {read.bad[0]}; write one JSON object on each line")
    row = {name: column[0] for name, column in read.columns.items()}
    if id_field not in row:
        raise RecordError(f"it has no field {id_field!r}: its fields are {', '.join(row) or 'none'}")
    id_ = row.pop(id_field)
    if delete:
        return encode_key(id_), None, None
    text, vector = row.get("text"), row.get("vector")
    attributes = {name: value for name, value in row.items() if name not in RESERVED or name == "id"}
    if not binary:
        key, value = encode_json(id_, text=text, vector=vector, attributes=attributes)
        return key, value, None
    if vector is None:
        raise RecordError("it has no 'vector', which --binary writes: leave --binary out, or give one")
    if text is not None:
        attributes["text"] = text
    key, value, headers = encode_binary(id_, vector, attributes)
    return key, value, list(headers)


def _create_topic(broker: str, topic: str, partitions: int) -> None:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    # The same class by its public name; the stubs know it only under this one.
    from confluent_kafka.cimpl import NewTopic

    from headrace.pipeline import config
    from headrace.streams.clients import COMMON_SETTINGS, KafkaLog, is_embedded
    from headrace.streams.topics import topic_partitions

    settings = config.kafka_settings()
    try:
        there = topic_partitions(broker, topic, settings=settings)
    except TopicError:
        admin = AdminClient({**COMMON_SETTINGS, **settings, "bootstrap.servers": broker}, logger=KafkaLog())
        try:
            if is_embedded(admin.list_topics(topic, timeout=CREATE_SECONDS).cluster_id):
                raise TopicError(
                    f"there is no topic {topic!r}, and {broker} is an embedded broker, which creates none when asked "
                    f"from outside: have the program that runs it do broker.create_topic({topic!r}, {partitions}), or "
                    "use Apache Kafka"
                ) from None
            made = admin.create_topics([NewTopic(topic, num_partitions=partitions)], request_timeout=CREATE_SECONDS)
            made[topic].result()
        except KafkaException as failure:
            raise BrokerError(
                f"{broker} did not create topic {topic!r} with {partitions} topic partitions "
                f"({failure.args[0].str()}): may this client create topics, and does the cluster have a controller? "
                f"Create it with Kafka's own kafka-topics.sh --create --topic {topic} --partitions {partitions}, then "
                "leave out --create-partitions"
            ) from failure
        return
    if there != partitions:
        raise TopicError(
            f"topic {topic!r} is there with {there} topic partitions, not {partitions}: leave out --create-partitions"
        )


class _progress:
    """A bar on stderr while a file is read; nothing where nobody watches."""

    def __init__(self, file: IO[bytes]) -> None:
        import os
        import stat

        from rich.console import Console
        from rich.progress import Progress

        about = os.fstat(file.fileno()) if hasattr(file, "fileno") else None
        size = about.st_size if about is not None and stat.S_ISREG(about.st_mode) else None
        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("writing", total=size)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda count: self._bar.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _wait(collection: Collection, broker: str, topic: str) -> None:
    """Until every copy has applied what Kafka holds now; the lag alone could be 0 before anybody has looked."""
    from headrace.pipeline import config
    from headrace.streams.topics import Offsets

    asked = Offsets(broker, topic, settings=config.kafka_settings())
    low, high = asked.earliest(), asked.latest()
    wanted = {place: (low[place], end) for place, end in high.items() if end > low[place]}
    total = sum(end - start for start, end in wanted.values())
    told: set[str] = set()
    before = -1
    for state in _states(collection):
        for alarm in state.get("alarms", []):
            if alarm not in told:
                told.add(alarm)
                click.echo(f"headrace: {alarm}", err=True)
        left = _left(state["workers"], wanted)
        if left != before:
            click.echo(f"{total - left} of {total} records are dealt with", err=True)
        before = left
        if not left:
            dead = (state.get("ingest") or {}).get("dead_letters", 0)
            told_dead = f"; {dead} records are in the dead letters of its topic" if dead else ""
            click.echo(f"all that was in the topic can be searched{told_dead}", err=True)
            return


def _states(collection: Collection) -> Iterator[Mapping[str, Any]]:
    while True:
        yield collection.status()
        time.sleep(LOOK_AGAIN)


def _left(workers: list[Mapping[str, Any]], wanted: Mapping[int, tuple[int, int]]) -> int:
    """Offsets that the slowest worker has yet to apply."""
    missing = 0
    for place, (start, end) in wanted.items():
        marks = [int(dict(worker.get("watermarks", {})).get(place, 0)) for worker in workers]
        missing += end - min(max(min(marks, default=0), start), end)
    return missing


def _level(text: str) -> Any:
    level, _, number = text.partition(":")
    if level in LEVELS and not number:
        return level
    if level == "bounded" and number.isdecimal():
        from headrace.pipeline.results import bounded

        return bounded(int(number))
    raise ConfigError(f"consistency {text!r} cannot be: use {', '.join(LEVELS)}, or bounded:500 for 500 ms")


def _query(text: str) -> Any:
    if not text.lstrip().startswith("["):
        return text
    import numpy as np

    try:
        given = np.asarray(json.loads(text))  # it reads NaN and Infinity: numbers, to be refused, and no text
    except (TypeError, ValueError, RecursionError):
        return text  # a text may begin with a bracket
    if given.dtype.kind not in "iuf":
        return text
    if given.ndim != 1:
        raise click.UsageError(
            f"QUERY is a list of lists, of shape {given.shape}: give one vector, such as '[0.1, 0.2, 0.3]'; several at "
            "once are searched from Python"
        )
    return given


def _about(attributes: Mapping[str, Any]) -> str:
    if "text" in attributes:
        return str(attributes["text"])
    return ", ".join(f"{name}={value}" for name, value in attributes.items())
