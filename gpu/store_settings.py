"""How a store keeps its rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.gpu.errors import ConfigError
from headrace.gpu.merge import MergePolicy

__all__ = ["StoreSettings"]


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Sizes and budgets of one worker's stores; what index they build is each collection's own `IndexSpec`.

    Attributes
    ----------
    seal_rows : int
        Rows after which the growing segment is frozen and indexed; fewer where indexing so many would not fit into
        `maintenance_memory` or a share of `memory_limit`. An exact scan over 16,384 rows of 384 floats reads 25 MB,
        about what a graph search of a hundred times more rows costs in time, and spares building many small graphs.
    build_threads : int
        Threads that an index build may use.
    maintenance_memory : int
        Bytes that sealing or merging may take for what it works on, until the old segments can go. No larger merge is
        begun.
    memory_limit : int or None
        Bytes that the stores of one worker may hold together. An eighth of it is kept for sealing, merging and
        taking out deleted rows, so rows are refused (`StoreFull`) before the rest is exceeded.
    settle_after : float
        Seconds without a write after which all segments, the growing one too, become one, so that a search looks into
        one index. Never sooner than the merge would take: then writes that come now and then at most double the work.
    merge : MergePolicy

    Raises
    ------
    ConfigError
        A value that cannot be.
    """

    seal_rows: int = 16_384
    build_threads: int = 1
    maintenance_memory: int = 2 << 30
    memory_limit: int | None = None
    settle_after: float = 10.0
    merge: MergePolicy = field(default_factory=MergePolicy)

    def __post_init__(self) -> None:
        for name in ("seal_rows", "build_threads", "maintenance_memory", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: give a number of at least 1")
        if self.settle_after <= 0:
            raise ConfigError(f"settle_after is {self.settle_after}: give seconds, more than 0")
