"""One cuVS handle for each thread: a handle holds libraries' own state and scratch space, which cost time to make."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cuvs.common import Resources

__all__ = ["handle"]

_threads = threading.local()


@contextmanager
def handle() -> Iterator[Any]:
    """This thread's handle, to give to cuVS as ``resources``; all work given to it has ended when the block has.

    cuVS works on the thread's default stream, CuPy on the device's legacy stream: CUDA itself puts these two
    in order.
    """
    resources = getattr(_threads, "resources", None)
    if resources is None:
        resources = _threads.resources = Resources()
    try:
        yield resources
    finally:
        # Even after an error: kernels that run must not outlive the arrays of the caller.
        resources.sync()
