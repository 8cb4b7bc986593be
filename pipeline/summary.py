"""One picture of a collection from what its workers say. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.cluster.state import CollectionState
from headrace.pipeline.metrics import Histogram

__all__ = ["summarise"]


def summarise(
    state: CollectionState, workers: Sequence[Mapping[str, Any]], ingests: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `Collection.status` returns.

    Parameters
    ----------
    workers : sequence of mapping
        Each `Replica.status`, or address and state of one that does not answer.
    ingests : sequence of mapping
        Each `Ingest.status`.
    """
    short = [cell for cell in state.cells if len(state.serving[cell]) < state.spec.replicas]
    silent = [str(worker["address"]) for worker in workers if "rows" not in worker]
    notes = []
    if short:
        notes.append(f"{len(short)} of {len(state.cells)} cells have fewer than {state.spec.replicas} complete copies")
    if silent:
        notes.append(f"no answer from {', '.join(silent)}")
    full = {str(worker["address"]) for worker in workers if worker.get("memory", {}).get("full")}
    full.update(*(ingest["full"] for ingest in ingests))
    if full:
        notes.append(
            f"{', '.join(sorted(full))} reached store.memory-limit: records wait in Kafka; add a worker or raise "
            "the limit"
        )
    if mortal := {str(why) for worker in workers if (why := worker.get("ends_with_scheduler"))}:
        notes.append(f"workers end when the scheduler does: {', '.join(sorted(mortal))}")
    sizes: dict[int, int] = {}
    for worker in workers:
        for cell, rows in worker.get("cell_sizes", ()):
            sizes[cell] = max(sizes.get(cell, 0), rows)
    histograms = {
        name: Histogram.sum(i["stages"][name] for i in ingests) for name in (ingests[0]["stages"] if ingests else ())
    }
    return {
        "name": state.spec.name,
        "state": "degraded" if notes or state.alarms else "healthy",
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
        "placement": {cell: list(holders) for cell, holders in state.copies.items()},
        "workers": [_worker(worker, state) for worker in workers],
        "ingest": {
            **{
                name: sum(ingest[name] for ingest in ingests)
                for name in ("records", "deletes", "dead_letters", "batches", "foreign", "lag", "rate")
            },
            "freshness_ms": Histogram.sum(ingest["freshness"] for ingest in ingests).summary(),
            "stages_ms": {name: histogram.summary() for name, histogram in histograms.items()},
        },
    }


def _worker(worker: Mapping[str, Any], state: CollectionState) -> dict[str, Any]:
    shown = {name: value for name, value in worker.items() if name not in ("cell_sizes", "ends_with_scheduler")}
    if worker["address"] in state.leaving and "rows" in worker:
        shown["state"] = "draining" if worker["rows"] else "drained"
    if "watermarks" in shown:
        shown["watermarks"] = dict(shown["watermarks"])
        shown["segment_sizes"] = [dict(segment) for segment in shown["segments"]]
        shown["segments"] = len(shown["segments"])
        shown["bytes_by_purpose"] = dict(shown["bytes"])
        shown["bytes"] = sum(shown["bytes"].values())
    return shown
