"""How much of a micro-batch to send next, and what the answers mean. Pure.

A worker takes in what it is sent, or refuses its rows (`StoreFull`). A batch that was refused is halved until its first
part is taken; what follows is sent in growing parts again. So whatever fits of a batch is searchable, also where all of
it never would, and only the first record that does not fit waits. The parts keep the batch's order, hence that of each
topic partition: a record never overtakes one that waits for room. Each id is in a batch once, so no part can undo what
another did.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from headrace.cluster.fanout import Header, Outcome
from headrace.gpu.errors import ClusterError, RecordTooLarge, StoreFull

__all__ = ["Next", "Portion", "judge", "part_of"]


@dataclass(frozen=True, slots=True)
class Portion:
    """Records ``low`` to ``high - 1`` of a batch of `count`: all below are applied everywhere."""

    count: int
    low: int
    high: int

    @classmethod
    def whole(cls, count: int) -> Portion:
        """All of a batch: what is tried first."""
        return cls(count, 0, count)

    @property
    def size(self) -> int:
        return self.high - self.low

    @property
    def last(self) -> bool:
        """Has everything been applied once this one is? Only then do the batch's offsets count."""
        return self.high == self.count

    def after(self) -> Portion:
        """What comes next once this one is applied: twice as many records, for there may be room again."""
        return Portion(self.count, self.high, min(self.count, self.high + max(1, 2 * self.size)))

    def halved(self) -> Portion:
        """The first half of two records or more."""
        return Portion(self.count, self.low, self.low + max(1, self.size // 2))


class Next(Enum):
    """What is to be done when a portion has been sent."""

    GO_ON = auto()  # all have it
    ASK = auto()  # somebody did not answer: under the next state it is somebody else's
    HALVE = auto()  # somebody has no room for so much
    WAIT = auto()  # somebody has no room for one record, at the moment
    GIVE_UP = auto()  # and never will have


def judge(portion: Portion, answers: Iterable[Outcome]) -> Next:
    """What the workers' answers to a portion mean. Who did not answer counts first: he may be the one that is full.

    Parameters
    ----------
    portion : Portion
    answers : iterable of Outcome
        Of `fan_out`.
    """
    answers = list(answers)
    if any(isinstance(answer, ClusterError) for answer in answers):
        return Next.ASK
    if not any(isinstance(answer, StoreFull) for answer in answers):
        return Next.GO_ON
    if portion.size > 1:
        return Next.HALVE
    return Next.GIVE_UP if any(isinstance(answer, RecordTooLarge) for answer in answers) else Next.WAIT


def part_of(header: Header, portion: Portion) -> Header:
    """The records of a portion as a header of their own; the very same one if that is all of them."""
    if portion.size == portion.count:
        return header
    rows = slice(portion.low, portion.high)
    vector_at = header.vector_at[rows]
    # Where a record deletes, `vector_at` is that of the record before it, or -1: one vector too many does no harm.
    first, last = max(0, int(vector_at[0])), int(vector_at[-1]) + 1
    return Header(
        ids=header.ids[rows],
        topic_partitions=header.topic_partitions[rows],
        offsets=header.offsets[rows],
        timestamps=header.timestamps[rows],
        cells=header.cells[rows],
        vectors=header.vectors[first:last],
        vector_at=np.maximum(vector_at - first, -1),
        attributes={name: values[rows] for name, values in header.attributes.items()},
    )
