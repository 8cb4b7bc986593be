"""A collection's state from what its workers hold, when the scheduler that knew it is gone. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.cluster.state import CollectionState

__all__ = ["recovered"]

_APART = 16
"""Epochs left out: the lost scheduler may have begun a change of which no worker, but some client, has heard."""


def recovered(held: Mapping[str, CollectionState]) -> tuple[CollectionState, frozenset[str]]:
    """The state to go on from, and the members that must begin anew.

    Parameters
    ----------
    held : mapping of str to CollectionState
        Worker to the newest state that it was sent; not empty, all of one creation.

    Returns
    -------
    state : CollectionState
        The newest that was sent, under an epoch that nobody has seen; or, while rows were moving and the end of that
        was just being told, the one before it: what had been moved is moved once more, which changes nothing.
    incomplete : frozenset of str
        Of `held`, members that are to be read but lack rows or do not know that they have them all.
    """
    newest = max(held.values(), key=lambda state: state.epoch)
    unaware = {
        worker: state
        for worker, state in held.items()
        if newest.members.get(worker) == "active"
        and state.members.get(worker) != "active"
        and state.incarnation == newest.incarnation
    }
    chosen, incomplete = newest, frozenset(unaware)
    if unaware:
        before = max(unaware.values(), key=lambda state: state.epoch)
        told = [worker for worker, state in held.items() if state.epoch > before.epoch]
        # Those that joined are told before those that then drop what the others have taken over.
        if all(before.members.get(worker) == "joining" for worker in told):
            chosen, incomplete = before, frozenset()
    # Who has not heard of a new incarnation begins empty when it does, and nobody would read for it what the others'
    # readers have passed since.
    incomplete |= {
        worker
        for worker, state in held.items()
        if state.incarnation < chosen.incarnation and chosen.members.get(worker) == "active"
    }
    schema: dict[str, str] = {}
    alarms: dict[str, None] = {}
    for state in sorted(held.values(), key=lambda state: state.epoch, reverse=True):
        schema = {**state.schema, **schema}
        alarms = {**alarms, **dict.fromkeys(state.alarms)}
    snapshots = max((state.snapshots for state in held.values()), key=lambda known: known.revision)
    epoch = newest.epoch + _APART
    return chosen.with_(epoch=epoch, schema=schema, alarms=tuple(alarms), snapshots=snapshots), incomplete
