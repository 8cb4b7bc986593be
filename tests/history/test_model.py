"""Whatever a right collection does is found to be right, and each rule that it breaks is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history.checker import LEVELS, check_all
from tests.history.model import DELETED, TOPIC_PARTITIONS, WORKERS, Model

CLIENTS = ("one", "two")
IDS = range(5)
ASKED = tuple(IDS)

clients, workers, levels = (
    st.sampled_from(CLIENTS),
    st.sampled_from(WORKERS),
    st.sampled_from(["strong", "session", "bounded:3000", "eventual"]),
)
between = st.dictionaries(workers, st.integers(0, 4), max_size=2)
steps = st.one_of(
    st.builds(lambda *given: lambda model: model.write(*given), clients, st.sampled_from(IDS), st.integers(DELETED, 2)),
    st.builds(
        lambda *given: lambda model: model.apply(*given),
        workers,
        st.integers(0, TOPIC_PARTITIONS - 1),
        st.integers(1, 4),
    ),
    st.builds(
        lambda *given: lambda model: model.read(*given),
        clients,
        levels,
        st.sampled_from([(), ASKED]),
        st.integers(0, 2),
        between,
    ),
)


def judged(model: Model) -> set[str]:
    return {v.invariant for v in check_all(model.finish(), freshness_ms=None, required=()).violations}


@settings(max_examples=300)
@given(st.lists(steps, max_size=30))
def test_a_right_collection_breaks_no_promise(script: list[Callable[[Model], None]]) -> None:
    model = Model()
    for step in script:
        step(model)
    report = check_all(model.finish(), freshness_ms=None, required=())
    assert report.ok, str(report)


def moved_on_one_copy(model: Model) -> None:
    """Id 0 moves from cell 0 (w0, w1) to cell 1 (w1, w2), and w0 has heard of it first."""
    model.write("one", 0, 0)
    for worker in WORKERS:
        model.apply(worker, 0, 1)
    model.write("one", 0, 1)
    model.apply("w0", 0, 1)


def read_between_copies(model: Model, level: str) -> None:
    moved_on_one_copy(model)
    model.read("two", level, ASKED, 2, {})  # w2 and w0


def lagging(model: Model, level: str) -> None:
    moved_on_one_copy(model)
    model.read("one", level, ASKED, 1, {})  # w1 and w2


def late_on_its_copy(model: Model) -> None:
    """Id 0 is written to cell 1 (w1, w2); only w0, which does not hold it, has heard of it."""
    model.write("one", 0, 1)
    model.apply("w0", 0, 1)
    model.read("two", "eventual", ASKED, 2, {})  # w2 and w0


def shown_before(model: Model) -> None:
    moved_on_one_copy(model)
    model.apply("w1", 0, 1)
    model.read("two", "eventual", ASKED, 0, {})  # w0 and w1 have all
    model.read("two", "session", ASKED, 1, {"w2": 0})


def deleted(model: Model) -> None:
    model.write("one", 0, 0)
    model.write("one", 0, DELETED)
    model.read("two", "strong", ASKED, 0, {})


@pytest.mark.parametrize(
    ("fault", "script", "invariant"),
    [
        ("answers that do not fit", lambda model: read_between_copies(model, "eventual"), "I5"),
        ("answers that do not fit", lambda model: read_between_copies(model, "bounded:60000"), "I5"),
        ("claims the most", late_on_its_copy, "I5"),
        ("strong does not wait", lambda model: lagging(model, "strong"), "promise"),
        ("session does not wait", lambda model: lagging(model, "session"), "promise"),
        ("session does not wait", shown_before, "promise"),
        ("bounded:1 does not wait", lambda model: lagging(model, "bounded:1"), "promise"),
        ("deletes get lost", deleted, "I3"),
    ],
)
def test_a_broken_rule_is_noticed(fault: str, script: Callable[[Model], None], invariant: str) -> None:
    right, wrong = Model(), Model(frozenset([fault]))
    script(right)
    script(wrong)
    assert not judged(right)
    assert invariant in judged(wrong)


def test_every_level_is_in_the_model() -> None:
    model = Model()
    model.write("one", 0, 0)
    for level in ("strong", "session", "bounded:3000", "eventual"):
        model.read("one", level, (), 0, {})
    assert check_all(model.finish(), freshness_ms=None, required=LEVELS).ok
