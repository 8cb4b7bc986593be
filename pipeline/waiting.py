"""Waiting until every copy that is read has applied what was written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from headrace.cluster.state import CollectionState
from headrace.cluster.wire import offsets_to_wire
from headrace.gpu.errors import ClusterError, CollectionNotFound
from headrace.pipeline import known_state
from headrace.pipeline.copies import Copies, missed
from headrace.pipeline.hedging import let_go
from headrace.pipeline.known_state import KnownState

__all__ = ["GRACE", "wait_everywhere"]

_SOON = 0.1

GRACE = 0.5
"""Seconds beyond a read's deadline that an answer may be under way: a worker that waits keeps the deadline itself, and
says what was missing."""


async def wait_everywhere(known: KnownState, copies: Copies, required: Mapping[int, int], deadline: float) -> None:
    """Return once every copy that is read has applied `required`; copies that die meanwhile no longer count. Where
    no copy of some cell can be read, it waits for one.

    Raises
    ------
    ConsistencyTimeout
        A copy had not applied it in time, did not answer, or there was none.
    """
    until = time.monotonic() + deadline
    wanted = offsets_to_wire(required)
    newest = False
    while True:
        try:
            state = await known.get(newest=newest, deadline=max(0.05, until - time.monotonic()))
            _check_readable(state)
            left = max(0.001, until - time.monotonic())
            ask = copies.asking("wait", until + GRACE, collection=known.name, required=wanted, deadline_s=left)
            answered = await _all_that_count(known, {w: asyncio.ensure_future(ask(w)) for w in state.active}, until)
            # A copy that has begun to be read meanwhile has to have them too.
            after = await known.get(newest=True, deadline=max(0.05, until - time.monotonic()))
            _check_readable(after)
            if answered.issuperset(after.active):
                return
        except (ClusterError, CollectionNotFound) as error:
            if time.monotonic() >= until:
                missed(known.name, error, "not every copy said that it had applied what was asked for", deadline)
            await known.look_again(until)
            newest = True


def _check_readable(state: CollectionState) -> None:
    if not state.active or not all(state.serving.get(cell) for cell in state.cells):
        raise ClusterError(f"some cells of collection {state.spec.name!r} have no copy that can be read")


async def _all_that_count(
    known: KnownState, asked: dict[str, asyncio.Future[dict[str, Any]]], until: float
) -> set[str]:
    """Return when all have answered but those that are read no longer: one that hangs never would; and who did.

    The state is looked at soon, and then less and less often: a worker that has died answers nothing for as long as
    connecting to it is tried.
    """
    answered, patience = set(), min(_SOON, known_state.STATE_AGE)
    try:
        while asked:
            done, _ = await asyncio.wait(asked.values(), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for worker in [worker for worker, answer in asked.items() if answer.done()]:
                asked.pop(worker).result()
                answered.add(worker)
            if asked:
                if not done:
                    patience = min(2 * patience, known_state.STATE_AGE)
                    await known.renew(until)
                active = (await known.known()).active
                for worker in asked.keys() - set(active):
                    let_go(asked.pop(worker))
    finally:
        for answer in asked.values():
            let_go(answer)
    return answered
