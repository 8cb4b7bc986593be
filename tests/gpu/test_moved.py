"""What a view says of records that took rows away from it: no more and, above all, no less."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.gpu.backend import resolve
from headrace.gpu.rows import DELETED, Action
from headrace.gpu.store import Store, StoreSettings
from tests.gpu.batches import DIM, batch_of, vector_of


@pytest.fixture
def store() -> Store:
    made = Store(resolve("host"), DIM, "cosine", StoreSettings())
    made.apply(batch_of([{"id": name, "offset": n, "partition": n % 2} for n, name in enumerate("abcd")]), {0: 3, 1: 4})
    return made


def elsewhere(row_id: Any, offset: int, partition: int) -> dict[str, Any]:
    return {"id": row_id, "offset": offset, "partition": partition, "cell": 7, "action": Action.DROP}


def test_a_row_that_lives_elsewhere_now_is_moved(store: Store) -> None:
    assert store.view.moved == {}
    before = store.view
    store.apply(batch_of([elsewhere("a", 8, 0), elsewhere("c", 6, 0), elsewhere("b", 5, 1)]), {0: 9, 1: 6})
    assert store.view.moved == {0: 9, 1: 6}
    assert before.moved == {}, "a published view never changes"
    store.apply(batch_of([elsewhere("d", 4, 1)]), {1: 6})
    assert store.view.moved == {0: 9, 1: 6}, "it never falls"


def test_what_takes_no_row_away_is_not(store: Store) -> None:
    store.apply(batch_of([{"id": "a", "offset": 10, "cell": DELETED}, {"id": "c", "offset": 11}]))
    store.apply(batch_of([elsewhere("new", 12, 0), elsewhere("c", 2, 0)]))
    assert store.view.moved == {}
    assert store.get(["a", "c", "new"])[1].moved == {}


def test_where_older_records_may_still_come_all_that_is_elsewhere_counts(store: Store) -> None:
    store.apply(batch_of([elsewhere("new", 12, 0), {"id": "a", "offset": 20, "cell": DELETED}]), gaps=True)
    assert store.view.moved == {0: 13}
    assert store.search(vector_of("b", 1)[None], 1).moved == {0: 13}
    assert store.get(["new"])[1].moved == {0: 13}
