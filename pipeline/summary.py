"""One picture of a collection from what its workers say. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from headrace.cluster.roles import BOTH, may_ingest
from headrace.cluster.state import CollectionState
from headrace.pipeline.clocks import apart, clock_notes
from headrace.pipeline.metrics import Histogram

__all__ = ["summarise"]

_FEW_ROWS = 4096  # of which an exact search takes no longer than one by an index


def summarise(
    state: CollectionState,
    workers: Sequence[Mapping[str, Any]],
    ingests: Sequence[Mapping[str, Any]],
    clocks: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What `Collection.status` returns.

    Parameters
    ----------
    workers : sequence of mapping
        Each `Replica.status`, or address and state of one that does not answer.
    ingests : sequence of mapping
        Each `Ingest.status`.
    clocks : mapping of str to float, optional
        Worker to seconds that its clock is ahead of this client's.
    """
    short = [cell for cell in state.cells if len(state.serving[cell]) < state.spec.replicas]
    silent = [str(worker["address"]) for worker in workers if "rows" not in worker]
    notes = []
    if short:
        notes.append(f"{len(short)} of {len(state.cells)} cells have fewer than {state.spec.replicas} complete copies")
    if not state.members:
        notes.append(
            "no worker that may hold rows is there: records wait in Kafka, and reads for a worker; start one with the "
            "role 'search' or 'both'"
        )
    elif state.source and not may_ingest(state.members, state.roles):
        notes.append(
            "no worker that may read the topic is there: records wait in Kafka; start one with the role 'ingest' or "
            "'both'"
        )
    if silent:
        notes.append(f"no answer from {', '.join(silent)}")
    full = {str(worker["address"]) for worker in workers if worker.get("memory", {}).get("full")}
    full.update(*(ingest["full"] for ingest in ingests))
    if full:
        notes.append(
            f"{', '.join(sorted(full))} reached store.memory-limit: records wait in Kafka, deletes behind them too; "
            "add a worker or raise the limit"
        )
    if mortal := {str(why) for worker in workers if (why := worker.get("ends_with_scheduler"))}:
        notes.append(f"workers end when the scheduler does: {', '.join(sorted(mortal))}")
    if state.restoring:
        loading = f"snapshot {state.restoring.snapshot or 'not chosen yet'} is being loaded from {state.restoring.url}"
        hindered = f"; it is not loaded yet: {state.snapshots.obstacle}" if state.snapshots.obstacle else ""
        notes.append(f"{loading}: reads wait for it{hindered}")
    if state.snapshots.failed:
        notes.append(f"the last snapshot failed: {state.snapshots.failed}")
    kafka_away = [_outage(ingest) for ingest in ingests if ingest["kafka_away"]]
    notes += _away_notes(kafka_away)
    early = {str(ingest["worker"]): float(ingest["skew_ms"]) for ingest in ingests}
    notes += clock_notes(clocks or {}, early)
    faults = list(notes)
    if slower := [segment for worker in workers for segment in _unreached(worker, state.spec.index.recall_target)]:
        worst = min(segment["reached"] for segment in slower)
        notes.append(
            f"{len(slower)} segments are searched exactly, which takes longer: their indexes reach a recall of "
            f"{worst:.4g}, not {state.spec.index.recall_target:g}; make the collection with a lower recall_target, a "
            "better index, or index='flat'"
        )
    skew = max([0.0, *early.values(), *(1e3 * abs(seconds) for seconds in apart(clocks or {}).values())])
    sizes: dict[int, int] = {}
    for worker in workers:
        for cell, rows in worker.get("cell_sizes", ()):
            sizes[cell] = max(sizes.get(cell, 0), rows)
    histograms = {
        name: Histogram.sum(i["stages"][name] for i in ingests) for name in (ingests[0]["stages"] if ingests else ())
    }
    return {
        "name": state.spec.name,
        "state": "degraded" if faults or state.alarms else "healthy",
        "notes": notes,
        "alarms": list(state.alarms),
        "epoch": state.epoch,
        "incarnation": state.incarnation,
        "moving": state.moving,
        "rows": sum(sizes.values()),
        "cells": len(state.codebook.cells),
        "codebook": state.codebook.generation,
        "topic": state.source and state.source.topic,
        "schema": dict(state.schema),
        "snapshots": _snapshots(state),
        "placement": {cell: list(holders) for cell, holders in state.copies.items()},
        "workers": [_worker(worker, state) for worker in workers],
        "ingest": {
            **{
                name: sum(ingest[name] for ingest in ingests)
                for name in ("records", "deletes", "batches", "foreign", "lag", "rate")
            },
            "dead_letters": _dead_letters(ingests),
            "kafka_away": kafka_away,
            "freshness_ms": {
                **Histogram.sum(ingest["freshness"] for ingest in ingests).summary(),
                "early": sum(ingest["early"] for ingest in ingests),
                "clock_skew": round(skew, 3),
            },
            "stages_ms": {name: histogram.summary() for name, histogram in histograms.items()},
        },
    }


def _dead_letters(ingests: Sequence[Mapping[str, Any]]) -> int:
    """What the readers have counted; or what is in the topic of dead letters, also from before there were they."""
    ends: dict[int, int] = {}
    for ingest in ingests:
        for tp, end in ingest["letters"]:
            ends[tp] = max(ends.get(tp, 0), end)
    counted = sum(int(ingest["dead_letters"]) for ingest in ingests)
    return max(counted, sum(ends.values()))


def _unreached(worker: Mapping[str, Any], target: float) -> list[Mapping[str, Any]]:
    """Segments, not small ones, whose index was not seen to reach the collection's recall."""
    large = (segment for segment in worker.get("segments", ()) if segment["rows"] >= _FEW_ROWS)
    return [segment for segment in large if segment.get("reached", 1.0) < target]


def _snapshots(state: CollectionState) -> dict[str, Any]:
    known = state.snapshots
    plan = {"url": known.url, "every": known.every, "keep": known.keep} if known.url else None
    last = {"name": known.last, "url": known.last_url, "created": known.last_at, "rows": known.last_rows}
    return {"schedule": plan, "last": last if known.last else None, "failed": known.failed}


def _away_notes(outages: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each broker and what is wrong with it, however many workers say so."""
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for outage in outages:
        alike.setdefault((outage["broker"], outage["error"]), []).append(outage)
    return [
        f"Kafka is away since {_time(min(outage['since'] for outage in told))} for "
        f"{', '.join(sorted(outage['worker'] for outage in told))}: {broker}: {error}; records wait there and are read "
        "when it is back, what is indexed can be searched"
        for (broker, error), told in alike.items()
    ]


def _outage(ingest: Mapping[str, Any]) -> dict[str, Any]:
    since, broker, error = ingest["kafka_away"]
    return {"worker": str(ingest["worker"]), "since": since, "broker": broker, "error": error}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _worker(worker: Mapping[str, Any], state: CollectionState) -> dict[str, Any]:
    shown = {name: value for name, value in worker.items() if name not in ("cell_sizes", "ends_with_scheduler")}
    if worker["address"] in state.leaving and "rows" in worker:
        busy = worker["rows"] or worker["address"] in state.readers.values()
        shown["state"] = "draining" if busy else "drained"
    shown["role"] = state.roles.get(worker["address"], BOTH)
    if "watermarks" in shown:
        shown["watermarks"] = dict(shown["watermarks"])
        shown["segment_sizes"] = [dict(segment) for segment in shown["segments"]]
        shown["segments"] = len(shown["segments"])
        shown["bytes_by_purpose"] = dict(shown["bytes"])
        shown["bytes"] = sum(shown["bytes"].values())
    return shown
