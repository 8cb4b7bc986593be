"""What the demo shows: a live picture in a terminal, plain lines every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

__all__ = ["Display"]

PLAIN_EVERY = 5.0
"""Seconds between two lines of progress in a log."""
SHOWN_LENGTH = 100
"""Characters of a document that fit beside its name."""


class Display:
    """One thing is going on at a time: `phase` begins it, `progress` says how far it is. Not thread-safe."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._live: Live | None = None
        self._phase = ""
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """Stop drawing, for good: what follows is printed below."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, text: str) -> None:
        """Begin the next thing."""
        self._phase = text
        self._began = self._told = time.monotonic()
        if self._live is None:
            self.console.print(Text(text))
        self._draw("")

    def progress(self, done: int, total: int, what: str = "documents", **figures: str) -> None:
        """How far the phase is; `figures` are shown beside it."""
        line = f"{done:,} of {total:,} {what}" + "".join(f"  {name} {figure}" for name, figure in figures.items())
        if self._live is None:
            if time.monotonic() - self._told >= PLAIN_EVERY:
                self._told = time.monotonic()
                self.console.print(Text(f"  {line}"), soft_wrap=True)
            return
        self._draw(line)

    def done(self, text: str) -> None:
        """The phase is over; one line stays of it."""
        self.console.print(Text(f"  {text} ({time.monotonic() - self._began:.1f} s)"), soft_wrap=True)

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def summary(self, report: Mapping[str, Any], held: bool) -> None:
        """The report as a table."""
        drawn = Table(title="What was checked, and what was measured", title_justify="left", show_edge=False)
        drawn.add_column("")
        drawn.add_column("", justify="right")
        for name, value in _rows(report):
            drawn.add_row(Text(name), Text(value))
        self.console.print()
        self.console.print(drawn)
        verdict = "Every document is where it must be." if held else "SOMETHING IS WRONG: see the figures above."
        self.console.print(Text(verdict, style="bold green" if held else "bold red"))

    def answers(self, question: str, hits: Sequence[tuple[float, str, str]]) -> None:
        """A question, and what was found: (score, id, text)."""
        drawn = Table(title=Text(f"\n“{question}”"), title_justify="left", show_edge=False, show_header=False)
        drawn.add_column(justify="right", no_wrap=True)
        drawn.add_column(overflow="fold")
        for score, name, text in hits:
            shown = text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 1] + "…"
            drawn.add_row(f"{score:.2f}", Text.assemble((name, "bold"), "  ", shown))
        self.console.print(drawn)

    def _draw(self, line: str) -> None:
        if self._live is not None:
            elapsed = f"  {time.monotonic() - self._began:.0f} s"
            self._live.update(Spinner("dots", Text.assemble((self._phase, "bold"), "  ", line, (elapsed, "dim"))))


def _rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name in (
        "documents",
        "changed",
        "deleted",
        "documents_per_second",
        "freshness_ms",
        "search_ms",
        "session_search_ms",
        "session_misses",
        "recall_at_10",
        "missing",
        "ghosts",
        "stale",
        "dead_letters",
        "verify",
        "copies",
        "backend",
        "memory_mb",
        "seconds",
    ):
        value = report.get(name)
        if isinstance(value, Mapping):
            value = "  ".join(f"{key} {number:,.0f} ms" for key, number in value.items() if key != "count")
        elif isinstance(value, bool):
            agree = "all copies agree" if report.get("copies", 2) > 1 else "one copy, nothing to compare it with"
            value = agree if value else "COPIES DIFFER"
        elif isinstance(value, float):
            value = f"{value:,.4f}" if name.startswith("recall") else f"{value:,.1f}"
        elif isinstance(value, int):
            value = f"{value:,}"
        if value not in (None, ""):
            yield (
                name.removesuffix("_ms").removesuffix("_mb").replace("_", " "),
                f"{value}{' MB' if name == 'memory_mb' else ''}",
            )
