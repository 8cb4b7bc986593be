"""Bytes per row by kind of index and dtype, against the bare vectors."""

from __future__ import annotations

import gc
from typing import Any

from benchmarks.report import criterion
from benchmarks.store_setup import Filled, Part, Setup
from headrace.gpu.index_spec import DTYPES, KINDS, IndexSpec

__all__ = ["run"]

ROWS = 16_384
AIM = 0.55


def run(setup: Setup) -> Part:
    """Settled stores of each kind and dtype: what they say they hold, by purpose, and what the device says."""
    rows = min(setup.rows, ROWS)
    data = setup.docstrings.first(rows)
    table: dict[str, Any] = {}
    held: dict[tuple[str, str], float] = {}
    for kind in KINDS:
        for dtype in DTYPES:
            gc.collect()
            before = setup.backend.memory.used()
            # One segment, all sealed: a growing one is float32 buffers with room to grow, whatever the kind.
            store = setup.empty(data.dim, IndexSpec(kind, dtype), seal_rows=rows)
            filled = Filled(store)
            filled.fill(data.rows, title=f"store of {kind}, {dtype}")
            purposes = {name: size / rows for name, size in store.statistics()["bytes"].items()}
            after = setup.backend.memory.used()
            held[kind, dtype] = purposes.get("vectors", 0.0)
            total = sum(purposes.values())
            table[f"{kind}, {dtype}"] = {
                **purposes,
                "total": total,
                "of float32 vectors": total / (data.dim * 4),
                "device or process": None if before is None or after is None else (after - before) / rows,
            }
            del store, filled
    share = max(held[kind, "float16"] / held[kind, "float32"] for kind in KINDS) if all(held.values()) else None
    return Part(
        {f"memory, bytes a row, {rows:,} x {data.dim}": table},
        [criterion("memory: vectors, float16 against float32", share, "of the bytes", f"<= {AIM}")],
    )
