"""Asking another copy when one is slow: how long is slow, and whose answer counts.

The first answer wins, as in "hedged requests" (Dean and Barroso, The Tail at Scale, CACM 2013). The delay after which
a second copy is asked is learnt from recent answers, so that few healthy requests are asked twice; a budget bounds them
where all copies become slow at once, when asking twice would only make it worse. A copy that has said nothing at all
since it was asked is no part of that: the caller lets every request to it go to another.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from headrace.gpu.errors import ClusterError, CollectionNotFound, StaleEpoch

__all__ = ["Pace", "hedged", "let_go"]

T = TypeVar("T")

_SEEN = 128
_SHARE = 0.95
_LEAST, _MOST, _UNKNOWN = 0.01, 0.25, 0.05
_BUDGET = 0.1
_SAVED = 10.0


class Pace:
    """How long one kind of request takes lately. Belongs to one event loop."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_SEEN)
        self._tokens = _SAVED

    def took(self, seconds: float) -> None:
        """A request was answered by the copy that was asked first."""
        self._seconds.append(seconds)
        self._tokens = min(_SAVED, self._tokens + _BUDGET)

    @property
    def patience(self) -> float:
        """Seconds to wait before another copy is asked: what 95 % of recent requests needed, and half as much again."""
        if len(self._seconds) < 10:
            return _UNKNOWN
        ranked = sorted(self._seconds)
        usual = ranked[math.ceil(_SHARE * len(ranked)) - 1]
        return min(_MOST, max(_LEAST, 1.5 * usual))

    def may_hedge(self) -> bool:
        """One request in ten, and ten at once after a quiet time. Taken when it is allowed."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


async def hedged(
    first: Callable[[], Awaitable[T]],
    second: Callable[[], Awaitable[T] | None],
    patience: float,
    may_hedge: Callable[[], bool],
) -> tuple[T, bool]:
    """The answer of `first`, or that of `second` where the first fails or takes longer than `patience` seconds.

    Parameters
    ----------
    first, second : callable
        Begin a request. `second` answers None if there is nobody else to ask.
    patience : float
    may_hedge : callable
        Asked only where the first is slow, and again each `patience` seconds; where it has failed, the second is
        always asked.

    Returns
    -------
    answer
    by_second : bool

    Raises
    ------
    StaleEpoch
        One of them knows a newer placement.
    ClusterError, CollectionNotFound
        Of the first request, where neither could be had.
    """
    primary: asyncio.Future[T] = asyncio.ensure_future(first())
    backup: asyncio.Future[T] | None = None
    try:
        while True:
            await asyncio.wait({primary}, timeout=patience)
            if primary.done() and _counts(primary):
                return primary.result(), False
            if primary.done() or may_hedge():
                break
        other = second()
        if other is None:
            return await primary, False
        backup = asyncio.ensure_future(other)
        await asyncio.wait({primary, backup}, return_when=asyncio.FIRST_COMPLETED)
        for answer in (primary, backup):
            if answer.done() and _counts(answer):
                return answer.result(), answer is backup
        # One has failed: the other may still answer; if both have, the first one's reason is told.
        left = [answer for answer in (primary, backup) if not answer.done()]
        if left and not await _fails(left[0]):
            return left[0].result(), left[0] is backup
        return primary.result(), False
    finally:
        let_go(primary)
        if backup is not None:
            let_go(backup)


def _counts(answer: asyncio.Future[T]) -> bool:
    """True unless another copy may do better. None does where the placement is an older one: it must be fetched."""
    error = answer.exception()
    return isinstance(error, StaleEpoch) or not isinstance(error, ClusterError | CollectionNotFound)


async def _fails(answer: asyncio.Future[T]) -> bool:
    await asyncio.wait({answer})
    return answer.exception() is not None


def let_go(answer: asyncio.Future[T]) -> None:
    """Cancel what nobody waits for, and look at an error that nobody will raise."""
    answer.cancel()
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
