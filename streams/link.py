"""One Kafka client and its brokers: are they away, since when, and what is a person told of it?

librdkafka tries again by itself and logs every attempt. A person wants one line when the brokers are lost, which says
what happens next, and one when they are back; and a program wants to ask in between.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError

from headrace.streams.clients import KafkaLog

__all__ = ["Away", "Link"]

log = logging.getLogger("headrace.streams")

_OF_CONNECTIONS = frozenset({"FAIL", "ERROR", "REQTMOUT"})
_LINE = re.compile(
    r"(?:\[thrd:[^\]]*\]: )?(?:GroupCoordinator: )?(?P<broker>\S+?)(?:/(?:\d+|bootstrap))?: (?P<why>.+?)"
    r"(?: \(after \d+ms in state .*\))?"
)
"""librdkafka's ``host:port/1: Connect to … failed: Connection refused (after 0ms in state CONNECT)``."""
_COORDINATOR = "GroupCoordinator"
_CONNECTING = re.compile(r"Connect to ipv[46]#(\S+) failed")


@dataclass(frozen=True, slots=True)
class Away:
    """A broker, or all of them, cannot be reached.

    Attributes
    ----------
    since : float
        Seconds since the epoch.
    broker : str
        Address of the one that failed last.
    error : str
        What it failed with, in librdkafka's words.
    """

    since: float
    broker: str
    error: str


class Link(KafkaLog):
    """What confluent-kafka takes as `logger`; `settings` are to be among the client's, so that it hears of errors.

    Thread-safe. An outage begins when librdkafka says that all brokers are down and a new connection has failed (it
    also says so when the only connection was idle and has been closed, which harms nobody), or when `lost` is called.
    It ends when `answered` is.

    Parameters
    ----------
    bootstrap : str
        What is named while no broker is known by its own address.
    who : str
        Whose client it is, such as ``reader of topic 'docs'``.
    meanwhile : str
        What happens until the brokers are back, and then.
    """

    def __init__(self, bootstrap: str, who: str, meanwhile: str, every: float = 10.0) -> None:
        super().__init__(every)
        self._who, self._meanwhile = who, meanwhile
        self._state = threading.Lock()
        self._last = (bootstrap, "no answer")
        self._all_down = self._failed = self._asked = False
        self._lost_at = 0.0
        self._away: Away | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """For the client's configuration."""
        return {"error_cb": self._on_error}

    @property
    def away(self) -> Away | None:
        """The outage that there is; None while all is well."""
        return self._away

    def lost(self, broker: str, error: str) -> None:
        """Somebody has asked a broker in vain. A cause that librdkafka gave for the same broker says more."""
        with self._state:
            if not self._failed:
                self._last = broker, error
            self._asked = True
            self._begin()

    def answered(self, asked_at: float | None = None) -> None:
        """Some broker has sent something; or, with `asked_at` (of ``time.monotonic``), all have answered a question of
        that moment.

        What a question has found ends by a question only: records of one broker do not say that the others are back.
        """
        if self._away is None and not (self._all_down or self._failed):
            return  # as ever: called for every batch
        with self._state:
            if self._asked if asked_at is None else asked_at < self._lost_at:
                return
            self._all_down = self._failed = self._asked = False
            if self._away is not None:
                log.warning("%s: Kafka answers again after %.1f s", self._who, time.time() - self._away.since)
                self._away = None

    def log(self, level: int, form: str, *arguments: object) -> None:
        """Lines about connections are taken in, all others pass as `KafkaLog` lets them."""
        if not arguments or arguments[0] not in _OF_CONNECTIONS:
            super().log(level, form, *arguments)
            return
        super().log(logging.DEBUG, form, *arguments)
        if level >= logging.ERROR:
            with self._state:
                self._note(str(arguments[-1]))

    def _on_error(self, error: KafkaError) -> None:
        with self._state:
            if error.code() == KafkaError._ALL_BROKERS_DOWN:
                self._all_down = True
                self._lost_at = time.monotonic()
                if self._failed:
                    self._begin()
            elif error.code() in (KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._AUTHENTICATION,
                                  KafkaError._SSL, KafkaError._TIMED_OUT):  # fmt: skip
                if "Disconnected" not in error.str():  # the connection that fails after it is what counts
                    self._note(error.str())
            else:
                super().log(logging.WARNING, "%s [%s] %s", error.name(), self._who, error.str())

    def _note(self, line: str) -> None:
        found = _LINE.fullmatch(line)
        if found is not None:
            broker, why = found["broker"], found["why"]
            if broker == _COORDINATOR and (address := _CONNECTING.search(why)):
                broker = address[1]  # the coordinator's line may name no broker
            self._last = broker, why
        self._failed = True
        if self._all_down or self._away is not None:
            self._begin()

    def _begin(self) -> None:
        """An outage has begun, or goes on with a newer error."""
        broker, error = self._last
        if self._away is not None:
            self._away = Away(self._away.since, broker, error)
            return
        self._lost_at = time.monotonic()
        self._away = Away(time.time(), broker, error)
        log.warning("%s: Kafka is away: %s: %s; %s", self._who, broker, error, self._meanwhile)
