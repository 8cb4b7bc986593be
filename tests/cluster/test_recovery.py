"""Which state a collection goes on from when only its workers know of it."""

from __future__ import annotations

from headrace.cluster.planning import adopt_codebook, attached, membership, settle
from headrace.cluster.recovery import recovered
from headrace.cluster.snapshot_state import Snapshots
from headrace.cluster.state import CollectionState
from tests.cluster.test_planning import SOURCE, A, B, C, begin, centroids


def test_all_hold_the_same() -> None:
    state = begin(A, B).with_(schema={"a": "int"}, alarms=("the log was cut",))
    found, incomplete = recovered({A: state, B: state})
    assert found.epoch > state.epoch
    assert found == state.with_(epoch=found.epoch)
    assert not incomplete


def test_the_newest_that_anybody_was_sent_counts() -> None:
    old = begin(A, B, source=None)
    new = attached(old, SOURCE)
    found, incomplete = recovered({A: new, B: old})
    assert found.source == SOURCE
    assert found.epoch > new.epoch
    assert not incomplete


def test_what_has_no_epoch_is_put_together() -> None:
    state = begin(A, B)
    left = state.with_(schema={"a": "int"}, alarms=("one",))
    right = state.with_(schema={"b": "str"}, alarms=("two", "one"))
    found, _ = recovered({A: left, B: right})
    assert found.schema == {"a": "int", "b": "str"}
    assert set(found.alarms) == {"one", "two"}


def test_what_is_known_of_snapshots_is_the_newest_of_that() -> None:
    state = begin(A, B)
    older = state.with_(epoch=state.epoch + 1, snapshots=Snapshots(url="/old", every=60.0, revision=3))
    newer = state.with_(snapshots=Snapshots(url="/new", every=60.0, last="000002-x", revision=4))
    found, _ = recovered({A: older, B: newer})
    assert found.snapshots == newer.snapshots


def test_a_new_codebook_is_kept_while_rows_still_wait() -> None:
    old = begin(A, B)
    new = adopt_codebook(old, centroids(4))
    found, incomplete = recovered({A: old, B: new})
    assert found.codebook is new.codebook
    assert found.previous is old.codebook
    assert found.moving
    assert not incomplete


def joined_and_settled() -> tuple[CollectionState, CollectionState]:
    joining = membership(begin(A, B), [A, B, C])
    return joining, settle(joining)


def test_a_move_whose_end_nobody_but_the_joined_had_heard_is_done_again() -> None:
    joining, settled = joined_and_settled()
    both = membership(begin(A), [A, B, C])
    assert recovered({A: joining, B: joining, C: joining})[0].moving
    # B, which has heard of the end, and C, which has not, had both joined; A may not have dropped anything yet.
    found, incomplete = recovered({A: both, B: settle(both), C: both})
    assert found.moving
    assert found.members == both.members
    assert found.epoch > settle(both).epoch
    assert not incomplete
    # All that joined have heard.
    found, incomplete = recovered({A: joining, B: joining, C: settled})
    assert not found.moving
    assert not incomplete


def test_a_worker_that_missed_the_end_when_others_have_dropped_rows_begins_anew() -> None:
    joining, settled = joined_and_settled()
    found, incomplete = recovered({A: settled, B: settled, C: joining})
    assert not found.moving
    assert incomplete == {C}


def test_a_worker_of_an_older_incarnation_begins_anew() -> None:
    """The others' readers may have passed what it would lack."""
    joining, _ = joined_and_settled()
    again = membership(membership(joining, []), [A, C])
    assert again.incarnation == 1
    found, incomplete = recovered({A: again, C: joining})
    assert found.incarnation == 1
    assert incomplete == {C}
    found, incomplete = recovered({A: again, C: again})
    assert not incomplete
