"""librdkafka's mock cluster through ctypes: the child process of `headrace.streams.broker`.

The shared library inside the confluent-kafka wheel exports a whole mock cluster (``rd_kafka_mock_*``) that listens on
the loopback interface. It is an experimental interface of librdkafka, so everything that knows it is in this module.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.gpu.errors import BrokerError

__all__ = ["MockCluster", "serve"]

_SIGNATURES: Mapping[str, tuple[type[ctypes._SimpleCData[Any]], ...]] = {
    "topic_create": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "topic_delete": (ctypes.c_char_p,),
    "partition_delete_records": (ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64),
    "partition_set_leader": (ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32),
    "broker_set_down": (ctypes.c_int32,),
    "broker_set_up": (ctypes.c_int32,),
    "broker_set_rtt": (ctypes.c_int32, ctypes.c_int),
}


class MockCluster:
    """One mock cluster in this process, for as long as the process lives.

    Raises
    ------
    BrokerError
        The library is not where the wheel puts it, or does not start.
    """

    def __init__(self, brokers: int) -> None:
        pointer, text = ctypes.c_void_p, ctypes.create_string_buffer(512)
        library = ctypes.CDLL(str(_library()))
        for name, result, arguments in (
            ("conf_new", pointer, ()),
            ("conf_set", ctypes.c_int, (pointer, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)),
            ("new", pointer, (ctypes.c_int, pointer, ctypes.c_char_p, ctypes.c_size_t)),
            ("err2str", ctypes.c_char_p, (ctypes.c_int,)),
            ("mock_cluster_new", pointer, (pointer, ctypes.c_int)),
            ("mock_cluster_bootstraps", ctypes.c_char_p, (pointer,)),
            ("mock_group_initial_rebalance_delay_ms", None, (pointer, ctypes.c_int32)),
        ):
            function = getattr(library, f"rd_kafka_{name}")
            function.restype, function.argtypes = result, arguments
        conf = library.rd_kafka_conf_new()
        # Quiet, or it warns that its own unused client has no bootstrap.servers.
        library.rd_kafka_conf_set(conf, b"log_level", b"3", text, len(text))
        handle = library.rd_kafka_new(0, conf, text, len(text))
        if not handle:
            raise BrokerError(f"librdkafka could not start: {text.value.decode(errors='replace')}")
        self._library = library
        self._cluster = library.rd_kafka_mock_cluster_new(handle, brokers)
        if not self._cluster:
            raise BrokerError(f"librdkafka could not start a mock cluster of {brokers} brokers: ask for fewer")
        # Otherwise the first consumer of a group waits 3 s for others to join.
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)

    @property
    def bootstrap(self) -> str:
        """Addresses of the brokers, ``host:port`` with commas between."""
        addresses: bytes = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return addresses.decode()

    def call(self, command: str, *arguments: Any) -> None:
        """Call ``rd_kafka_mock_<command>``, one of `_SIGNATURES` or ``push_request_errors_array``.

        Raises
        ------
        BrokerError
            The mock cluster refused, or this librdkafka is too old to have that call.
        """
        function = getattr(self._library, f"rd_kafka_mock_{command}", None)
        if function is None:
            raise BrokerError(f"this librdkafka has no {command}: upgrade confluent-kafka to 2.16 or newer")
        if command == "push_request_errors_array":
            request, codes = arguments
            function.restype = None
            function.argtypes = (ctypes.c_void_p, ctypes.c_int16, ctypes.c_size_t, ctypes.c_void_p)
            function(self._cluster, request, len(codes), (ctypes.c_int * len(codes))(*codes))
            return
        function.argtypes = (ctypes.c_void_p, *_SIGNATURES[command])
        if error := function(self._cluster, *(a.encode() if isinstance(a, str) else a for a in arguments)):
            reason: bytes = self._library.rd_kafka_err2str(error)
            raise BrokerError(f"{command}({', '.join(map(repr, arguments))}): {reason.decode()}")


def _library() -> Path:
    """librdkafka in the confluent-kafka wheel: auditwheel puts it into ``confluent_kafka.libs`` beside the package."""
    package = importlib.util.find_spec("confluent_kafka")
    if package is None or package.origin is None:
        raise BrokerError("confluent-kafka is not installed: pip install confluent-kafka")
    folder = Path(package.origin).parent.parent / "confluent_kafka.libs"
    found = sorted(folder.glob("librdkafka-*.so*"))
    if not found:
        raise BrokerError(
            f"no librdkafka in {folder}: the embedded broker needs the Linux wheel of confluent-kafka (pip install "
            "--force-reinstall --only-binary :all: confluent-kafka), or use a real Kafka broker"
        )
    return found[0]


def serve(brokers: int) -> None:
    """Run a mock cluster until standard input ends, one JSON answer line per JSON command line.

    The first line answers nothing: it has the bootstrap addresses, or the error that kept the cluster from starting.
    """
    # Ctrl-C in the terminal is for the parent, which still wants to say goodbye to its broker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        cluster = MockCluster(brokers)
    except BrokerError as error:
        _answer(error=str(error))
        return
    _answer(ok=cluster.bootstrap)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            cluster.call(command, *arguments)
        except BrokerError as error:
            _answer(error=str(error))
        else:
            _answer(ok=None)
    os._exit(0)  # destroying the cluster in good order would wait for its clients


def _answer(**what: str | None) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")
