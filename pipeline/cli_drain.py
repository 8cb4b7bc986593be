"""The command ``drain``: a worker is emptied before it is stopped."""

from __future__ import annotations

import click

from headrace.pipeline.cli_common import Command, Seconds, cluster_option, connected

__all__ = ["drain"]


@click.command(cls=Command, short_help="Empty a worker before it is stopped.")
@click.argument("worker")
@click.option("--undo", is_flag=True, help="Let the worker have cells again.")
@click.option(
    "--deadline",
    default=600.0,
    show_default=True,
    type=Seconds(),
    help="Seconds to wait until it is empty.",
)
@cluster_option
def drain(worker: str, undo: bool, deadline: float, cluster: str) -> None:
    """Move all that WORKER holds to the others; its address is in `headrace status`.

    It goes on answering until the others have its rows, so no read fails and no copy is missing; when this command
    ends, the worker can be stopped. Moving goes on if the command is interrupted.

    \b
    Examples:
      headrace drain tcp://127.0.0.1:40123
      headrace drain tcp://127.0.0.1:40123 --undo
    """
    told = -1

    def progress(left: int) -> None:
        nonlocal told
        if left != told:
            click.echo(f"{left} rows left on {worker}", err=True)
        told = left

    with connected(cluster) as database:
        database.drain(worker, undo=undo, deadline=deadline, progress=progress)
    click.echo(f"{worker} may hold cells again" if undo else f"{worker} holds nothing any more and can be stopped")
