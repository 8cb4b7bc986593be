"""The process's own memory, as the operating system counts it: a host has no allocator of ours to ask."""

from __future__ import annotations

import psutil

__all__ = ["start", "statistics", "used"]

_process = psutil.Process()


def start(limit: int | None) -> None:
    """Nothing to prepare; see `headrace.gpu.backend.Memory.start`. The limit is kept by whoever admits writes."""


def used() -> int:
    """Bytes of the process that are in memory (RSS): indexes, buffers, and everything else it holds."""
    return int(_process.memory_info().rss)


def statistics() -> dict[str, int]:
    """``used`` (RSS) and ``reserved`` (address space) of the process; ``free`` and ``total`` of the machine, in bytes.

    ``free`` is what can be had without swapping.
    """
    own, machine = _process.memory_info(), psutil.virtual_memory()
    return {
        "used": int(own.rss),
        "reserved": int(own.vms),
        "free": int(machine.available),
        "total": int(machine.total),
    }
