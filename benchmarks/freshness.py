"""How old is a record when it can be found?

Records come in at a fixed rate, whatever becomes of them: 384-d vectors, then texts for the collection's encoder. Each
carries the moment at which it was due, not the one at which a late sender got round to it, so that a stall is paid for
by all the records it held up. The ingest workers measure every record's way from that moment until all copies have it;
a probe beside them trusts nobody and times a client's own writes. The raw floor is what remains when a bare Kafka
consumer looks at the same stream and keeps nothing.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from rich.console import Console

import headrace
from benchmarks.report import Criterion, Report, criterion, quantiles, show, spread
from headrace.pipeline.corpus import docstrings
from headrace.streams.clients import COMMON_SETTINGS, KafkaLog
from headrace.streams.encode import encode_binary, encode_json
from headrace.streams.producer import PROFILES

__all__ = ["Load", "main"]

DIM = 384
TOPIC_PARTITIONS = 8
BURST = 0.004
"""Seconds between two bursts of the generator: finer, and on a small machine its own wake-ups would be the load."""
ENCODERS: Mapping[str, str | None] = {"vectors": None, "texts": "minilm"}
STAGES: Mapping[str, str] = {"kafka": "in Kafka"}
"""What a part of the way is called where its short name does not say it."""
AIMS: Mapping[str, Mapping[str, str]] = {"vectors": {"p50": "< 15", "p99": "< 50"}, "texts": {"p99": "< 100"}}

Row = tuple[bytes, bytes, list[tuple[str, str | bytes | None]]]


@dataclass(frozen=True)
class Load:
    """What the generator sends: `rate` records a second for `seconds`, of `texts` or, without them, of vectors."""

    bootstrap: str
    topic: str
    rate: float
    seconds: float
    seed: int
    texts: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Records that are due within the time."""
        return max(1, round(self.rate * self.seconds))


@dataclass
class Phase:
    """What one repetition found, times in milliseconds."""

    freshness: Mapping[str, float | None]
    stages: Mapping[str, Mapping[str, float | None]]
    probe: Mapping[str, float | None]
    figures: dict[str, float] = field(default_factory=dict)


