"""The command ``verify``: do all copies agree, and mend those that do not."""

from __future__ import annotations

from dataclasses import asdict

import click

from headrace.pipeline.cli_common import Command, Seconds, cluster_option, connected, json_option, plain_json, table

__all__ = ["verify"]


@click.command(cls=Command, short_help="Compare all copies, and mend what differs.")
@click.argument("name")
@click.option("--repair", is_flag=True, help="Mend what differs, by what the topic's log has.")
@click.option("--deep", is_flag=True, help="Compare vectors and attributes too, not only ids and versions.")
@click.option(
    "--deadline", default=60.0, show_default=True, type=Seconds(), help="A repair may have to read all of the topic."
)
@json_option
@cluster_option
def verify(name: str, repair: bool, deep: bool, deadline: float, as_json: bool, cluster: str) -> int:
    """Compare all copies of every cell of collection NAME; reads and writes go on meanwhile.

    Ends with 1 if the copies differ, or could not be compared in time.

    \b
    Examples:
      headrace verify docs
      headrace verify docs --repair --deadline 600
      headrace verify docs --deep --json
    """
    with connected(cluster) as database:
        told = database.collection(name).verify(repair=repair, deep=deep, deadline=deadline)
    if as_json:
        click.echo(plain_json(asdict(told)))
        return 0 if told.ok else 1
    if told.ids:
        rows = [
            (one.id, "" if one.cell is None else one.cell, worker, fault)
            for one in told.ids
            for worker, fault in one.copies.items()
        ]
        table(f"{told.differing} ids differed", ("id", "cell", "worker", "which"), rows, right=("cell",))
    for sentence in told.differences:
        click.echo(sentence)
    mended = f"; {told.repaired} of {told.differing} ids were mended" if told.differing and repair else ""
    verdict = "agree" if told.ok else "do not agree, or could not be compared"
    click.echo(f"{told.copies} copies of {told.cells} cells {verdict}{mended}")
    return 0 if told.ok else 1
