"""What a backend says of its memory."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.gpu.backend import Backend, resolve

BYTES = 64 << 20


def test_the_process_of_a_host_is_counted() -> None:
    memory = resolve("host").memory
    memory.start(None)
    memory.start(1 << 40)
    before = memory.used()
    held = np.ones(BYTES, dtype=np.uint8)
    after = memory.used()
    assert before is not None
    assert after is not None
    assert 0.9 * held.nbytes < after - before < 2 * held.nbytes


def test_statistics_are_bytes(backend: Backend) -> None:
    backend.memory.start(None)
    figures = backend.memory.statistics()
    assert {"used", "reserved", "free", "total"} <= set(figures)
    assert all(type(value) is int and value >= 0 for value in figures.values())
    assert figures["used"] <= figures["reserved"]
    assert figures["free"] <= figures["total"]


@pytest.mark.gpu
def test_the_pool_of_a_device_counts_every_library() -> None:
    backend = resolve("rapids")
    backend.memory.start(None)
    xp, memory = backend.xp, backend.memory
    frame, _ = backend.frames.decode_json([b'{"x": 1}'])  # what a library keeps for itself is there from now on
    before = memory.used()
    held = xp.ones(BYTES, dtype=xp.uint8)
    assert memory.used() - before >= held.nbytes
    frame, _ = backend.frames.decode_json([b'{"x": %d}' % number for number in range(100_000)])
    assert memory.used() - before >= held.nbytes + 800_000
    del held, frame
    assert memory.used() - before < 1 << 20
    assert memory.statistics()["peak"] >= before + BYTES
    with pytest.raises(MemoryError):
        xp.empty(memory.statistics()["total"] * 2, dtype=xp.uint8)
