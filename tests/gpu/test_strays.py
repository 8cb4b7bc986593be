"""Rows that a damaged store answers with go; of a healthy one nothing does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.gpu.backend import resolve
from headrace.gpu.rows import DELETED
from headrace.gpu.store import Store, StoreSettings
from tests.faults import damage
from tests.gpu.batches import DIM, batch_of

NAMES = "abcdef"


def filled(upserts: str = NAMES) -> Store:
    store = Store(resolve("host"), DIM, "l2", StoreSettings(seal_rows=4))
    for offset, name in enumerate(upserts):
        store.apply(batch_of([{"id": name, "offset": offset, "attributes": {"n": offset}}]))
    return store


def shown(store: Store) -> list[tuple[str, int, int]]:
    return sorted((str(row.id), row.offset, row.cell) for rows in store.scan() for row in rows)


@pytest.mark.parametrize("sealed", [False, True], ids=["growing", "sealed"])
@pytest.mark.parametrize("cell", [None, 3], ids=["same cell", "another"])
def test_a_second_row_goes_and_the_rightful_one_stays(sealed: bool, cell: int | None) -> None:
    store = filled()
    while sealed and store.maintain(settle=True):
        pass
    before = shown(store)
    damage.double(store, "b", cell)
    assert len(shown(store)) == len(before) + 1
    assert store.drop_strays(["a"]) == 0, "it is another's"
    assert store.drop_strays(["a", "b"]) == 1
    assert shown(store) == before
    assert store.view.rows == len(before)
    while store.maintain(settle=True):
        pass
    store.apply(batch_of([{"id": "b", "offset": 90, "cell": DELETED}]))
    assert shown(store) == [row for row in before if row[0] != "b"]


def test_a_row_that_was_replaced_or_deleted_and_answers_again_goes() -> None:
    store = filled()
    places = [damage.place_of(store, name) for name in "ef"]
    store.apply(batch_of([{"id": "e", "offset": 50}, {"id": "f", "offset": 51, "cell": DELETED}]))
    before = shown(store)
    for part, row in places:
        damage.revive(store, part, row)
    assert store.drop_strays(list(NAMES)) == 2
    assert shown(store) == before


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.booleans(), st.booleans()), max_size=30))
def test_a_healthy_store_has_none(steps: list[tuple[str, bool, bool]]) -> None:
    store = filled("")
    for offset, (name, upsert, tidy) in enumerate(steps):
        store.apply(batch_of([{"id": name, "offset": offset, "cell": 0 if upsert else DELETED}]))
        if tidy:
            store.maintain()
        before = shown(store)
        assert store.drop_strays(list(NAMES)) == 0
        assert shown(store) == before
