"""What became of records that were sent: acknowledgements gathered for whoever waits for them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from confluent_kafka import KafkaError, Message

__all__ = ["Delivered", "Flight"]

_GIVEN_UP = (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)


@dataclass(frozen=True)
class Delivered:
    """What Kafka has acknowledged.

    Attributes
    ----------
    offsets : dict of int to int
        Topic partition to the offset after its last record: who has applied up to there has applied all of this.
    count : int
    acks : tuple of (key, topic partition, offset)
        One for each record, in the order of acknowledgement.
    """

    offsets: dict[int, int]
    count: int
    acks: tuple[tuple[bytes | None, int, int], ...]


class Flight:
    """Records on their way that somebody waits for together.

    `arrived` is called on whichever thread polls the producer, so all of it is behind `lock`.

    Parameters
    ----------
    dropped : list of bytes or None
        Where the keys of records go that the producer gave up (`Producer.purge`): one list for all of its flights.
    """

    def __init__(self, dropped: list[bytes | None]) -> None:
        self.lock = threading.Lock()
        self._dropped = dropped
        self.waiting = 0
        self.acks: list[tuple[bytes | None, int, int]] = []
        self.failed: list[tuple[bytes | None, KafkaError]] = []

    def begin(self) -> None:
        """One more record to wait for: before it is sent, or its callback could come first."""
        with self.lock:
            self.waiting += 1

    def arrived(self, error: KafkaError | None, message: Message) -> None:
        """The delivery callback."""
        key, partition, offset = message.key(), message.partition(), message.offset()
        with self.lock:
            self.waiting -= 1
            if error is not None:
                self.failed.append((key, error))
                if error.code() in _GIVEN_UP:
                    self._dropped.append(key)
            else:
                self.acks.append((key, -1 if partition is None else partition, -1 if offset is None else offset))

    def landed(self) -> Delivered:
        """What has been acknowledged so far."""
        offsets: dict[int, int] = {}
        for _, partition, offset in self.acks:
            offsets[partition] = max(offset + 1, offsets.get(partition, 0))
        return Delivered(offsets, len(self.acks), tuple(self.acks))
