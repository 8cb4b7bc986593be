"""``headrace demo``: its options."""

from __future__ import annotations

from pathlib import Path

import click

from headrace.pipeline.cli_common import Command, typed

__all__ = ["demo"]


class Rate(click.ParamType[float | None]):
    """A number of records a second, or ``auto``, which is None."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """A rate from text."""
        if value is None or value == "auto":
            return None
        try:
            rate = float(str(value))
        except ValueError:
            rate = 0.0
        if not 0 < rate < float("inf"):
            self.fail(f"{value!r} is neither 'auto' nor a number of records a second", param, ctx)
        return rate


@click.command(cls=Command, short_help="See it work and check itself.")
@click.option("--docs", default=20_000, show_default=True, type=click.IntRange(100), help="Documents to stream.")
@click.option("--rate", type=Rate(), default="auto", show_default=True, help="Records a second; auto: all it can take.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Worker processes.")
@click.option(
    "--copies", type=click.IntRange(1), help="Copies of every document, each on another worker; 2, or 1 on one worker."
)
@click.option("--encoder", default="minilm", show_default=True, help="The model that turns texts into vectors.")
@click.option("--backend", default="auto", show_default=True, type=click.Choice(["auto", "host", "rapids"]))
@click.option("--seed", default=0, show_default=True, help="Decides which documents, in which order.")
@click.option("--json", "report", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here.")
@click.option("--keep", is_flag=True, help="Stay up afterwards, with a prompt for questions.")
def demo(
    docs: int,
    rate: float | None,
    workers: int,
    copies: int | None,
    encoder: str,
    backend: str,
    seed: int,
    report: Path | None,
    keep: bool,
) -> int:
    """Stream this Python's docstrings through Kafka into an index, search them meanwhile, and check every one.

    Everything runs on this machine: a broker in a process of its own, a cluster of worker processes, a collection. The
    exit code is 0 only if nothing was lost, nothing deleted came back, nothing old was left and the copies agree.

    \b
    Examples:
      headrace demo
      headrace demo --docs 2000 --json report.json
      headrace demo --rate 50 --keep
    """
    from headrace.pipeline import demo as implementation

    options = implementation.Options(
        docs=docs,
        rate=rate,
        workers=workers,
        copies=min(2, workers) if copies is None else copies,
        encoder=encoder,
        backend=backend,
        seed=seed,
        report=report,
        keep=keep,
    )
    with typed():
        implementation.check(options)
    return implementation.run(options)
