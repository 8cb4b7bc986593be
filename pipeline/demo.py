"""The demo: a stream of documents, an index that follows it, and a check of every one.

What is streamed lies on every machine: the docstrings of the Python that runs it. Nothing is taken on trust: what must
be there is known from Kafka's acknowledgements, what is there is read from every copy.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import headrace
from headrace.gpu.errors import ConfigError
from headrace.pipeline.cli_common import shielded
from headrace.pipeline.demo_checks import Seen, compare, exact_scores, percentiles, recall
from headrace.pipeline.demo_display import Display
from headrace.pipeline.demo_stream import Ledger, MemoryPeak, Pacer, Searcher, stream

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from headrace.pipeline.client import Collection, Database
    from headrace.pipeline.corpus import Doc
    from headrace.pipeline.results import Row

__all__ = ["QUESTIONS", "Options", "check", "run"]

TOPIC = "docstrings"
TOPIC_PARTITIONS = 4
CHANGED, DELETED = 0.05, 0.02
QUERIES, FEW_WORDS = 500, 6
LEAST_RECALL = 0.95
MOST_WORKERS, PER_CORE = 16, 4
"""On any machine, and for each core of a large one: more processes would only stand in each other's way."""
PACKAGES = ("headrace", "dask", "distributed", "streamz", "confluent-kafka", "numpy", "faiss-cpu", "onnxruntime")

QUESTIONS = (
    "moving average of a series",
    "read a csv file into a table",
    "wait until several tasks are finished",
    "remove duplicate rows",
    "parse a date written as text",
    "run a program and capture its output",
)


@dataclass(frozen=True)
class Options:
    """What `run` is asked for; `rate` in records a second, None for as many as it can take."""

    docs: int = 20_000
    rate: float | None = None
    workers: int = 2
    copies: int = 2
    encoder: str = "minilm"
    backend: str = "auto"
    seed: int = 0
    report: Path | None = None
    keep: bool = False


def check(options: Options) -> None:
    """Refuse what cannot be before anything is started.

    Raises
    ------
    ConfigError
        There are more copies than workers, more workers than this machine can run, or the report cannot be written.
    """
    most = max(MOST_WORKERS, PER_CORE * (os.cpu_count() or 1))
    if options.workers > most:
        raise ConfigError(f"{options.workers} workers are too many for this machine: ask for {most} or fewer")
    if options.copies > options.workers:
        raise ConfigError(
            f"{options.copies} copies cannot be on {options.workers} workers, because each is on another one: ask for "
            f"--workers {options.copies} or --copies {options.workers}"
        )
    if (report := options.report) is not None:
        if report.is_dir() or not report.parent.is_dir():
            raise ConfigError(f"the report cannot be written to {report}: name a file in a folder that is there")
        if not os.access(report if report.exists() else report.parent, os.W_OK):
            raise ConfigError(f"the report cannot be written to {report}: this user may not write there")


def run(options: Options) -> int:
    """Run the demo.

    Returns
    -------
    int
        0 if every check held, else 1.

    Raises
    ------
    HeadraceError
        As `check`; or something is missing, could not be started or was not reached.
    """
    began = time.monotonic()
    check(options)
    # Before fifteen seconds are spent on reading: a backend or an encoder that is not there is told at once.
    from headrace.gpu.backend import resolve
    from headrace.pipeline.encoders import describe

    if options.backend != "auto":
        resolve(options.backend)
    describe(options.encoder)
    with Display() as display, MemoryPeak() as memory:
        docs = _read(options, display)
        display.phase("starting a broker and a cluster")
        with contextlib.ExitStack() as stack:
            with shielded():
                broker = stack.enter_context(headrace.EmbeddedBroker(topics={TOPIC: TOPIC_PARTITIONS}))
                db = stack.enter_context(
                    headrace.connect(
                        workers=options.workers, processes=True, backend=options.backend, dashboard="127.0.0.1:0"
                    )
                )
            collection = db.create_collection(TOPIC, encoder=options.encoder, replicas=options.copies)
            collection.ingest(broker.bootstrap, topic=TOPIC)
            _warm_up(collection, options)
            display.done(f"broker {broker.bootstrap}, scheduler {db.address}, {options.workers} workers")
            report, ledger = _stream(collection, docs, options, display)
            report |= _check(collection, ledger, options, display)
            report |= _about(db, broker.bootstrap, options)
            report["seconds"] = round(time.monotonic() - began, 1)
            report["memory_mb"] = round(memory.peak / 1e6)
            report["held"] = _held(report)
            if options.report is not None:
                options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            display.pause()
            display.summary(report, report["held"])
            for question in QUESTIONS:
                _ask(collection, question, display)
            if options.keep:
                _stay(collection, db, display)
    return 0 if report["held"] else 1


