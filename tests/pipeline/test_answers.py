"""One answer out of those of several workers."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.pipeline.answers import size_of


def answer(sizes: dict[int, int], ids: list[int] | None = None) -> dict[str, Any]:
    hashes = None if ids is None else np.array(ids, dtype="<u8").tobytes()
    return {"cell_sizes": list(map(list, sizes.items())), "ids": hashes}


def test_of_copies_that_differ_the_larger_counts() -> None:
    assert size_of([answer({1: 5, 2: 7}), answer({2: 8, 3: 1})]) == 14
    assert size_of([]) == 0


def test_a_row_in_an_old_cell_here_and_a_new_one_there_counts_once() -> None:
    assert size_of([answer({0: 3}, [7, 8, 9]), answer({4: 2}, [2**64 - 1, 8])]) == 4
    assert size_of([answer({0: 3}, [7, 8, 9]), answer({4: 2})]) == 5, "one has too many rows to tell them"
