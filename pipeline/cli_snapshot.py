"""The commands ``snapshot`` and ``restore``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from headrace.pipeline.cli_common import Command, Seconds, cluster_option, connected, json_option, plain_json, table

if TYPE_CHECKING:
    from headrace.pipeline.client import Database
    from headrace.pipeline.results import Restoration, Snapshot

__all__ = ["bring_back", "keep_at", "recovery_table", "restore", "snapshot"]


@click.command(cls=Command, short_help="Write a collection to disk or an object store.")
@click.argument("name")
@click.argument("url", required=False)
@click.option("--every", type=Seconds(or_none=True), help="From now on take one every so many seconds; 0 ends that.")
@click.option("--keep", type=click.IntRange(0), help="Keep so many there, the newest ones.  [default: all]")
@click.option("--list", "listing", is_flag=True, help="Show what is at a place; NAME is then the folder or URL.")
@click.option("--check", is_flag=True, help="With --list: read every file there and say which snapshots are whole.")
@cluster_option
@json_option
def snapshot(
    name: str,
    url: str | None,
    every: float | None,
    keep: int | None,
    listing: bool,
    check: bool,
    cluster: str,
    as_json: bool,
) -> None:
    """Write collection NAME to the folder or URL; reads and writes go on, and what was written before stays.

    \b
    Examples:
      headrace snapshot docs /var/snapshots/docs
      headrace snapshot docs s3://bucket/docs --every 600 --keep 5
      headrace snapshot --list s3://bucket/docs --check
    """
    if listing is (url is not None):
        raise click.UsageError("give a collection and a folder or URL; or --list and a folder or URL")
    if check and not listing:
        raise click.UsageError("--check goes with --list and a folder or URL")
    if listing and not (every is None and keep is None):
        raise click.UsageError("--every and --keep are for a snapshot that is taken, and --list takes none")
    if not (url or name).strip():
        raise click.UsageError("the folder or URL is empty")
    with connected(cluster) as database:
        if url is None:
            found = database.snapshots(name, check=check)
        else:
            found = [database.collection(name).snapshot(url, every=every, keep=keep)]
    if as_json:
        plain = [asdict(one) for one in found]
        click.echo(plain_json(plain if listing else plain[0]))
    else:
        if not found:
            click.echo(f"there are no snapshots at {name}")
            return
        _show(found, "whole" if check else "good")


@click.command(cls=Command, short_help="Make a collection from a snapshot.")
@click.argument("url")
@click.option("--collection", "name", help="Its name.  [default: the one it had]")
@click.option("--snapshot", "which", metavar="NAME", help="Which one.  [default: the newest that is not damaged]")
@click.option("--replicas", type=click.IntRange(1), help="Copies of each cell.  [default: as before]")
@click.option("--no-ingest", is_flag=True, help="Restore the rows alone, and never read a topic.")
@click.option(
    "--take-over", is_flag=True, help="Snapshots of it go there from now on; whoever wrote them is refused there then."
)
@click.option("--deadline", default=3600.0, show_default=True, type=Seconds(), help="How long to wait for it.")
@cluster_option
@json_option
def restore(
    url: str,
    name: str | None,
    which: str | None,
    replicas: int | None,
    no_ingest: bool,
    take_over: bool,
    deadline: float,
    cluster: str,
    as_json: bool,
) -> None:
    """Make a collection from the newest good snapshot at the folder or URL, then read its topic from there on.

    \b
    Examples:
      headrace restore s3://bucket/docs --take-over
      headrace restore /var/snapshots/docs --collection docs2 --json
    """
    if not url.strip():
        raise click.UsageError("the folder or URL is empty")
    with connected(cluster) as database:
        told = database.restore(
            url, name, snapshot=which, replicas=replicas, ingest=not no_ingest, take_over=take_over, deadline=deadline
        )
    if as_json:
        click.echo(plain_json(asdict(told)))
    else:
        recovery_table(told)


def keep_at(url: str | None) -> str:
    """Have this process, and those that it starts, take snapshots at `url`; the option's own if None. Gives the URL."""
    import dask

    from headrace.gpu.errors import ConfigError
    from headrace.pipeline import config
    from headrace.pipeline.arguments import snapshot_url

    if url is not None and not url.strip():
        raise ConfigError("--snapshots is empty: give a folder or a URL, or leave the option out")
    place = snapshot_url(config.get("snapshots.url") or "" if url is None else url)
    if place:
        os.environ["DASK_HEADRACE__SNAPSHOTS__URL"] = place
        dask.config.set({"headrace.snapshots.url": place})
    return place


