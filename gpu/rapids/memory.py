"""The device's memory: one RMM pool that counts, for cuDF, cuVS and CuPy alike.

Without a pool every buffer costs a call to the driver, which waits for the device; and three libraries that allocate
apart from each other cannot be held to one limit.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

import cupy as cp
import rmm.mr
from rmm.allocators.cupy import rmm_cupy_allocator

from headrace.gpu.errors import BackendError

__all__ = ["start", "statistics", "used"]

log = logging.getLogger("headrace.gpu")

_GRAIN = 256
_FIRST_SHARE = 4


@dataclass(frozen=True, slots=True)
class _Pool:
    limit: int | None
    resource: Any
    counted: Any


_lock = threading.Lock()
_started: _Pool | None = None


def start(limit: int | None) -> None:
    """Make the pool and have everything allocate from it; see `headrace.gpu.backend.Memory.start`.

    The pool begins with a quarter of what it may grow to: `limit`, or what is free on the device. A pool that is there
    already (dask-cuda's ``rmm_pool_size``) is kept and counted; the limit is then laid over it. Called again with the
    same limit it does nothing.

    Raises
    ------
    BackendError
        The pool was started with another limit, the limit is too small, or the device has not so much memory free.
    """
    global _started
    with _lock:
        if _started is not None:
            if _started.limit != limit:
                raise BackendError(
                    f"the device's memory is limited to {_started.limit} bytes already, not {limit}: "
                    "give every worker of a process the same limit"
                )
            return
        if limit is not None and limit < _FIRST_SHARE * _GRAIN:
            raise BackendError(f"a memory limit of {limit} bytes holds nothing: give at least some megabytes")
        resource = _resource(limit)
        counted = rmm.mr.StatisticsResourceAdaptor(resource)
        rmm.mr.set_current_device_resource(counted)
        cp.cuda.set_allocator(rmm_cupy_allocator)
        _started = _Pool(limit, resource, counted)


def used() -> int | None:
    """Bytes allocated from the pool now; None before `start`."""
    return None if _started is None else int(_started.counted.allocation_counts.current_bytes)


def statistics() -> dict[str, int]:
    """In bytes: ``used`` now, its ``peak``, what the pool has ``reserved``, ``free`` and ``total`` of the device.

    Before `start`, and where the pool is not ours, what cannot be told is left out.
    """
    free, total = rmm.mr.available_device_memory()
    figures = {"free": int(free), "total": int(total)}
    if _started is not None:
        counts = _started.counted.allocation_counts
        figures |= {"used": int(counts.current_bytes), "peak": int(counts.peak_bytes)}
        if isinstance(_started.resource, rmm.mr.PoolMemoryResource):
            figures["reserved"] = int(_started.resource.pool_size())
    return figures


def _resource(limit: int | None) -> Any:
    present = rmm.mr.get_current_device_resource()
    if not isinstance(present, rmm.mr.CudaMemoryResource):
        log.info("device memory: keeping the %s that is there", type(present).__name__)
        return present if limit is None else rmm.mr.LimitingResourceAdaptor(present, limit)
    free, _ = rmm.mr.available_device_memory()
    most = (int(free) if limit is None else limit) // _GRAIN * _GRAIN
    first = most // _FIRST_SHARE // _GRAIN * _GRAIN
    log.info("device memory: a pool of %d bytes, growing to %d", first, most)
    try:
        return rmm.mr.PoolMemoryResource(present, initial_pool_size=first, maximum_pool_size=most)
    except MemoryError as error:
        raise BackendError(
            f"cannot reserve {first} of at most {most} bytes on the device, where {free} are free: "
            "lower the memory limit, or end what else uses the device"
        ) from error
