"""The commands about what is on a cluster: ``create``, ``status``, ``drop``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from headrace.pipeline.cli_common import Command, cluster_option, connected, json_option, plain_json, table, typed

__all__ = ["create", "drop", "status"]


@click.command(cls=Command, short_help="Create a collection.")
@click.argument("name")
@click.option("--dim", type=click.IntRange(1), help="Numbers in a vector; known already where there is an encoder.")
@click.option("--encoder", help="The model that turns texts into vectors, such as minilm.")
@click.option("--metric", default="cosine", show_default=True, type=click.Choice(["cosine", "ip", "l2"]))
@click.option("--cells", type=click.IntRange(1), help="Units of placement and copying.  [default: as configured]")
@click.option("--replicas", type=click.IntRange(1), help="Copies of each cell.  [default: as configured]")
@click.option("--ids", default="string", show_default=True, type=click.Choice(["string", "integer"]))
@click.option(
    "--index",
    default="graph",
    show_default=True,
    type=click.Choice(["graph", "flat", "ivf_pq"]),
    help="A graph, an exact scan, or compressed codes.",
)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "float16"]),
    help="How vectors are kept; float16 takes half the memory.",
)
@click.option(
    "--recall-target",
    type=float,
    metavar="SHARE",
    help="Recall that a search must reach, such as 0.99.  [default: 0.95]",
)
@cluster_option
@json_option
def create(
    name: str,
    dim: int | None,
    encoder: str | None,
    metric: str,
    cells: int | None,
    replicas: int | None,
    ids: str,
    index: str,
    dtype: str,
    recall_target: float | None,
    cluster: str,
    as_json: bool,
) -> None:
    """Create collection NAME, of texts (--encoder) or of vectors (--dim).

    \b
    Examples:
      headrace create docs --encoder minilm
      headrace create points --dim 128 --metric l2 --ids integer
      headrace create many --dim 768 --index ivf_pq --dtype float16 --recall-target 0.9
    """
    from headrace.pipeline.arguments import index_spec
    from headrace.pipeline.specs import make_spec

    if dim is None and encoder is None:
        raise click.UsageError("give --dim, the vectors' length, or --encoder", ctx=click.get_current_context())
    with typed():  # before the connection is made, so that it is told at once
        wanted = make_spec(name, dim, metric, encoder, cells, replicas, ids, None)
        index_spec(wanted.dim, index, dtype, recall_target)
    with connected(cluster) as database:
        collection = database.create_collection(
            name,
            dim=dim,
            encoder=encoder,
            metric=metric,
            cells=cells,
            replicas=replicas,
            ids=ids,
            index=index,
            dtype=dtype,
            recall_target=recall_target,
        )
        spec = collection.spec.to_wire()
    if as_json:
        click.echo(plain_json(spec))
    else:
        built = spec.pop("index")
        shown = {"index": built.pop("kind"), **{each: value for each, value in built.items() if value is not None}}
        facts = {each: value for each, value in spec.items() if each not in ("name", "uid")} | shown
        table("", ["collection", name], list(facts.items()))


@click.command(cls=Command, short_help="Drop a collection.")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@cluster_option
def drop(name: str, yes: bool, cluster: str) -> None:
    """Forget collection NAME and all its rows; its topic in Kafka stays, and a new collection can read it again.

    \b
    Examples:
      headrace drop docs
      headrace drop docs --yes
    """
    with connected(cluster) as database:
        rows = database.collection(name).status()["rows"]
        if not (yes or _sure(f"drop collection {name} and its {rows} rows?")):
            raise click.Abort
        database.drop_collection(name)
    click.echo(f"collection {name} is dropped ({rows} rows)")


def _sure(question: str) -> bool:
    try:
        return click.confirm(question)
    except click.Abort:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        context = click.get_current_context()
        raise click.UsageError("nobody answers on standard input: --yes drops without asking", ctx=context) from None


@click.command(cls=Command, short_help="Show how collections are.")
@click.argument("name", required=False)
@cluster_option
@json_option
def status(name: str | None, cluster: str, as_json: bool) -> None:
    """Show how collection NAME is, or all of them.

    \b
    Examples:
      headrace status
      headrace status docs --json
    """
    with connected(cluster) as database:
        names = [name] if name else database.collections()
        states = [database.collection(each).status() for each in names]
        workers = len(database.workers)
    if as_json:
        click.echo(plain_json(states[0] if name else {"workers": workers, "collections": states}))
    elif not states:
        click.echo(f"{workers} workers, no collection yet: headrace create NAME makes one")
    for state in [] if as_json else states:
        _show(state)


def _show(state: Mapping[str, Any]) -> None:
    taken = state.get("ingest") or {}
    freshness = taken.get("freshness_ms") or {}
    facts = {
        "state": state["state"],
        "rows": state["rows"],
        "cells": state["cells"],
        "epoch": state["epoch"],
        "codebook": state["codebook"],
        **{each: taken[each] for each in ("records", "deletes", "dead_letters", "lag") if each in taken},
        "freshness": ", ".join(
            f"{each} {freshness[each]:.0f} ms" for each in ("p50", "p95", "p99") if freshness.get("count")
        )
        + (f" (clocks differ by {skew / 1e3:.1f} s)" if (skew := freshness.get("clock_skew")) else ""),
        "kafka": ", ".join(
            f"away for {outage['worker']}: {outage['broker']}: {outage['error']}"
            for outage in taken.get("kafka_away", [])
        )
        or ("answers" if state.get("topic") else ""),
        "snapshot": (state["snapshots"]["last"] or {}).get("name", ""),
    }
    table(state["name"], ["", "collection"], [(key, value) for key, value in facts.items() if value != ""])
    shared = any(worker["role"] != "both" for worker in state["workers"])
    rows = [
        (
            worker["address"],
            worker["state"],
            *([worker["role"]] if shared else []),
            worker.get("rows", "?"),
            worker.get("segments", "?"),
            f"{worker.get('bytes', 0) / 2**20:.1f}",
            _recall(worker.get("segment_sizes", [])),
        )
        for worker in state["workers"]
    ]
    names = ["worker", "state", *(["role"] if shared else []), "rows", "segments", "MiB", "recall"]
    table("", names, rows, right=["rows", "segments", "MiB"])
    for sentence in [*state.get("notes", []), *state.get("alarms", [])]:
        click.echo(f"! {sentence}")


def _recall(segments: Sequence[Mapping[str, Any]]) -> str:
    """What searches find in a worker's segments: the lowest calibrated recall, and how many are searched exactly though
    they have an index that is not exact itself.
    """
    indexed = [segment for segment in segments if segment.get("index") in ("graph", "ivf_pq")]
    walked = [segment["recall"] for segment in indexed if segment.get("effort") is not None]
    exact = sum(segment.get("effort", 0) is None and segment.get("reached", 1.0) < 1 for segment in indexed)
    told = [f"{min(walked):.3f}"] if walked else []
    return ", ".join(told + [f"{exact} exact"] * bool(exact)) or "exact"
