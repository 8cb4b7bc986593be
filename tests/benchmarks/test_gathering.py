"""The benchmark of gathering runs and reports; how fast is not asked here."""

from __future__ import annotations

import pytest

from benchmarks import gathering
from headrace.gpu.gather import GatherSettings


@pytest.mark.parametrize("kind", ["graph", "flat"])
def test_both_ways_are_measured_for_each_number_of_callers(kind: str) -> None:
    found = gathering.run(
        rows=600, dim=8, callers=(1, 6), seconds=0.05, rounds=1, kind=kind, settings=GatherSettings(most=4)
    )
    assert (found["rows"], found["index"], found["batch"]) == (600, kind, 4)
    assert found["1 callers"]["mean_batch"] == 1.0
    assert 1.0 < found["6 callers"]["mean_batch"] <= 4.0
    for callers in ("1 callers", "6 callers"):
        assert all(value > 0 for value in found[callers].values())
