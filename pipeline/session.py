"""What one client must not miss later: its own writes, and what it has been shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headrace.cluster.wire import offsets_from_wire
from headrace.pipeline.results import Hit, Row

__all__ = ["Session"]


class Session:
    """Topic partition to the offset below which a client's reads have to see everything. One owner.

    Offsets of two topics do not compare: where the topic was made anew, a session begins anew.
    """

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}
        self._wrote: dict[int, int] = {}
        self._topic = ""

    def of(self, topic_id: str) -> dict[int, int]:
        """The offsets in the topic with this id; always the same dictionary, until the topic is another."""
        if self._topic != topic_id:
            if self._topic:
                self._offsets, self._wrote = {}, {}
            self._topic = topic_id
        return self._offsets

    def wrote(self, topic_id: str, offsets: Mapping[int, int]) -> None:
        """This client has written below these offsets."""
        session = self.of(topic_id)
        for tp, offset in offsets.items():
            session[tp] = max(session.get(tp, 0), offset)
            self._wrote[tp] = max(self._wrote.get(tp, 0), offset)

    def saw(
        self,
        topic_id: str,
        session: Mapping[int, int],
        answers: Iterable[Mapping[str, Any]],
        rows: Iterable[Row | Hit | None],
    ) -> None:
        """What this client has been shown it is not to miss later, whichever copy it asks then.

        Parameters
        ----------
        session : mapping of int to int
            What `of` gave when the read began.
        answers : iterable of mapping
            The workers', with what each had ``applied``.
        rows : iterable of Row or Hit or None
        """
        offsets = self.of(topic_id)
        if session is not offsets:
            return  # the answers were of a topic that is gone
        seen = [pair for answer in answers for pair in offsets_from_wire(answer["applied"]).items()]
        # A copy may hold rows above what it claims, because batches end in any order.
        seen += [(row.topic_partition, row.offset + 1) for row in rows if row is not None]
        for tp, offset in seen:
            offsets[tp] = max(offsets.get(tp, 0), offset)

    def repaired(self, topic_id: str, ends: Mapping[int, int]) -> None:
        """Wait for nothing beyond the topic's `ends` but for own writes: what no log has may have been shown once."""
        session = self.of(topic_id)
        for tp, offset in session.items():
            session[tp] = min(offset, max(ends.get(tp, 0), self._wrote.get(tp, 0)))
