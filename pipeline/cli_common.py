"""What the commands have in common: their options, how they connect, how they print."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from headrace.gpu.errors import ConfigError

if TYPE_CHECKING:
    from headrace.pipeline.client import Database

__all__ = [
    "Command",
    "Seconds",
    "Session",
    "broker_option",
    "cluster_option",
    "connected",
    "debug_option",
    "json_option",
    "plain_json",
    "shielded",
    "table",
    "typed",
]


PATIENCE = 5.0
"""Seconds that a scheduler may take to answer: one that is there needs milliseconds, one on a busy machine a second."""


@dataclass
class Session:
    """What one run of the program knows, whichever command runs."""

    debug: bool = False


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).debug = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
)
cluster_option = click.option(
    "--cluster",
    default="127.0.0.1:8786",
    show_default=True,
    metavar="ADDRESS",
    help="The cluster's scheduler, as `headrace up` prints it.",
)
broker_option = click.option(
    "--broker",
    default="localhost:9092",
    show_default=True,
    metavar="HOST:PORT",
    help="Kafka's bootstrap servers, with commas between.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class Seconds(click.FloatRange):
    """A number of seconds that will pass: above 0, or 0 too, and no more than a computer can wait for."""

    name = "seconds"

    def __init__(self, *, or_none: bool = False) -> None:
        super().__init__(0, 1e9, min_open=not or_none)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:
            self.fail(f"{value!r} is no number of seconds.", param, ctx)
        return seconds


class Command(click.Command):
    """A command that takes ``--debug`` and refuses to start on a configuration that cannot be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        debug_option(self)

    def invoke(self, ctx: click.Context) -> Any:
        """Check the configuration, then run."""
        from headrace.pipeline import config

        config.check()
        return super().invoke(ctx)


@contextmanager
def shielded() -> Iterator[None]:
    """While processes are started: they, and the threads that start them again, will not be told of a Ctrl-C.

    A terminal sends it to every process, and each worker would die of it with a traceback; the program that started
    them ends them in order. Its own Ctrl-C comes when this is over.
    """
    from multiprocessing import resource_tracker

    # It is started before the first process, and lets the signal through again when it has been.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def connected(address: str) -> Iterator[Database]:
    """A client of the cluster at `address`, closed at the end."""
    import headrace
    from headrace.pipeline import encryption

    if address.startswith("tls://"):
        encryption.check_certificates("client", of=address)  # what lacks there is no mistake in the command line
    with typed():
        database = headrace.connect(address, timeout=PATIENCE)
    with database:
        yield database


@contextmanager
def typed() -> Iterator[None]:
    """While what was typed is looked at: what cannot be is a mistake in the command line, with the exit code of one."""
    try:
        yield
    except ConfigError as error:
        raise click.UsageError(str(error), ctx=click.get_current_context(silent=True)) from error


def plain_json(value: Any) -> str:
    """JSON as the commands print it: indented, NumPy's numbers as numbers, object keys as text."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print a table for people; the columns named in `right` hold numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", show_edge=False)
    for heading in headings:
        drawn.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        # Text, because rich would take the square brackets of somebody's document for its own markup.
        drawn.add_row(*(Text(str(cell)) for cell in row))
    Console().print(drawn)
