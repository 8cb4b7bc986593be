"""The end of the program, for what works in the background: it must be over before the interpreter goes.

A daemon thread that comes back from C++ while the interpreter goes, or asks it something from there as FAISS does while
it builds a graph, takes the process down (``terminate called without an active exception``). So who works in the
background says so, looks now and then whether it is to stop, and is waited for.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Ending", "at_work", "check", "wait"]

_PATIENCE = 20.0
"""Seconds: most work stops within one; k-means of FAISS cannot be stopped."""

_here = threading.Condition()
_at_work = 0
_ends = False


class Ending(Exception):
    """The program ends, and background work is given up."""


@contextmanager
def at_work() -> Iterator[None]:
    """Is waited for at the end of the program. Thread-safe.

    Raises
    ------
    Ending
        It has come: nothing is begun any more.
    """
    global _at_work
    with _here:
        check()
        _at_work += 1
    try:
        yield
    finally:
        with _here:
            _at_work -= 1
            _here.notify_all()


def check() -> None:
    """Raise `Ending` if the program ends."""
    if _ends:
        raise Ending("the program ends")


@atexit.register
def wait() -> None:
    """Have all that is `at_work` stop, and wait for it; called by the interpreter."""
    global _ends
    with _here:
        _ends = True
        _here.wait_for(lambda: not _at_work, _PATIENCE)
