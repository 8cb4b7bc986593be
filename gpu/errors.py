"""The one exception tree of Headrace.

::

    HeadraceError
    ├── ConfigError             a setting or an argument that cannot be
    ├── BackendError            the backend asked for is not there, or cannot do it
    ├── EncoderError            a model is unknown, missing or broken
    ├── CollectionError
    │   ├── CollectionExists
    │   └── CollectionNotFound
    ├── RecordError             a record the caller handed in cannot be written (wrong dimension, no id …)
    ├── FilterError             a search's filter cannot be read, or does not fit the columns; shows the place
    ├── StoreFull               a worker's memory limit is reached; writes wait until there is room again
    │   └── RecordTooLarge      a record takes more than the whole limit by itself
    ├── SnapshotError           a snapshot cannot be written or read where it is kept
    │   └── SnapshotDamaged     one of its files is missing, changed, or of another collection
    ├── BrokerError             Kafka cannot be reached or refuses
    │   ├── TopicError          the topic is missing or has another number of topic partitions
    │   └── ProduceError        a record was not acknowledged
    ├── ClusterError            the scheduler or the workers cannot be reached
    │   └── StaleEpoch          a message of an older placement met a newer one (retried inside, seldom seen)
    └── ConsistencyTimeout      a read waited for offsets until its deadline; says which were missing

Every message is one sentence that names what was wrong, with which value, and what to do; a `FilterError` adds the
filter's text with the place marked.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BrokerError",
    "ClusterError",
    "CollectionError",
    "CollectionExists",
    "CollectionNotFound",
    "ConfigError",
    "ConsistencyTimeout",
    "EncoderError",
    "FilterError",
    "HeadraceError",
    "ProduceError",
    "RecordError",
    "RecordTooLarge",
    "SnapshotDamaged",
    "SnapshotError",
    "StaleEpoch",
    "StoreFull",
    "TopicError",
    "error_named",
]


class HeadraceError(Exception):
    """Root of everything Headrace raises on purpose."""


class ConfigError(HeadraceError, ValueError):
    """A setting or an argument that cannot be."""


class BackendError(HeadraceError):
    """The backend asked for is not there, or cannot do what was asked."""


class EncoderError(HeadraceError):
    """A model is unknown, missing or broken."""


class CollectionError(HeadraceError):
    """Something about a collection."""


class CollectionExists(CollectionError):
    """A collection of that name is there already."""


class CollectionNotFound(CollectionError, KeyError):
    """No collection of that name."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0]) if self.args else ""


class RecordError(HeadraceError, ValueError):
    """A record that the caller handed in cannot be written."""


class FilterError(HeadraceError, ValueError):
    """A search's filter cannot be read, or does not fit the columns; the message shows the place."""


class StoreFull(HeadraceError, MemoryError):
    """A worker's memory limit is reached: what would add rows is tried again until there is room."""


class RecordTooLarge(StoreFull):
    """A record takes more memory than the whole limit leaves to rows: trying again cannot help."""


class SnapshotError(HeadraceError):
    """A snapshot cannot be written or read: the message names the place and the cure."""


class SnapshotDamaged(SnapshotError):
    """A file of a snapshot is missing, changed, or of another collection: take another snapshot."""


class BrokerError(HeadraceError, ConnectionError):
    """Kafka cannot be reached, or refuses."""


class TopicError(BrokerError):
    """The topic is missing, or is not what the collection expects."""


class ProduceError(BrokerError):
    """A record was not acknowledged."""


class ClusterError(HeadraceError, ConnectionError):
    """The scheduler or the workers cannot be reached."""


class StaleEpoch(ClusterError):
    """A message of an older placement met a newer one; the sender fetches the newer and sends again."""


class ConsistencyTimeout(HeadraceError, TimeoutError):
    """A read waited for offsets until its deadline; the message says which were missing."""


def error_named(name: str, message: str) -> HeadraceError:
    """Rebuild an error that crossed the wire as ``(class name, message)``; an unknown name gives a HeadraceError."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, HeadraceError):
        return kind(message)
    return HeadraceError(message)
