"""What a batch changes, decided for all rows at once, against the rules applied row by row."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.applying import Known, decide
from headrace.gpu.rows import Action, Batch
from headrace.gpu.versions import Versions, compare

small = st.integers(0, 2)
version = st.tuples(small, small, small)
row = st.tuples(version, st.sampled_from(Action), st.sampled_from(["live", "remembered", "unknown"]), version)


def versions_of(rows: list[tuple[int, int, int]]) -> Versions:
    partitions, offsets, timestamps = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Versions(partitions.astype(np.int32), offsets, timestamps)


def order(mine: tuple[int, int, int], theirs: tuple[int, int, int]) -> int:
    """By offset within a topic partition, else by time, then by topic partition."""
    if mine[0] == theirs[0]:
        return (mine[1] > theirs[1]) - (mine[1] < theirs[1])
    left, right = (mine[2], mine[0]), (theirs[2], theirs[0])
    return (left > right) - (left < right)


@given(st.lists(st.tuples(version, version), max_size=8))
def test_versions_compare_as_they_do_one_by_one(pairs: list[tuple[tuple[int, int, int], tuple[int, int, int]]]) -> None:
    left, right = versions_of([pair[0] for pair in pairs]), versions_of([pair[1] for pair in pairs])
    orders, crossed = compare(left, right)
    assert orders.tolist() == [order(*pair) for pair in pairs]
    assert crossed.tolist() == [mine[0] != theirs[0] for mine, theirs in pairs]


@given(st.lists(row, max_size=10))
def test_a_batch_is_decided_as_its_rows_are(
    rows: list[tuple[tuple[int, int, int], Action, str, tuple[int, int, int]]],
) -> None:
    mine = versions_of([one[0] for one in rows])
    held = sum(one[1] == Action.HOLD for one in rows)
    batch = Batch(
        list(range(len(rows))),
        mine.topic_partitions,
        mine.offsets,
        mine.timestamps,
        np.zeros(len(rows), dtype=np.int32),
        np.array([one[1] for one in rows], dtype=np.uint8),
        np.zeros((held, 1), dtype=np.float32),
    )
    state = np.array([one[2] for one in rows])
    known = Known(state == "live", state == "remembered", versions_of([one[3] for one in rows]))
    expected: dict[str, list[int]] = {
        name: [] for name in ("relabel", "kill", "insert", "vector_rows", "renew", "remember", "release", "missing")
    }
    foreign = vectors = 0
    for at, (new, action, heard, old) in enumerate(rows):
        vector, vectors = vectors, vectors + (action == Action.HOLD)
        newer = 1 if heard == "unknown" else order(new, old)
        foreign += heard != "unknown" and new[0] != old[0]
        if newer < 0:
            continue
        if newer == 0 and heard == "live" and action != Action.DROP:
            expected["relabel"].append(at)
        elif action == Action.KEEP:
            expected["missing"].append(at)
        else:
            if heard == "live":
                expected["kill"].append(at)
            if action == Action.HOLD:
                expected["insert"].append(at)
                expected["vector_rows"].append(vector)
                if heard == "remembered":
                    expected["release"].append(at)
            else:
                expected["renew" if heard == "remembered" else "remember"].append(at)
    decision = decide(batch, known)
    assert {name: getattr(decision, name).tolist() for name in expected} == expected
    assert decision.foreign == foreign
