"""A Kafka broker without Kafka: librdkafka's mock cluster in a process of its own, for the demo and for fault tests.

It runs as ``python -m headrace.streams.broker``, so that killing or stopping it is a real process fault, and listens on
the loopback interface only. The process ends with its standard input, so it never outlives the program that started it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import IO, Any

from headrace.gpu.errors import BrokerError, ConfigError
from headrace.streams.mockcluster import serve

__all__ = ["DEFAULT_TOPIC_PARTITIONS", "REQUESTS", "EmbeddedBroker"]

log = logging.getLogger("headrace.streams")

DEFAULT_TOPIC_PARTITIONS = 8
ANSWER_WITHIN = 15.0
"""Seconds: generous, because a busy machine may take long to start a Python process."""

REQUESTS = MappingProxyType({"produce": 0, "fetch": 1, "list_offsets": 2, "metadata": 3, "offset_commit": 8})
"""Kafka's numbers of the requests that `EmbeddedBroker.fail_requests` knows."""


class EmbeddedBroker:
    """librdkafka's mock cluster in a child process; a context manager.

    Offsets, keys, headers, tombstones, idempotent producers, consumer groups and committed offsets behave as on Kafka.

    Parameters
    ----------
    brokers : int
        Brokers in the cluster, numbered from 1.
    topics : Mapping of str to int
        Topics to create at every start, with their numbers of topic partitions.

    Raises
    ------
    ConfigError
        A number that cannot be.
    BrokerError
        From `start`: the library was not found or the process did not answer. From the others: no process, or refused.

    Notes
    -----
    **It keeps at most 5 MiB, or 100,000 produced batches, per topic partition** (a batch may be a single record) and
    drops the oldest beyond that without a word; librdkafka 2.16 has no call that raises these limits. Nothing survives
    a restart, nothing is compacted, aborted transactions are visible, and a restarted broker has another port. For
    production, and for every claim of durability, run Apache Kafka.

    Thread-safe. `kill` followed by `start` gives an empty broker.
    """

    def __init__(self, *, brokers: int = 1, topics: Mapping[str, int] = MappingProxyType({})) -> None:
        if brokers < 1:
            raise ConfigError(f"an embedded cluster of {brokers} brokers cannot be: ask for at least 1")
        self._brokers = brokers
        self._topics = dict(topics)
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._unread = b""
        self._bootstrap = ""

    def start(self) -> EmbeddedBroker:
        """Start the process and create the topics; returns once it accepts connections."""
        with self._lock:
            if self._child is not None:
                raise BrokerError(f"the embedded broker runs already as process {self.pid}: stop it first")
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (read when the process has died)
            self._unread = b""
            # In a process group of its own, Ctrl-C in the terminal does not reach it even while Python starts up.
            self._child = subprocess.Popen(
                [sys.executable, "-m", "headrace.streams.broker", str(self._brokers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                process_group=0,
            )
            try:
                self._bootstrap = str(self._answer())
                for name, partitions in self._topics.items():
                    self.create_topic(name, partitions)
            except BaseException:
                self.kill()
                raise
            log.debug("embedded broker: process %d at %s", self._child.pid, self._bootstrap)
            return self

    def stop(self) -> None:
        """End the process; harmless when it has ended already."""
        with self._lock:
            if self._child is None:
                return
            assert self._child.stdin is not None
            self._child.stdin.close()
            try:
                self._child.wait(2.0)
            except subprocess.TimeoutExpired:  # stopped by SIGSTOP, say
                self._child.kill()
            self._close()

    def kill(self) -> None:
        """SIGKILL, as a fault: connections break in the middle of whatever they were doing."""
        with self._lock:
            if self._child is not None:
                self._child.kill()
                self._close()

    @property
    def bootstrap(self) -> str:
        """The addresses to connect to, ``host:port`` with commas between."""
        return self._bootstrap if self._running() else ""

    @property
    def pid(self) -> int:
        """The process id, for faults such as SIGSTOP."""
        return self._running().pid

    def create_topic(self, name: str, partitions: int = DEFAULT_TOPIC_PARTITIONS) -> None:
        """Create a topic; refused if it is there already."""
        if partitions < 1:
            raise ConfigError(f"topic {name!r} with {partitions} topic partitions cannot be: ask for at least 1")
        self._ask("topic_create", name, partitions, min(3, self._brokers))

    def delete_topic(self, name: str) -> None:
        """Delete a topic; created again, its log begins at 0: what a broker that came back empty looks like."""
        self._ask("topic_delete", name)

    def truncate(self, topic: str, topic_partition: int, before: int) -> None:
        """Drop the records below offset `before`, as retention would."""
        self._ask("partition_delete_records", topic, topic_partition, before)

    def move_leader(self, topic: str, topic_partition: int, n: int) -> None:
        """Make broker `n` the leader of a topic partition."""
        self._ask("partition_set_leader", topic, topic_partition, n)

    def fail_requests(self, request: str, codes: Sequence[int]) -> None:
        """Answer the next requests of one kind (see `REQUESTS`) with these Kafka error codes, one each."""
        if request not in REQUESTS:
            raise ConfigError(f"cannot fail {request!r} requests: choose from {', '.join(REQUESTS)}")
        self._ask("push_request_errors_array", REQUESTS[request], list(codes))

    def down(self, n: int = 1) -> None:
        """Break the connections of broker `n` and accept none; its records stay."""
        self._ask("broker_set_down", n)

    def up(self, n: int = 1) -> None:
        """Let broker `n` accept connections again."""
        self._ask("broker_set_up", n)

    def rtt(self, n: int, ms: int) -> None:
        """Delay every answer of broker `n` by `ms` milliseconds."""
        self._ask("broker_set_rtt", n, ms)

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"EmbeddedBroker({self._bootstrap if self._child else 'not running'})"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise BrokerError("the embedded broker is not running: call start() first")
        return self._child

    def _ask(self, command: str, *arguments: Any) -> None:
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
            except OSError as error:
                raise self._gone() from error
            self._answer()

    def _answer(self) -> Any:
        child = self._running()
        assert child.stdout is not None
        until = time.monotonic() + ANSWER_WITHIN
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not ready.select(max(0.0, until - time.monotonic())):
                    self.kill()  # or a late answer would be taken for the next one's
                    raise BrokerError(f"the embedded broker did not answer within {ANSWER_WITHIN:g} s: start another")
                got = os.read(child.stdout.fileno(), 65536)
                if not got:
                    raise self._gone()
                self._unread += got
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise BrokerError(f"the embedded broker refused: {answer['error']}")
        return answer["ok"]

    def _gone(self) -> BrokerError:
        last = ""
        if self._errors is not None:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip()
        return BrokerError(f"the embedded broker's process is gone{f' ({last})' if last else ''}: start another")

    def _close(self) -> None:
        child = self._running()
        child.wait()
        for pipe in (child.stdin, child.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a command that the dead process never read
                    pipe.close()
        self._child = self._errors = None


if __name__ == "__main__":
    serve(int(sys.argv[1]))