def _read(options: Options, display: Display) -> list[Doc]:
    from headrace.pipeline.corpus import docstrings

    display.phase("reading the docstrings of this Python")
    docs = list(
        docstrings(
            options.docs, seed=options.seed, on_progress=lambda done, files: display.progress(done, files, "files")
        )
    )
    display.done(f"{len(docs):,} documents")
    if len(docs) < options.docs:
        display.say(f"  {options.docs:,} were asked for; this Python and its packages have no more")
    return docs


def _warm_up(collection: Collection, options: Options) -> None:
    """Have every worker load its model, which is no part of a record's way: searches and counts take them in turn."""
    turns = random.Random(0)
    for _ in range(4 * options.workers):
        collection.search(QUESTIONS[0], deadline=60.0)
        for _ in range(turns.randint(0, 2)):
            collection.count(deadline=60.0)


def _stream(
    collection: Collection, docs: Sequence[Doc], options: Options, display: Display
) -> tuple[dict[str, Any], Ledger]:
    ledger, pacer, chosen = Ledger(), Pacer(options.rate), random.Random(options.seed)
    changed = [
        {"id": doc.id, "text": f"In the second edition: {doc.text}"} | _attributes(doc)
        for doc in chosen.sample(docs, round(len(docs) * CHANGED))
    ]
    deleted = chosen.sample([doc.id for doc in docs], round(len(docs) * DELETED))
    rows = [{"id": doc.id, "text": doc.text} | _attributes(doc) for doc in docs]

    def upsert(some: Sequence[Mapping[str, str]]) -> None:
        ledger.upserted(collection.upsert(some), {row["id"]: row["text"] for row in some})

    def delete(some: Sequence[str]) -> None:
        ledger.removed(collection.delete(some))

    def show(total: int) -> Any:
        def shown(sent: int, state: Mapping[str, Any]) -> None:
            taken = state["ingest"]
            freshness = taken["freshness_ms"]
            display.progress(
                sent,
                total,
                rate=f"{pacer.speed:.0f}/s",
                freshness=f"{freshness['p50']:.0f} ms (99 %: {freshness['p99']:.0f} ms)",
                lag=f"{taken['lag']}",
                searches=f"{len(searcher.took)}",
            )

        return shown

    questions = [*QUESTIONS, *(_cut(doc.text) for doc in docs[:100])]
    with Searcher(collection, questions, ledger) as searcher:
        display.phase(f"streaming {len(rows):,} documents through Kafka, and searching")
        took = stream(collection, rows, upsert, ledger, pacer, show(len(rows)))
        display.done(f"{len(rows) / took:.0f} documents a second")
        display.phase(f"changing {len(changed):,} documents, deleting {len(deleted):,}")
        stream(collection, changed, upsert, ledger, pacer, show(len(changed)))
        stream(collection, deleted, delete, ledger, pacer, show(len(deleted)))
        display.done("done")
    taken = collection.status()["ingest"]
    return {
        "documents": len(docs),
        "changed": len(changed),
        "deleted": len(deleted),
        "records": ledger.sent,
        "documents_per_second": round(len(docs) / took, 1),
        "freshness_ms": taken["freshness_ms"],
        "stages_ms": taken["stages_ms"],
        "search_ms": percentiles(searcher.took),
        "searches": len(searcher.took),
        "session_search_ms": percentiles(searcher.session_took),
        "session_searches": len(searcher.session_took),
        "session_misses": len(searcher.misses),
        "search_errors": len(searcher.errors),
        "search_error_examples": searcher.errors[:5],
    }, ledger


