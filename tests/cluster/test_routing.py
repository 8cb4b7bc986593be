"""Which cell a vector is given."""

from __future__ import annotations

import numpy as np

from headrace.cluster.fanout import Header, held_by, part_for
from headrace.cluster.routing import Router
from headrace.cluster.state import Codebook, CollectionSpec, CollectionState, first_codebook
from headrace.gpu.backend import resolve
from headrace.gpu.rows import DELETED, Action


def test_cells_are_numbered_by_their_codebook():
    centroids = np.eye(3, 4, dtype=np.float32)
    router = Router(Codebook(generation=2, first=70, centroids=centroids), resolve("host"))
    cells = router.cells(np.array([[0, 0, 0.9, 0], [1, 0, 0, 0.1]], dtype=np.float32))
    assert cells.dtype == np.int32
    assert cells.tolist() == [72, 70]


def test_the_first_codebook_has_one_cell_for_everything():
    router = Router(first_codebook(4), resolve("host"))
    assert router.cells(np.eye(4, dtype=np.float32)).tolist() == [0, 0, 0, 0]
    assert router.cells(np.empty((0, 4), dtype=np.float32)).tolist() == []


def test_a_worker_is_to_hold_the_rows_of_its_cells_and_drop_the_others():
    state = CollectionState(
        spec=CollectionSpec("docs", 2), codebook=first_codebook(2), copies={0: ("a", "b"), 1: ("b",), 2: ("c",)}
    )
    header = Header(
        ids=["x", "y", "z", "gone", "nowhere"],
        topic_partitions=np.zeros(5, dtype=np.int32),
        offsets=np.arange(5),
        timestamps=np.zeros(5, dtype=np.int64),
        cells=np.array([0, 1, 2, DELETED, 9], dtype=np.int32),
        vectors=np.arange(8, dtype=np.float32).reshape(4, 2),
        vector_at=np.array([0, 1, 2, 2, 3]),
        attributes={"n": [0, 1, 2, 3, 4]},
    )
    assert held_by(header, "b", state).tolist() == [True, True, False, False, False]
    part = part_for(header, "b", state)
    assert part.actions.dtype == np.uint8
    assert part.actions.tolist() == [Action.HOLD, Action.HOLD, Action.DROP, Action.DROP, Action.DROP]
    assert part.vectors.tolist() == [[0, 1], [2, 3]]
    assert part.attributes == {"n": [0, 1]}
