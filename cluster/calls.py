"""Calling a Headrace handler on another Dask server, with a deadline, and turning every failure into a Headrace error.

A handler in ``worker.handlers`` answers in under a millisecond where a task through the scheduler takes ten; it runs
on the event loop, so handlers hand anything long to an executor.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from headrace.gpu.errors import ClusterError, HeadraceError, error_named

__all__ = ["Call", "answering", "call"]

log = logging.getLogger("headrace.cluster")

Call = Callable[..., Awaitable[dict[str, Any]]]
"""``await call(address, op, deadline=seconds, **message)``: see `call`."""

Handler = Callable[..., Awaitable[dict[str, Any]]]


async def call(pool: Any, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
    """Ask `address` to do ``headrace_<op>`` and wait for its answer.

    Parameters
    ----------
    pool : distributed.core.ConnectionPool
        ``worker.rpc``, ``scheduler.rpc`` or ``client.rpc``.
    deadline : float
        Seconds.

    Raises
    ------
    ClusterError
        No answer in time, the connection broke, or nobody there knows the call.
    HeadraceError
        Whatever the handler raised, as the same class.
    """
    try:
        # Not `wait_for`: on Python 3.11 it makes a task, and what is sent would wait for the loop's next turn.
        async with asyncio.timeout(deadline):
            answer = await getattr(pool(address), f"headrace_{op}")(**message)
    except TimeoutError as error:
        raise ClusterError(f"{address} did not answer '{op}' within {deadline:g} s") from error
    except (OSError, RuntimeError) as error:  # distributed's CommClosedError; a pool that is closed already
        raise ClusterError(f"{address} cannot be reached for '{op}': {error}") from error
    if answer is None:  # how a Dask server answers a call that it does not know
        raise ClusterError(f"{address} does not know the call '{op}': is Headrace running there?")
    if "error" in answer:
        raise error_named(*answer["error"])
    return answer  # type: ignore[no-any-return]


def answering(handler: Handler) -> Handler:
    """Let a handler's errors travel as ``{"error": (class, message)}``, so that no exception is pickled to the
    caller.
    """

    @functools.wraps(handler)
    async def wrapped(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await handler(*args, **kwargs)
        except HeadraceError as error:
            return {"error": [type(error).__name__, str(error)]}
        except Exception as error:
            log.exception("%s failed", handler.__name__)
            return {"error": ["HeadraceError", f"{handler.__name__} failed: {type(error).__name__}: {error}"]}

    return wrapped