def bring_back(database: Database, url: str) -> None:
    """Restore every collection that has snapshots below `url` and is not there; say so of each, also if it failed.

    This cluster was given the place to write to, so they are taken over. One that was dropped does not come back by
    itself; of several folders with one name's, the one with the newest snapshot counts.
    """
    from headrace.cluster.snapshot_owner import read_mark
    from headrace.gpu.errors import HeadraceError
    from headrace.gpu.snapshot_place import Place
    from headrace.pipeline import config

    options, newest = config.snapshot_options(), dict[str, tuple[float, str]]()
    for folder in Place(url, options).names(""):
        try:
            found = database.snapshots(f"{url}/{folder}")
        except HeadraceError as error:
            click.echo(f"! {folder} is not restored: {error}", err=True)
            continue
        good = [one for one in found if not one.problem]
        for one in good or found[-1:]:
            name, at = (one.collection, one.created) if good else (folder, 0.0)
            newest[name] = max(newest.get(name, (0.0, "")), (at, folder))
    there = set(database.collections())
    for name, (_, folder) in sorted(newest.items()):
        if name in there:
            continue
        place = f"{url}/{folder}"
        try:
            mark = read_mark(Place(place, options))
            if mark is not None and mark.ended:
                click.echo(f"  {name} was dropped and stays so; headrace restore {place} brings it back")
                continue
            recovery_table(database.restore(place, take_over=True))
        except HeadraceError as error:
            click.echo(f"! {folder} is not restored: {error}", err=True)


def recovery_table(told: Restoration) -> None:
    """Print what came back, how much of it, and how long it took."""
    for sentence in told.passed_over:
        click.echo(f"! {sentence}")
    columns = ["worker", "cells", "rows", "MB", "adopted", "rebuilt", "s"]
    rows = [
        (one.worker, one.cells, one.rows, f"{one.bytes / 1e6:.1f}", one.adopted, one.rebuilt, f"{one.seconds:.2f}")
        for one in told.workers
    ]
    total = [
        sum(getattr(one, what) for one in told.workers) for what in ("cells", "rows", "bytes", "adopted", "rebuilt")
    ]
    rows.append(("all", total[0], total[1], f"{total[2] / 1e6:.1f}", total[3], total[4], f"{told.seconds:.2f}"))
    table(f"{told.collection}, from snapshot {told.snapshot.name}", columns, rows, right=columns[1:])
    if told.catch_up_seconds is not None:
        click.echo(f"{told.replayed} records were read from the log in {told.catch_up_seconds:.2f} s: it is up to date")
    elif told.replayed:
        click.echo(f"{told.replayed} records were read from the log, and it is not up to date yet")


def _show(found: Sequence[Snapshot], sound: str) -> None:
    rows = [
        (
            one.name,
            one.rows if not one.problem else "",
            f"{one.bytes_written / 1e6:.1f}" if not one.problem else "",
            f"{one.bytes / 1e6:.1f}" if not one.problem else "",
            f"{one.seconds:.2f}" if not one.problem else "",
            one.problem or sound,
        )
        for one in found
    ]
    columns = ["snapshot", "rows", "MB new", "MB in all", "s", "state"]
    table(", ".join(sorted({one.collection for one in found if one.collection})), columns, rows, right=columns[1:5])
