"""What each level of consistency promises a read: offsets below which it has to show everything.

=============  =====================================================================================================
strong         the topic's end when the read began, and all that anybody had been acknowledged by then
session        what this client had been acknowledged, and what its earlier reads had shown: it never goes back
bounded(ms)    the topic's end, and all that had been acknowledged, so many milliseconds before the read began
eventual       nothing; but like all others it must show what it claims, and nothing that the log never had
=============  =====================================================================================================

What was still under way at the moment in question is promised by nobody.
"""

from __future__ import annotations

from collections import defaultdict

from tests.history.events import Offsets, Read, TopicEnds
from tests.history.facts import Facts, Rising, highest

LEVELS = ("strong", "session", "bounded", "eventual")

_Noted = list[tuple[float, int, Offsets]]


def level_of(read: Read) -> str:
    """``"bounded"`` for ``"bounded:100"``."""
    return read.consistency.partition(":")[0]


class Promises:
    """The offsets that reads of one history had to have applied."""

    def __init__(self, facts: Facts) -> None:
        anybody: _Noted = []
        sessions: dict[str, _Noted] = defaultdict(list)
        for (partition, offset), (index, record) in facts.known.items():
            if record.acked_at is not None and partition is not None and offset is not None:
                note = (record.acked_at, index, {partition: offset + 1})
                anybody.append(note)
                sessions[record.client].append(note)
        for index, event in enumerate(facts.events):
            if isinstance(event, TopicEnds):
                anybody.append((event.time, index, event.offsets))
            elif isinstance(event, Read) and event.client and not event.error:
                sessions[event.client].append((event.finished, index, shown(event)))
        self._anybody = Rising(anybody)
        self._sessions = {client: Rising(notes) for client, notes in sessions.items()}

    def of(self, read: Read) -> dict[int, int]:
        """Topic partition to the offset below which everything has to be there."""
        level, _, staleness = read.consistency.partition(":")
        known: Offsets = {}
        if level == "session":
            session = self._sessions.get(read.client)
            known = {} if session is None else session.offsets(read.started)
        elif level != "eventual":
            known = self._anybody.offsets(read.started - float(staleness or 0.0) / 1e3)
        return highest(read.required, known)


def shown(read: Read) -> dict[int, int]:
    """How far an answer lets its client know of the log: what it claims, and the versions of its rows."""
    rows: dict[int, int] = {}
    for row in read.results:
        if row.topic_partition is not None and row.offset is not None:
            rows[row.topic_partition] = max(rows.get(row.topic_partition, 0), row.offset + 1)
    return highest(read.applied or {}, rows)
