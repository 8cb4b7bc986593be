"""Progress on stderr: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["progress"]

PATIENCE, EVERY = 2.0, 5.0
"""Seconds after which it is said what is being done, and between two lines of how far it is."""

_bar = threading.Lock()


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is; the function that it gives takes what is done and what there is to do.

    Without a terminal a line is written after two seconds, and then now and then; none for what was quicker. One within
    another is shown as lines too: a terminal has room for one bar.
    """
    console = Console(stderr=True)
    if console.is_terminal and _bar.acquire(blocking=False):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        finally:
            _bar.release()
        return
    began = last = time.monotonic()

    def say(text: str) -> None:
        print(f"{title}: {text}", file=sys.stderr, flush=True)

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            say(f"{done:,} of {total:,}, {now - began:.0f} s")

    first = threading.Timer(PATIENCE, say, ["begun"])
    first.daemon = True
    first.start()
    try:
        yield line
    finally:
        first.cancel()
        took = time.monotonic() - began
        if took >= PATIENCE:
            say(f"{took:.0f} s")