def _check(collection: Collection, ledger: Ledger, options: Options, display: Display) -> dict[str, Any]:
    import numpy as np

    display.phase("reading every document from every copy")
    state = collection.status()
    # What a copy still has to apply would look like a loss.
    counted = collection.count(consistency="session", deadline=30.0)
    copies = {
        worker["address"]: [_seen(row) for row in collection.scan(worker=worker["address"])]
        for worker in state["workers"]
    }
    ids = [*ledger.expected, *sorted(ledger.deleted - ledger.expected.keys())]
    rows: dict[str, Row | None] = {}
    for some in _pieces(ids, 1000):
        rows |= zip(some, collection.get(some, vectors=True, deadline=30.0), strict=True)
        display.progress(len(rows), len(ids))
    answers = [(name, None if row is None else _seen(row)) for name, row in rows.items()]
    found = compare(ledger.expected, copies, answers, options.copies)
    verification = collection.verify(deadline=60.0)
    display.done(f"{len(ledger.expected):,} ids on {len(copies)} workers")

    display.phase(f"comparing {QUERIES} searches with exact ones")
    live = [name for name in ledger.expected if rows[name] is not None]
    vectors = np.stack([row.vector for name in live if (row := rows[name]) is not None and row.vector is not None])
    queries = _queries(ledger, options)
    hits = [
        [str(hit.id) for hit in answer]
        for some in _pieces(queries, 50)
        for answer in collection.search(some, limit=10, consistency="session", deadline=30.0)
    ]
    share = recall(live, exact_scores(vectors, queries), hits)
    display.done(f"recall@10 {share:.4f}")
    return {
        "count": counted,
        "missing": len(found.missing),
        "ghosts": len(found.ghosts),
        "stale": len(found.stale),
        "difference_examples": {
            kind: [list(item) for item in getattr(found, kind)[:5]] for kind in ("missing", "ghosts", "stale")
        },
        "verify": verification.ok,
        "verify_differences": list(verification.differences)[:5],
        "dead_letters": state["ingest"]["dead_letters"],
        "alarms": list(state["alarms"]),
        "recall_at_10": round(share, 5),
        "queries": len(queries),
    }


def _queries(ledger: Ledger, options: Options) -> npt.NDArray[np.float32]:
    """Half of them documents cut short, as people ask; the others the questions, and whole documents."""
    from headrace.pipeline.encoders import load_encoder

    texts = [wanted.text for wanted in ledger.expected.values()]
    some = random.Random(options.seed + 1).choices(texts, k=QUERIES)
    short, whole = some[: QUERIES // 2], [*QUESTIONS, *some[QUERIES // 2 :]][: QUERIES - QUERIES // 2]
    return load_encoder(options.encoder).encode([*map(_cut, short), *whole])


def _held(report: Mapping[str, Any]) -> bool:
    nothing = ("missing", "ghosts", "stale", "dead_letters", "session_misses", "search_errors")
    return (
        all(report[name] == 0 for name in nothing)
        and report["verify"]
        and report["count"] == report["documents"] - report["deleted"]
        and report["freshness_ms"]["count"] >= report["records"]
        and report["recall_at_10"] >= LEAST_RECALL
    )


def _about(db: Database, bootstrap: str, options: Options) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    from headrace.gpu.backend import resolve

    return {
        "backend": resolve(options.backend).name,
        "encoder": options.encoder,
        "workers": options.workers,
        "copies": options.copies,
        "rate": options.rate or "auto",
        "seed": options.seed,
        "broker": bootstrap,
        "cluster": db.address,
        "dashboard": db.dashboard,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "versions": versions,
    }


def _ask(collection: Collection, question: str, display: Display) -> None:
    hits = collection.search(question, limit=5)
    display.answers(question, [(hit.score, str(hit.id), str(hit.attributes["text"])) for hit in hits])


def _stay(collection: Collection, db: Database, display: Display) -> None:
    display.say(f"\nDask dashboard: {db.dashboard}\nscheduler: {db.address}\nAsk something; an empty line ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        _ask(collection, question, display)


def _attributes(doc: Doc) -> dict[str, str]:
    return {"package": doc.package, "module": doc.module, "kind": doc.kind}


def _seen(row: Row) -> Seen:
    return Seen(str(row.id), row.topic_partition, row.offset, str(row.attributes.get("text")))


def _cut(text: str) -> str:
    return " ".join(text.split()[:FEW_WORDS])


def _pieces(items: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
