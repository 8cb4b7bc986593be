"""Headrace: a Kafka topic becomes a vector index, searchable while the topic is still moving.

::

    import headrace

    db = headrace.connect()
    docs = db.create_collection("docs", encoder="minilm")
    docs.ingest("localhost:9092", topic="docs")
    docs.search("moving average of a series", limit=10)

The public names are these and no others; each is loaded when it is first used, so that importing the package costs
nothing and a search client never loads FAISS or CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.gpu.errors import (
        BackendError,
        BrokerError,
        ClusterError,
        CollectionError,
        CollectionExists,
        CollectionNotFound,
        ConfigError,
        ConsistencyTimeout,
        EncoderError,
        FilterError,
        HeadraceError,
        ProduceError,
        RecordError,
        RecordTooLarge,
        SnapshotDamaged,
        SnapshotError,
        StaleEpoch,
        StoreFull,
        TopicError,
    )
    from headrace.gpu.index_spec import IndexSpec
    from headrace.pipeline.client import Collection, Database
    from headrace.pipeline.client_async import AsyncCollection, AsyncDatabase
    from headrace.pipeline.connecting import connect, connect_async
    from headrace.pipeline.results import Hit, Hits, Restoration, Row, Snapshot, Verification, Write, bounded
    from headrace.streams.broker import EmbeddedBroker

    __version__: str

__all__ = [
    "AsyncCollection",
    "AsyncDatabase",
    "BackendError",
    "BrokerError",
    "ClusterError",
    "Collection",
    "CollectionError",
    "CollectionExists",
    "CollectionNotFound",
    "ConfigError",
    "ConsistencyTimeout",
    "Database",
    "EmbeddedBroker",
    "EncoderError",
    "FilterError",
    "HeadraceError",
    "Hit",
    "Hits",
    "IndexSpec",
    "ProduceError",
    "RecordError",
    "RecordTooLarge",
    "Restoration",
    "Row",
    "Snapshot",
    "SnapshotDamaged",
    "SnapshotError",
    "StaleEpoch",
    "StoreFull",
    "TopicError",
    "Verification",
    "Write",
    "__version__",
    "bounded",
    "connect",
    "connect_async",
]

_PLACES = {
    "headrace.gpu.index_spec": ("IndexSpec",),
    "headrace.pipeline.client": ("Collection", "Database"),
    "headrace.pipeline.client_async": ("AsyncCollection", "AsyncDatabase"),
    "headrace.pipeline.connecting": ("connect", "connect_async"),
    "headrace.pipeline.results": ("Hit", "Hits", "Restoration", "Row", "Snapshot", "Verification", "Write", "bounded"),
    "headrace.streams.broker": ("EmbeddedBroker",),
}
_ELSEWHERE = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("importlib.metadata").version("headrace")
    elif name in __all__:
        # What is listed nowhere else is an error class.
        value = getattr(importlib.import_module(_ELSEWHERE.get(name, "headrace.gpu.errors")), name)
    else:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
