"""The commands that run a cluster's processes: ``up``, ``scheduler``, ``worker``."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import click

from headrace.gpu.errors import ClusterError
from headrace.pipeline.cli_common import Command, typed

if TYPE_CHECKING:
    from headrace.pipeline.processes import Child

__all__ = ["scheduler", "up", "worker"]

_START_SECONDS = 60.0

host_option = click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; others than this machine need TLS."
)
port_option = click.option(
    "--port", default=8786, show_default=True, type=click.IntRange(0, 65535), help="The scheduler's port."
)
dashboard_option = click.option(
    "--dashboard",
    default=":8787",
    show_default=True,
    help="Where the Dask dashboard listens; a port alone: for this machine only.",
)
backend_option = click.option(
    "--backend", default=None, type=click.Choice(["auto", "host", "rapids"]), help="[default: as configured]"
)
role_option = click.option(
    "--role",
    default=None,
    type=click.Choice(["ingest", "search", "both"]),
    help="Read topics, hold rows and answer, or both.  [default: as configured]",
)
parent_option = click.option("--end-with-parent", is_flag=True, hidden=True)


@click.command(cls=Command, short_help="Run a cluster on this machine.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Worker processes.")
@click.option(
    "--ingest-workers",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="As many besides that only read topics; the other workers only hold rows and answer then.",
)
@host_option
@port_option
@dashboard_option
@backend_option
@click.option(
    "--snapshots",
    metavar="URL",
    help="Folder or URL of all collections' snapshots: what is there comes back, and new ones are taken there.",
)
def up(
    workers: int,
    ingest_workers: int,
    host: str,
    port: int,
    dashboard: str,
    backend: str | None,
    snapshots: str | None,
) -> None:
    """Run a cluster on this machine until Ctrl-C. Processes that die are started again, the scheduler too.

    With --snapshots, every collection that has one there is restored first, and has one taken as often as
    headrace.snapshots.every says.

    \b
    Examples:
      headrace up
      headrace up --workers 4 --port 9786 --dashboard :9787
      headrace up --workers 2 --ingest-workers 1
      headrace up --snapshots /var/snapshots
    """
    import headrace
    from headrace.pipeline.cli_snapshot import bring_back, keep_at
    from headrace.pipeline.launch import check_host, dashboard_address
    from headrace.pipeline.processes import Child

    check_host(host)
    dashboard_address(dashboard, host)
    with typed():
        place = keep_at(snapshots)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    port = _free_port(host, port)
    everybody = workers + ingest_workers
    where = ["--host", host, "--port", str(port), "--dashboard", dashboard, "--workers", str(everybody)]
    children = [Child(["scheduler", *where, *(["--backend", backend] if backend else [])])]
    try:
        _until_listening(host, port, children[0], stop)
        children[0].keep()
        with headrace.connect(_address(host, port), timeout=_START_SECONDS) as database:
            run = ["worker", database.address, "--host", host, "--workers"]
            roles = {"search": workers, "ingest": ingest_workers} if ingest_workers else {None: workers}
            for role, count in roles.items():
                children.append(Child([*run, str(count), *(["--role", role] if role else [])]))
                children[-1].keep()
            until = time.monotonic() + _START_SECONDS
            while len(database.workers) < everybody and time.monotonic() < until and not stop.wait(0.1):
                pass
            click.echo(f"scheduler  {database.address}")
            click.echo(f"dashboard  {database.dashboard}")
            click.echo(f'connect    headrace.connect("{database.address}")')
            if place and not stop.is_set():
                bring_back(database, place)
            click.echo("Ctrl-C stops it")
            stop.wait()
            click.echo("stopping", err=True)
            database.end_cluster()
    finally:
        for child in reversed(children):
            child.stop()


@click.command(cls=Command, short_help="Run a cluster's scheduler.")
@host_option
@port_option
@dashboard_option
@backend_option
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Worker processes on each machine: they share its cores.",
)
@parent_option
def scheduler(host: str, port: int, dashboard: str, backend: str | None, workers: int, end_with_parent: bool) -> None:
    """Run a cluster's scheduler until Ctrl-C; workers are started with `headrace worker`, here or on other machines.

    Ended or killed, start it again at the same address: workers stay up and answer, and return to it with all they
    know. They end by themselves when none has come for an hour (scheduler.patience), or with Ctrl-C where they run.

    \b
    Examples:
      headrace scheduler
      headrace scheduler --port 9786 --dashboard :9787
    """
    from headrace.pipeline import processes

    def ready(address: str) -> None:
        click.echo(f"scheduler  {address}")
        click.echo(f"workers    headrace worker {address}")
        click.echo(f'connect    headrace.connect("{address}")')

    if end_with_parent:
        processes.end_with_parent()
    asyncio.run(processes.run_scheduler(host, port, dashboard, backend, workers, ready))


@click.command(cls=Command, short_help="Run workers of a cluster.")
@click.argument("address")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Worker processes.")
@role_option
@host_option
@parent_option
def worker(address: str, workers: int, role: str | None, host: str, end_with_parent: bool) -> None:
    """Run workers for the scheduler at ADDRESS until Ctrl-C; those that die are started again.

    With Ctrl-C (or SIGTERM) they end once the other workers have what they hold, or after half a minute
    (headrace.worker.drain); with a second one, at once.

    \b
    Examples:
      headrace worker tcp://127.0.0.1:8786
      headrace worker tcp://127.0.0.1:8786 --workers 4
      headrace worker tcp://127.0.0.1:8786 --role ingest
    """
    from headrace.pipeline import processes

    if end_with_parent:
        processes.end_with_parent()
    asyncio.run(processes.run_workers(address, workers, host, role))


def _address(host: str, port: int) -> str:
    """How clients and workers reach a scheduler that listens at `host`."""
    from distributed.comm.utils import ensure_concrete_host

    from headrace.pipeline import encryption

    # For 0.0.0.0, an address of this machine that others know.
    concrete = ensure_concrete_host(host)  # type: ignore[no-untyped-call]
    return f"{encryption.scheme()}://{f'[{concrete}]' if ':' in concrete else concrete}:{port}"


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Dask would say only that its scheduler did not start."""
    try:
        # As the scheduler will: a connection that has just ended does not hold the port.
        with socket.create_server((host, port)) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        raise ClusterError(f"nothing can listen at {host}:{port} ({why}): choose another port with --port") from error


def _until_listening(host: str, port: int, child: Child, stop: threading.Event) -> None:
    from headrace.pipeline import encryption

    until = time.monotonic() + _START_SECONDS
    while not stop.is_set():
        try:
            return encryption.greet(host, port, timeout=1.0)
        except OSError as error:
            if (code := child.code) is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}: its words are above"
                raise ClusterError(f"the scheduler's process {how}") from error
            if time.monotonic() > until:
                raise ClusterError(f"no scheduler listened at {host}:{port} after {_START_SECONDS:g} s") from error
        time.sleep(0.05)
