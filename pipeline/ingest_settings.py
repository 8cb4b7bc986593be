"""What the way in is given: its settings, the worker that it runs on, and what encodes its texts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace.cluster.replica import Replica
from headrace.cluster.state import CollectionState
from headrace.gpu.backend import Backend
from headrace.streams.reader import ReaderSettings
from headrace.streams.topic_identity import Seen

__all__ = ["Encode", "IngestSettings", "Node"]

Encode = Callable[[list[str]], Awaitable[npt.NDArray[np.float32]]]
"""Texts to float32 (n, dim)."""


@dataclass(frozen=True, slots=True)
class IngestSettings:
    """How records are taken in; times in seconds. See ``headrace.yaml`` for what each is for."""

    reader: ReaderSettings = field(default_factory=ReaderSettings)
    max_texts: int = 16
    texts_in_flight: int = 2
    max_record_bytes: int = 1 << 20
    apply_deadline: float = 2.0
    retry_delay: float = 0.05
    retry_delay_max: float = 1.0


class Node(Protocol):
    """What the way in needs of its worker. All methods belong on the worker's event loop."""

    address: str
    backend: Backend

    def clock(self) -> float: ...
    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]: ...
    async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]: ...
    def maintain(self, replica: Replica) -> None: ...
    def adopt_soon(self, state: CollectionState) -> None: ...
    def alarm(self, collection: str, text: str) -> None: ...
    def topic_found(self, collection: str, known: str, seen: Seen) -> None: ...
