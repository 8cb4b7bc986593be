"""Apache Kafka itself, as one process on this machine: what `EmbeddedBroker` is not.

Brought in by Maven (``pom.xml`` beside this file), run by Java 17 or newer: one process that is broker and controller.
"""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from headrace.streams.clients import COMMON_SETTINGS, KafkaLog

HERE = Path(__file__).parent
JARS = HERE / "target" / "jars"

# Compaction and retention within seconds, one small internal topic each, no copies: there is one broker.
SETTINGS: Mapping[str, object] = {
    "process.roles": "broker,controller",
    "node.id": 1,
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "offsets.topic.replication.factor": 1,
    "offsets.topic.num.partitions": 1,
    "transaction.state.log.replication.factor": 1,
    "transaction.state.log.min.isr": 1,
    "transaction.state.log.num.partitions": 1,
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": 500,
    "group.initial.rebalance.delay.ms": 0,
    "log.initial.task.delay.ms": 1000,
    "log.cleaner.backoff.ms": 200,
    "log.cleaner.dedupe.buffer.size": 4 << 20,
    "log.retention.check.interval.ms": 300,
    "log.segment.delete.delay.ms": 100,
}


class Missing(Exception):
    """Java or Maven is not there: the tests are skipped, with this as the reason."""


def bring_jars() -> Path:
    """The folder with the broker's jars; Maven fetches them the first time (40 MB).

    Raises
    ------
    Missing
        There is no Java or no Maven.
    AssertionError
        Maven failed, which is no reason to skip anything; the message says why.
    """
    for program in ("java", "mvn"):
        if shutil.which(program) is None:
            raise Missing(f"needs Apache Kafka, and there is no '{program}': install Java 17 and Maven")
    pom = HERE / "pom.xml"
    stamp = JARS / ".ready"
    if not stamp.exists() or stamp.stat().st_mtime < pom.stat().st_mtime:
        shutil.rmtree(JARS, ignore_errors=True)
        done = subprocess.run(
            ["mvn", "--batch-mode", "--no-transfer-progress", "--quiet", "--file", str(pom), "process-resources"],
            capture_output=True,
            text=True,
            check=False,
        )
        said = (done.stdout + done.stderr).strip()[-2000:]
        assert done.returncode == 0, f"Maven could not bring in Apache Kafka: {said}"
        stamp.touch()
    return JARS


class RealBroker:
    """One Kafka broker, its own controller, on the loopback interface; a context manager.

    Parameters
    ----------
    folder : Path
        For its data, settings and log (``broker.log``); it outlives `kill` and `stop`, and `start` goes on with it.

    Attributes
    ----------
    bootstrap : str
        The same after every start.
    """

    def __init__(self, folder: Path) -> None:
        self._jars = bring_jars()
        self._folder = folder
        self.log = folder / "broker.log"
        port, elsewhere, self._controller = _free_ports(3)
        self.bootstrap = f"127.0.0.1:{port}"
        self._elsewhere = f"127.0.0.1:{elsewhere}"
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self._process: subprocess.Popen[bytes] | None = None
        settings = str(self._settings(self.bootstrap))
        formatting = self._java("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", settings)
        if formatting.wait(180.0):
            raise AssertionError(f"kafka.tools.StorageTool failed:\n{self.tail()}")

    def start(self, deadline: float = 180.0, *, address: str | None = None) -> RealBroker:
        """Start, or start again on what is there, at `bootstrap` or another `address`; returns once it answers."""
        assert self._process is None, "it runs already"
        address = address or self.bootstrap
        self._process = self._java("kafka.Kafka", str(self._settings(address)))
        until = time.monotonic() + deadline
        self.admin = AdminClient({**COMMON_SETTINGS, "bootstrap.servers": address}, logger=KafkaLog())
        try:
            while not self._answers():
                assert self._process.poll() is None, f"the broker ended by itself:\n{self.tail()}"
                assert time.monotonic() < until, f"no answer after {deadline:g} s:\n{self.tail()}"
                time.sleep(0.05)
        except BaseException:
            self.kill()
            raise
        return self

    def _answers(self) -> bool:
        try:
            self.admin.list_topics(timeout=1.0)
        except KafkaException:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it was doing."""
        assert self._process is not None, "it does not run"
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        """End it as an administrator would; harmless when it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(60.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @contextmanager
    def elsewhere(self) -> Iterator[str]:
        """Within the block it runs at another address, which is given: for those who know the first one it is away."""
        self.stop()
        self.start(address=self._elsewhere)
        try:
            yield self._elsewhere
        finally:
            self.stop()
            self.start()

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    def tail(self, lines: int = 60) -> str:
        """The end of the broker's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # -- topics --------------------------------------------------------------------------------------------------------

    def create_topic(self, name: str, partitions: int = 4, **settings: object) -> None:
        """Create a topic; settings by their Kafka names with underscores for dots."""
        config = {setting.replace("_", "."): str(value) for setting, value in settings.items()}
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=config)
        self.admin.create_topics([topic])[name].result(60.0)
        # Creating is the controller's; the broker that leads hears of it a moment later.
        until = time.monotonic() + 60.0
        while name not in (topics := self.admin.list_topics(timeout=5.0).topics) or topics[name].error:
            assert time.monotonic() < until, f"topic {name} was created and is not there"
            time.sleep(0.01)

    def delete_topic(self, name: str) -> None:
        self.admin.delete_topics([name])[name].result(60.0)
        until = time.monotonic() + 60.0
        while name in self.admin.list_topics(timeout=5.0).topics:
            assert time.monotonic() < until, f"topic {name} was deleted and is there still"
            time.sleep(0.01)

    def add_partitions(self, name: str, total: int) -> None:
        self.admin.create_partitions([NewPartitions(name, total)])[name].result(60.0)

    def configure_topic(self, name: str, setting: str, value: object) -> None:
        entry = ConfigEntry(setting, str(value), incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry])
        self.admin.incremental_alter_configs([resource])[resource].result(60.0)

    def truncate(self, topic: str, topic_partition: int, before: int) -> None:
        """Delete the records below offset `before` (Kafka's DeleteRecords)."""
        place = TopicPartition(topic, topic_partition, before)
        self.admin.delete_records([place])[place].result(60.0)

    def __enter__(self) -> RealBroker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _settings(self, address: str) -> Path:
        path = self._folder / "server.properties"
        settings = {
            **SETTINGS,
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller}",
            "listeners": f"PLAINTEXT://{address},CONTROLLER://127.0.0.1:{self._controller}",
            "advertised.listeners": f"PLAINTEXT://{address}",
            "log.dirs": self._folder / "data",
        }
        path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        return path

    def _java(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        # C1 only and the serial collector: half the start-up time on two cores, and memory that stays within bounds.
        machine = ["java", "-Xms128m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        machine += [f"-Dlog4j2.configurationFile={HERE / 'log4j2.properties'}", "-cp", f"{self._jars}/*"]
        with self.log.open("ab") as out:
            return subprocess.Popen(
                [*machine, program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in the terminal is for the tests, which then stop it
            )


def _free_ports(count: int) -> list[int]:
    holders = [socket.socket() for _ in range(count)]
    try:
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()
