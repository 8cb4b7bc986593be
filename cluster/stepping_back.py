"""Work in the background that leaves the processor to whoever waits."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from headrace.gpu.ending import at_work

__all__ = ["stepping_back"]

T = TypeVar("T")


def stepping_back(work: Callable[[], T]) -> T:
    """Do something with only the processor time that applies and searches leave.

    The thread keeps its place afterwards: it is to be one of its own. Linux counts niceness by thread; elsewhere this
    is plain `work`. A program that ends has it stop, and waits for that.

    Raises
    ------
    Ending
        The program ends.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    with at_work():
        return work()