class Generator:
    """An open-loop producer in a process of its own, so that it shares no lock with what is being measured."""

    def __init__(self, load: Load) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_generate, args=(load, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._hear()  # it has sent its first record, so that nothing after it waits for a connection

    def go(self) -> float:
        """Begin; returns the moment at which the first record is due."""
        self._pipe.send("go")
        return float(self._hear())

    def running(self) -> bool:
        """False once the last record has been acknowledged or given up."""
        return not self._pipe.poll()

    def close(self) -> dict[str, float]:
        """``rate`` (acknowledged records per second), ``failed``, ``late_p99``, ``late_max`` (ms behind schedule)."""
        found: dict[str, float] = self._hear()
        self.process.join()
        return found

    def _hear(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError as error:
            raise headrace.BrokerError("the generator has ended before its time: its own error is above") from error


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0 if every aim was held, else 1."""
    asked = _arguments().parse_args(argv)
    console = Console()
    kinds = [asked.only] if asked.only else ["vectors", "texts"]
    results: dict[str, Any] = {
        "settings": {
            name: getattr(asked, name)
            for name in ("seconds", "warmup", "repeat", "rate", "text_rate", "workers", "replicas")
        }
        | {"load_before": round(os.getloadavg()[0], 2)}
    }
    criteria: list[Criterion] = []
    with (
        headrace.EmbeddedBroker() as broker,
        headrace.connect(workers=asked.workers, processes=True) as db,
        console.status("starting") as state,
    ):
        for kind in kinds:
            rate = asked.rate if kind == "vectors" else asked.text_rate
            texts = _texts(kind, round(rate * (asked.seconds * asked.repeat + asked.warmup)), asked.seed)

            def load(name: str, at: int, seconds: float, rate: float = rate, texts: Sequence[str] = texts) -> Load:
                broker.create_topic(name, TOPIC_PARTITIONS)
                # Another repetition sends other texts: what has been encoded before might be remembered.
                own = texts[at * round(rate * asked.seconds) :][: round(rate * seconds)]
                return Load(broker.bootstrap, name, rate, seconds, asked.seed + at, tuple(own))

            state.update(f"{kind}: warming up")
            # In a collection of its own, since the workers' figures are of all the records of a collection.
            _phase(db, broker, load(f"{kind}-warm", asked.repeat, asked.warmup), kind, asked)
            phases, floors = [], []
            for at in range(asked.repeat):
                state.update(f"{kind}: {at + 1} of {asked.repeat}")
                if kind == "vectors":
                    floors.append(_floor(load(f"{kind}-raw-{at}", at, asked.warmup + asked.seconds), asked.warmup))
                phases.append(_phase(db, broker, load(f"{kind}-{at}", at, asked.seconds), kind, asked))
            results[f"{kind}, ms"], results[f"{kind}, load"] = _tables(phases, floors)
            criteria += _criteria(kind, rate, results[f"{kind}, ms"]["freshness"], phases)
    report = Report.of("freshness", asked.seed, results, criteria)
    show(report, console)
    if asked.json:
        report.write(asked.json)
    return 0 if report.held else 1


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace bench freshness",
        description="Kafka's timestamp to searchable on all copies, for vectors and texts, with the parts of the way.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="measured seconds of each repetition")
    parser.add_argument("--warmup", type=float, default=5.0, help="seconds before, whose records are not counted")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions; medians and their spread are reported")
    parser.add_argument("--rate", type=float, default=2000.0, help="vectors per second")
    parser.add_argument("--text-rate", type=float, default=100.0, help="texts per second")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--replicas", type=int, default=2, help="copies of each cell")
    parser.add_argument("--probe-every", type=float, default=0.1, metavar="S", help="seconds between a client's writes")
    parser.add_argument("--only", choices=("vectors", "texts"), help="leave the other kind out")
    parser.add_argument("--seed", type=int, default=0, help="of vectors and of the order of texts")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    return parser


def _phase(
    db: headrace.Database, broker: headrace.EmbeddedBroker, load: Load, kind: str, asked: argparse.Namespace
) -> Phase:
    """One repetition in a collection of its own, since the workers' figures are those of a collection's whole life."""
    collection = db.create_collection(load.topic, dim=DIM, encoder=ENCODERS[kind], replicas=asked.replicas)
    collection.ingest(load.bootstrap, load.topic, format="json" if load.texts else "binary")
    write = _probes(collection, load)
    write()  # the graph runs and the encoder is loaded when this returns
    generator = Generator(load)
    pids: dict[str, list[int | None]] = {
        "workers": list(db.workers.values()),
        "broker": [broker.pid],
        "generator": [generator.process.pid],
        "client and scheduler": [os.getpid()],
    }
    began = {name: _cpu_seconds(some) for name, some in pids.items()}
    waited: list[float] = []
    start = generator.go()
    while generator.running():
        due = start + len(waited) * asked.probe_every
        time.sleep(max(0.0, due - time.time()))
        write()
        waited.append((time.time() - due) * 1e3)
    took = time.time() - start
    used = {f"{name}, cores": (_cpu_seconds(some) - began[name]) / took for name, some in pids.items()}
    sent = generator.close()
    expected = load.count + 2 + len(waited)
    status = _settled(collection, expected)
    missing = expected - collection.count(consistency="strong", deadline=30.0)
    differing = len(collection.verify(deadline=30.0).differences)
    db.drop_collection(load.topic)
    ingest = status["ingest"]
    return Phase(
        ingest["freshness_ms"],
        ingest["stages_ms"],
        quantiles(waited),
        {
            "records/s": sent["rate"],
            "late p99, ms": sent["late_p99"],
            "late max, ms": sent["late_max"],
            "not acknowledged": sent["failed"],
            "missing": float(missing),
            "without a figure": float(expected - ingest["freshness_ms"]["count"]),
            "copies that differ": float(differing),
            "records per batch": ingest["records"] / max(1, ingest["batches"]),
            **used,
        },
    )


def _probes(collection: headrace.Collection, load: Load) -> Callable[[], None]:
    """A function that writes one record and returns when all copies can find it."""
    rng, numbers = np.random.default_rng(load.seed + 1), iter(range(sys.maxsize))

    def write() -> None:
        number = next(numbers)
        row: dict[str, Any] = {"id": f"probe-{number}"}
        if load.texts:
            row["text"] = f"Probe {number}: {load.texts[number % len(load.texts)]}"
        else:
            row["vector"] = rng.standard_normal(DIM, dtype=np.float32)
        collection.upsert([row], wait="searchable", deadline=30.0)
        if collection.get([row["id"]], consistency="eventual")[0] is None:
            raise headrace.ClusterError(f"{row['id']} was said to be searchable and is not: the figures mean nothing")

    return write


def _settled(collection: headrace.Collection, expected: int, patience: float = 30.0) -> Mapping[str, Any]:
    """The collection's status once its figures cover all records, or when patience is at an end."""
    until = time.monotonic() + patience
    while True:
        status: Mapping[str, Any] = collection.status()
        if status["ingest"]["freshness_ms"]["count"] >= expected or time.monotonic() > until:
            return status
        time.sleep(0.2)


def _floor(load: Load, warmup: float) -> tuple[dict[str, float | None], float]:
    """The same stream through a bare consumer: quantiles of its records' ages in ms, and the achieved rate."""
    consumer = Consumer(
        {
            **COMMON_SETTINGS,
            "bootstrap.servers": load.bootstrap,
            "group.id": load.topic,
            "enable.auto.commit": "false",
            "fetch.wait.max.ms": "3",
            "fetch.queue.backoff.ms": "1",
        },
        logger=KafkaLog(),
    )
    consumer.assign([TopicPartition(load.topic, number, 0) for number in range(TOPIC_PARTITIONS)])
    generator = Generator(load)
    counted = (generator.go() + warmup) * 1e3
    ages: list[float] = []
    left, until = load.count + 1, time.monotonic() + load.seconds + 10.0
    while left > 0 and time.monotonic() < until:
        first = consumer.poll(0.1)
        if first is None:
            continue
        for message in (first, *consumer.consume(255, 0)):
            if error := message.error():
                raise KafkaException(error)
            np.frombuffer(message.value() or b"", dtype="<f4")
            left -= 1
            stamp = message.timestamp()[1]
            if stamp >= counted:
                ages.append(time.time() * 1e3 - stamp)
    consumer.close()
    return quantiles(ages), generator.close()["rate"]


def _tables(
    phases: Sequence[Phase], floors: Sequence[tuple[Mapping[str, float | None], float]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    def over(rows: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> dict[str, Any]:
        return {name: spread(row[name] for row in rows) for name in names}

    whole = ("p50", "p95", "p99", "max")
    table = {"freshness": over([phase.freshness for phase in phases], whole)}
    for stage in phases[0].stages:
        table[STAGES.get(stage, stage)] = over([phase.stages[stage] for phase in phases], ("p50", "p99"))
    table["probe"] = over([phase.probe for phase in phases], whole)
    figures: dict[str, Any] = {name: spread(phase.figures[name] for phase in phases) for name in phases[0].figures}
    if floors:
        table["raw floor"] = over([floor for floor, _ in floors], whole)
        table["ours / raw"] = {
            name: spread(
                _ratio(phase.freshness[name], floor[name]) for phase, (floor, _) in zip(phases, floors, strict=True)
            )
            for name in ("p50", "p99")
        }
        figures["raw floor, records/s"] = spread(rate for _, rate in floors)
    return table, figures


def _criteria(
    kind: str, rate: float, freshness: Mapping[str, Mapping[str, float | None]], phases: Sequence[Phase]
) -> list[Criterion]:
    def worst(name: str) -> float:
        return max(phase.figures[name] for phase in phases)

    share = min(phase.figures["records/s"] for phase in phases) / rate
    return [
        *(
            criterion(f"{kind}: freshness {name}", freshness[name]["median"], "ms", aim)
            for name, aim in AIMS[kind].items()
        ),
        criterion(f"{kind}: achieved rate", round(share, 4), "of the asked", ">= 0.95"),
        criterion(f"{kind}: records that are missing", worst("missing"), "records", "== 0"),
        criterion(f"{kind}: records without a figure", worst("without a figure"), "records", "== 0"),
        criterion(f"{kind}: cells whose copies differ", worst("copies that differ"), "cells", "== 0"),
    ]


def _ratio(ours: float | None, raw: float | None) -> float | None:
    return ours / raw if ours is not None and raw else None


def _texts(kind: str, count: int, seed: int) -> tuple[str, ...]:
    if kind != "texts":
        return ()
    # The standard library's only: what else is installed would be another corpus on every machine.
    docs = docstrings(count, seed=seed, roots=[sysconfig.get_path("stdlib")])
    return tuple(islice(cycle(doc.text for doc in docs), count))


def _cpu_seconds(pids: Sequence[int | None]) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def _rows(load: Load) -> list[Row]:
    """All records before the first is due: encoding them is not what is timed. One more, to be sent at the start."""
    ids = [f"{load.topic}-{number}" for number in range(load.count + 1)]
    if load.texts:
        texts = (load.texts[number % len(load.texts)] for number in range(len(ids)))
        return [(*encode_json(id_, text=text), []) for id_, text in zip(ids, texts, strict=True)]
    # In clusters, as embeddings are: on noise alone no codebook would have anything to learn.
    rng = np.random.default_rng(load.seed)
    centres = rng.standard_normal((256, DIM), dtype=np.float32)
    vectors = centres[rng.integers(len(centres), size=len(ids))]
    vectors += 0.7 * rng.standard_normal(vectors.shape, dtype=np.float32)
    encoded = (encode_binary(id_, vector) for id_, vector in zip(ids, vectors, strict=True))
    return [(key, value, [*headers]) for key, value, headers in encoded]


def _generate(load: Load, pipe: Connection) -> None:
    """The generator's process: answers "ready", waits for a word, then sends to the schedule and reports."""
    acknowledged = 0

    def arrived(error: KafkaError | None, _: Message) -> None:
        nonlocal acknowledged
        acknowledged += error is None

    producer = Producer(
        {
            **COMMON_SETTINGS,
            **PROFILES["durable"],
            "bootstrap.servers": load.bootstrap,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": str(load.count + 1),  # waiting for room would be keeping to no schedule
        },
        logger=KafkaLog(),
    )
    first, *rows = _rows(load)
    producer.produce(load.topic, key=first[0], value=first[1], headers=first[2])
    producer.flush(10.0)
    gc.freeze()  # a collection would go through all rows, and the schedule would wait for it
    pipe.send("ready")
    pipe.recv()
    start = time.time() + 0.05
    pipe.send(start)
    late: list[float] = []
    period, done = max(BURST, 1.0 / load.rate), 0
    while done < len(rows):
        due = start + len(late) * period
        time.sleep(max(0.0, due - time.time()))
        late.append((time.time() - due) * 1e3)
        upto = min(len(rows), round(len(late) * period * load.rate))
        for key, value, headers in rows[done:upto]:
            producer.produce(
                load.topic, key=key, value=value, headers=headers, timestamp=int(due * 1e3), on_delivery=arrived
            )
        done = upto
        producer.poll(0)
    took = max(time.time() - start, load.seconds)
    producer.flush(10.0)
    found = quantiles(late)
    pipe.send(
        {
            "rate": acknowledged / took,
            "failed": float(len(rows) - acknowledged),
            "late_p99": found["p99"] or 0.0,
            "late_max": found["max"] or 0.0,
        }
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
