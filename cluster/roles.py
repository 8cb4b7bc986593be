"""What a worker is there for: reading topics, holding rows, or both. Pure.

A worker of the role `INGEST` reads topic partitions, decodes, encodes and sends, and holds no cell. One of the role
`SEARCH` holds cells and answers reads, and reads no topic. Both are members of every collection alike: they are sent
each header and know each epoch and watermark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["BOTH", "INGEST", "ROLES", "SEARCH", "may_hold", "may_ingest"]

INGEST, SEARCH, BOTH = "ingest", "search", "both"
ROLES = (INGEST, SEARCH, BOTH)


def may_hold(workers: Iterable[str], roles: Mapping[str, str]) -> list[str]:
    """Those of `workers` that may hold rows, in the given order; one that is not in `roles` may do both."""
    return [worker for worker in workers if roles.get(worker, BOTH) != INGEST]


def may_ingest(workers: Iterable[str], roles: Mapping[str, str]) -> list[str]:
    """Those of `workers` that may read topics, in the given order; one that is not in `roles` may do both."""
    return [worker for worker in workers if roles.get(worker, BOTH) != SEARCH]
