"""Which workers a collection can count on: who is there, who has stopped answering, and who is being emptied."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from headrace.cluster.roles import may_hold, may_ingest
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import ClusterError

__all__ = ["Attendance"]

log = logging.getLogger("headrace.cluster")


class Attendance:
    """What a coordinator knows of the workers, whatever its collection's state says of them yet.

    Parameters
    ----------
    roles : mapping of str to str, optional
        Worker to what it is there for (`roles`); it may change later. Default: all may do everything.

    Attributes
    ----------
    live : set of str
        Workers that Dask counts as there.
    suspects : dict of str to str
        Workers that did not answer, and why: they leave the placement until they answer again, and then join anew.
    leaving : set of str
        Workers that are being emptied; they go on answering meanwhile.
    """

    def __init__(self, roles: Mapping[str, str] | None = None) -> None:
        self.roles: Mapping[str, str] = {} if roles is None else roles
        self.live: set[str] = set()
        self.suspects: dict[str, str] = {}
        self.leaving: set[str] = set()

    @property
    def counted_on(self) -> set[str]:
        """Workers that a placement may name."""
        return self.live - set(self.suspects)

    def came(self, address: str) -> None:
        """A worker has begun, with nothing in it."""
        self.suspects.pop(address, None)
        self.live.add(address)

    def went(self, address: str) -> None:
        """A worker has ended."""
        self.suspects.pop(address, None)
        self.leaving.discard(address)
        self.live.discard(address)

    def lost(self, members: Collection[str]) -> list[str]:
        """Those of `members` that cannot be counted on."""
        return [address for address in members if address in self.suspects or address not in self.live]

    def suspect(self, state: CollectionState, address: str, why: str) -> bool:
        """A member did not answer one of its peers; False where nothing comes of it."""
        name = state.spec.name
        if address not in state.members or address in self.suspects:
            return False
        if address in self.live and (address,) in state.serving.values():
            # Without it rows would be gone: writes wait until it answers, or Dask says that it is dead.
            log.warning("collection %r: waiting for %s, which holds last copies: %s", name, address, why)
            return False
        log.warning("collection %r: %s leaves the placement: %s", name, address, why)
        self.suspects[address] = why
        return True

    def out(self, state: CollectionState) -> list[str]:
        """Suspects that have left the placement and may answer again."""
        return [worker for worker in self.suspects if worker not in state.members and worker in self.live]

    def check_drain(self, state: CollectionState, address: str) -> None:
        """Raise `ClusterError` if `address` cannot be emptied."""
        name, members = state.spec.name, state.members
        if address not in members:
            raise ClusterError(f"{address!r} is no worker of collection {name!r}; they are {', '.join(members)}")
        others = set(members) - self.leaving - {address}
        if may_hold([address], self.roles) and not may_hold(others, self.roles):
            raise ClusterError(
                f"{address} is the last worker that holds collection {name!r}: start another before this one is drained"
            )
        if state.source and may_ingest([address], self.roles) and not may_ingest(others, self.roles):
            raise ClusterError(
                f"{address} is the last worker that may read the topic of collection {name!r}: start another before "
                "this one is drained"
            )

    def can_do_without(self, state: CollectionState, going: Collection[str]) -> bool:
        """Whether others can hold what the `going` members of a collection do."""
        others = set(state.members) - self.leaving - set(going)
        return bool(may_hold(others, state.roles)) and not others.issuperset(state.members)

    def has_emptied(self, state: CollectionState, address: str) -> bool:
        """Whether nothing is missed of a collection if a worker that was to be emptied ends now."""
        if address not in state.members:
            return True
        if address not in state.leaving or state.moving or any(address in held for held in state.copies.values()):
            return False
        # Where nobody else may read the topic, it goes on until it ends, and is read on once somebody comes.
        others = set(state.active) - set(state.leaving)
        return address not in state.readers.values() or not may_ingest(others, state.roles)
