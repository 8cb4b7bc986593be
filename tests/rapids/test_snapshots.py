"""Snapshots that go from one backend to the other, on our RAPIDS modules over stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.rapids_api

pytest.importorskip("cuvs", reason="the RAPIDS wheels are not installed")

from headrace.gpu.backend import Backend, resolve  # noqa: E402
from headrace.gpu.rows import DELETED  # noqa: E402
from headrace.gpu.snapshot_parts import read_into, write  # noqa: E402
from headrace.gpu.snapshot_place import Place  # noqa: E402
from tests.gpu.batches import vector_of  # noqa: E402
from tests.gpu.test_segment_files import test_it_comes_back_as_it_was  # noqa: E402, F401
from tests.gpu.test_snapshot_parts import (  # noqa: E402
    EVERY,
    NEVER_MERGED,
    put,
    sealed_in,
    state,
    store_of,
    test_a_store_comes_back_as_it_was,  # noqa: F401
)
from tests.rapids import stand_ins  # noqa: E402
from tests.rapids.test_conformance import backend  # noqa: E402, F401


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["flat", "graph", "ivf_pq"])
@pytest.mark.parametrize("way", ["to the host", "to the device"])
def test_the_other_backend_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str, kind: str, dtype: str
) -> None:
    stand_ins.install(monkeypatch)
    backends: list[Backend] = [resolve("host"), stand_ins.backend()]
    source, target = backends if way == "to the device" else backends[::-1]
    monkeypatch.setattr("headrace.gpu.rapids.graph._FEW_ROWS", 50)  # so that there is a graph
    before = store_of(source, kind=kind, dtype=dtype, seal_rows=64, merge=NEVER_MERGED)
    put(before, range(64))
    assert before.maintain()
    put(before, [3, 11, 25], cell=DELETED, offset=200)
    put(before, range(60, 70), offset=300)
    place = Place(str(tmp_path))
    part = write(before, place, "s1", "p0")
    after = store_of(target, kind=kind, dtype=dtype, merge=NEVER_MERGED)
    loaded = read_into(after, place, part, EVERY)
    assert (loaded.rows, loaded.adopted) == (before.view.rows, 1)
    assert state(after) == state(before)
    for segment in sealed_in(after).values():
        assert segment.calibration.recall(segment.calibration.effort(0.95)) >= 0.95
        assert segment.uid not in {file.uid for file in part.segments}, "another index is another segment"
    for row in (row for chunk in before.scan(vectors=True) for row in chunk):
        assert after.search(row.vector[None], 1).rows[0][0].id == row.id
    again = write(after, place, "s2", "p0")
    assert again.written_bytes == again.size
    back = store_of(source, kind=kind, dtype=dtype)
    read_into(back, place, again, EVERY)
    assert state(back) == state(before)
    assert back.search(vector_of("query")[None], 5).rows[0]
