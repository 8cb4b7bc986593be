"""The events of a history, and a history as a file of JSON lines.

Times are seconds since the epoch on one scale that never steps: the wall clock when the run began plus the monotonic
clock since. Offsets are always *next* offsets (``{0: 5}``: everything below 5 of topic partition 0), as in a watermark.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Id: TypeAlias = str | int
Offsets: TypeAlias = Mapping[int, int]


class Answer(NamedTuple):
    """One row of an answer; the version is None where the client was not told it."""

    id: Id
    topic_partition: int | None = None
    offset: int | None = None
    score: float | None = None
    digest: str = ""


class Stored(NamedTuple):
    """One row of a copy."""

    id: Id
    topic_partition: int
    offset: int
    cell: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """How the run began, and how to run it again."""

    seed: int | None = None
    command: str = ""
    wall: float = 0.0
    monotonic: float = 0.0


@dataclass(frozen=True, slots=True)
class Produced:
    """A record handed to the producer. Without `acked_at` it may or may not exist, without `offset` anywhere."""

    id: Id
    topic_partition: int | None
    offset: int | None
    timestamp_ms: int
    deleted: bool = False
    value_digest: str = ""
    acked_at: float | None = None
    sent_at: float = 0.0
    client: str = ""


@dataclass(frozen=True, slots=True)
class Read:
    """One answer, or an `error` in its place.

    `kind` is "get" (`asked` must be there), "scan" (exhaustive: every live id must be there) or "search" (absence says
    nothing). `consistency` is "strong", "session", "bounded:<ms>" or "eventual". `applied` is None where the answer
    did not say. `worker` is set when one copy alone answered.
    """

    kind: str
    consistency: str
    started: float
    finished: float
    required: Offsets
    applied: Offsets | None
    results: tuple[Answer, ...]
    asked: tuple[Id, ...] = ()
    client: str = ""
    worker: str = ""
    incarnation: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Committed:
    """Offsets found committed in Kafka at `time`; asked for at `started` (None: at once)."""

    time: float
    offsets: Offsets
    started: float | None = None


@dataclass(frozen=True, slots=True)
class WatermarkSample:
    """What one incarnation of a worker reported; `active` when the placement counted on it."""

    time: float
    worker: str
    offsets: Offsets
    incarnation: str = ""
    active: bool = True
    started: float | None = None


@dataclass(frozen=True, slots=True)
class TopicEnds:
    """The topic went at least as far as this at `time`, acknowledged or not."""

    time: float
    offsets: Offsets


@dataclass(frozen=True, slots=True)
class FirstVisible:
    """A version, or a newer one of its id, was first seen by a reader at `time`."""

    topic_partition: int
    offset: int
    time: float


@dataclass(frozen=True, slots=True)
class FinalState:
    """An exhaustive scan of all copies on one worker, once quiet."""

    worker: str
    rows: tuple[Stored, ...]
    watermarks: Offsets
    time: float = float("inf")
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class Verified:
    """What the collection's own comparison of digests said, once quiet."""

    ok: bool
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """A record that was refused; it never was a write."""

    topic_partition: int
    offset: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """The final placement, cell to workers; a cell not named is where it is found."""

    cells: Mapping[int, tuple[str, ...]]
    replicas: int | None = None


@dataclass(frozen=True, slots=True)
class FaultMark:
    """A fault began, or (`healed`) the fault of that name ended."""

    time: float
    what: str
    healed: bool = False


Event: TypeAlias = (
    Origin | Produced | Read | Committed | WatermarkSample | TopicEnds | FirstVisible | FinalState | Verified
    | DeadLettered | Placement | FaultMark
)  # fmt: skip
_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__args__}


def _offsets(value: dict[str, int] | None) -> dict[int, int] | None:
    return None if value is None else {int(key): number for key, number in value.items()}


# JSON knows neither integer keys nor tuples; these fields get theirs back
_REVIVE: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("offsets", "required", "applied", "watermarks"), _offsets),
    **dict.fromkeys(("asked", "differences"), tuple),
    "results": lambda rows: tuple(Answer(*row) for row in rows),
    "rows": lambda rows: tuple(Stored(*row) for row in rows),
    "cells": lambda cells: {int(cell): tuple(workers) for cell, workers in cells.items()},
}


@dataclass(frozen=True, eq=False)
class History:
    """Events in the order in which they were noted; immutable, compared by identity."""

    events: tuple[Event, ...]

    def save(self, path: str | Path) -> None:
        """Write one JSON object a line."""
        with Path(path).open("w", encoding="utf-8") as file:
            for event in self.events:
                fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
                file.write(json.dumps({"event": type(event).__name__, **fields}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            A line is no event, with its number.
        """
        with Path(path).open(encoding="utf-8") as file:
            return cls(tuple(_parse(number, line) for number, line in enumerate(file, 1)))

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        return cls(tuple(events))


def _parse(number: int, line: str) -> Event:
    try:
        fields = json.loads(line)
        kind = _KINDS[fields.pop("event")]
        return kind(**{name: _REVIVE.get(name, lambda same: same)(value) for name, value in fields.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"line {number} is not an event of a history: {error!r}") from error
