"""How far a topic goes, asked once for all who want to know at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Executor

from headrace.streams.topic_identity import Seen
from headrace.streams.topics import Offsets

__all__ = ["Ends"]

_PATIENCE = 2.0
"""Seconds that a broker may take: less than a read waits by default, so that it hears whose fault it is."""


class Ends:
    """A topic's end offsets, and which topic they are of, no older than a reader asks for. Belongs to one event loop.

    However many readers wait, Kafka is asked one thing at a time: were each to ask for itself, those who gave up on a
    broker that is away would leave their questions behind, in the way of everybody after them.

    Parameters
    ----------
    bootstrap, topic : str
    settings : mapping of str to str
        For librdkafka.
    executor : Executor
        Where the question blocks.

    Attributes
    ----------
    seen : Seen
        The topic that the newest answer is of.
    """

    def __init__(self, bootstrap: str, topic: str, settings: Mapping[str, str], executor: Executor) -> None:
        self._bootstrap, self._topic, self._settings, self._executor = bootstrap, topic, settings, executor
        self._offsets: Offsets | None = None
        self._ends: dict[int, int] = {}
        self.seen = Seen("", 0)
        self._ends_of = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def known(self, max_age: float) -> dict[int, int]:
        """Topic partition to end offset, as it was at most `max_age` seconds before this call.

        Raises
        ------
        BrokerError, TopicError
            Kafka does not say.
        """
        wanted = time.monotonic() - max_age
        while self._ends_of < wanted:
            if self._asking is None:
                self._asking = asyncio.get_running_loop().create_task(self._ask())
            # Shielded: a reader that gives up must not take the answer from the others.
            await asyncio.shield(self._asking)
        return self._ends

    async def _ask(self) -> None:
        asked_at = time.monotonic()
        try:
            self._ends, self.seen = await asyncio.get_running_loop().run_in_executor(self._executor, self._latest)
            self._ends_of = asked_at
        finally:
            self._asking = None

    def _latest(self) -> tuple[dict[int, int], Seen]:
        if self._offsets is None:
            self._offsets = Offsets(self._bootstrap, self._topic, settings=dict(self._settings), deadline=_PATIENCE)
        return self._offsets.ends(_PATIENCE)
