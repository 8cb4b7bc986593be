"""Who holds which cell: a pure, deterministic function from what is known to who should hold what.

A copy that is there stays unless workers differ by more than `SLACK` in the rows they hold; then whole cells go over,
one at a time, from whoever holds most to whoever holds least. Where nothing is there yet, `layout` decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations

from headrace.cluster.layout import fresh_layout

__all__ = ["SLACK", "assign_readers", "cover", "place"]

SLACK = 0.2
"""Of the mean load: differences between workers that are smaller are not worth copying rows for."""


_FEW = 8


def place(
    cells: Iterable[int],
    workers: Sequence[str],
    replicas: int,
    *,
    rows: Mapping[int, int] | None = None,
    current: Mapping[int, Sequence[str]] | None = None,
    near: Sequence[int] | None = None,
) -> dict[int, tuple[str, ...]]:
    """Give every cell `replicas` copies on distinct workers, or as many as there are workers.

    Parameters
    ----------
    cells : iterable of int
    workers : sequence of str
        Addresses; their order does not matter.
    replicas : int
    rows : mapping of int to int, optional
        Rows by cell, the weight that is balanced; cells not named weigh one row.
    current : mapping of int to sequence of str, optional
        Copies that exist now.
    near : sequence of int, optional
        The cells in an order in which neighbours lie near each other (`layout.near_order`); default: by number.

    Returns
    -------
    dict of int to tuple of str
        The first copy is the one that speaks for the cell when rows move.
    """
    alive = sorted(workers)
    rows, current = rows or {}, current or {}
    weight = {cell: rows.get(cell, 0) + 1 for cell in cells}
    order = [cell for cell in near or sorted(weight) if cell in weight]
    layout = _Layout(weight, alive, order, min(replicas, len(alive)))
    kept = {cell: [worker for worker in current.get(cell, ()) if worker in layout.load] for cell in weight}
    if any(kept.values()):
        for cell, holders in kept.items():
            for worker in holders[: layout.replicas]:
                layout.add(cell, worker)
        layout.fill()
    else:
        for cell, holders in fresh_layout(order, alive, layout.replicas, weight).items():
            for worker in holders:
                layout.add(cell, worker)
    layout.even_out()
    return {cell: tuple(layout.placed[cell]) for cell in weight}


class _Layout:
    """A placement in the making."""

    def __init__(self, weight: Mapping[int, int], workers: list[str], order: Sequence[int], replicas: int) -> None:
        self.weight, self.workers, self.replicas = weight, workers, replicas
        self.load = dict.fromkeys(workers, 0)
        self.placed: dict[int, list[str]] = {cell: [] for cell in weight}
        self._shared: dict[tuple[str, str], int] = {}
        self._beside = {
            cell: [order[near] for near in (at - 1, at + 1) if 0 <= near < len(order)] for at, cell in enumerate(order)
        }

    def add(self, cell: int, worker: str) -> None:
        for peer in self.placed[cell]:
            self._share(worker, peer, self.weight[cell])
        self.placed[cell].append(worker)
        self.load[worker] += self.weight[cell]

    def fill(self) -> None:
        """Give each cell that lacks copies the workers that hold least, heaviest cells first."""
        for cell in sorted(self.weight, key=lambda number: (-self.weight[number], number)):
            while len(self.placed[cell]) < self.replicas:
                others = [worker for worker in self.workers if worker not in self.placed[cell]]
                self.add(cell, min(others, key=partial(self._merit, cell)))

    def even_out(self) -> None:
        """Move single cells from the fullest worker to the emptiest while they differ by more than `SLACK`."""
        if not self.workers:
            return
        allowed = SLACK * sum(self.load.values()) / len(self.workers)
        while True:
            most = max(self.workers, key=lambda worker: (self.load[worker], worker))
            least = min(self.workers, key=lambda worker: (self.load[worker], worker))
            gap = self.load[most] - self.load[least]
            # Only what makes the two more alike: the sum of squares falls with each move, so this ends.
            fitting = [
                cell
                for cell, holders in self.placed.items()
                if most in holders and least not in holders and 0 < self.weight[cell] < gap
            ]
            if gap <= allowed or not fitting:
                return
            cell = min(
                fitting, key=lambda cell: (-self._neighbours(cell, least), abs(gap - 2 * self.weight[cell]), cell)
            )
            self._move(cell, most, least)

    def _move(self, cell: int, old: str, new: str) -> None:
        holders = self.placed[cell]
        holders.remove(old)
        for peer in holders:
            self._share(old, peer, -self.weight[cell])
        self.load[old] -= self.weight[cell]
        self.add(cell, new)

    def _merit(self, cell: int, worker: str) -> tuple[int, int, int, int, str]:
        """Least loaded first; among equals who shares least with the other holders, then who holds cells nearby."""
        return (
            self.load[worker],
            sum(self._shared.get(_pair(worker, peer), 0) for peer in self.placed[cell]),
            -self._neighbours(cell, worker),
            _mix(cell, worker),
            worker,
        )

    def _neighbours(self, cell: int, worker: str) -> int:
        return sum(worker in self.placed[near] for near in self._beside[cell])

    def _share(self, one: str, other: str, rows: int) -> None:
        pair = _pair(one, other)
        self._shared[pair] = self._shared.get(pair, 0) + rows


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


def assign_readers(partitions: int, workers: Sequence[str], current: Mapping[int, str]) -> dict[int, str]:
    """Share out topic partitions evenly; one that is read already moves only where shares differ by more than one."""
    alive = sorted(workers)
    if not alive:
        return {}
    share: dict[str, list[int]] = {worker: [] for worker in alive}
    orphans = []
    for partition in range(partitions):
        owner = current.get(partition, "")
        if owner in share:
            share[owner].append(partition)
        else:
            orphans.append(partition)
    for partition in orphans:
        share[min(alive, key=lambda worker: (len(share[worker]), worker))].append(partition)
    while True:
        most = max(alive, key=lambda worker: (len(share[worker]), worker))
        least = min(alive, key=lambda worker: (len(share[worker]), worker))
        if len(share[most]) - len(share[least]) <= 1:
            return {partition: worker for worker in alive for partition in share[worker]}
        share[least].append(share[most].pop())


def cover(cells: Iterable[int], serving: Mapping[int, Sequence[str]], *, avoid: frozenset[str], turn: int) -> list[str]:
    """The fewest workers that together hold all `cells`, ties taken in turn so that copies share the reads.

    The fewest for certain among up to `_FEW` workers; among more, what taking the worker with most cells first gives.

    Returns
    -------
    list of str
        Empty when some cell has no copy outside `avoid`.
    """
    missing = {cell: [worker for worker in serving.get(cell, ()) if worker not in avoid] for cell in cells}
    if not all(missing.values()):
        return []
    chosen = _greedy(missing, turn)
    candidates = sorted({worker for holders in missing.values() for worker in holders})
    if len(candidates) <= _FEW:
        needed = {frozenset(holders) for holders in missing.values()}
        for size in range(1, len(chosen)):
            fewer = [some for some in combinations(candidates, size) if all(not h.isdisjoint(some) for h in needed)]
            if fewer:
                return list(fewer[turn % len(fewer)])
    return chosen


def _greedy(missing: Mapping[int, Sequence[str]], turn: int) -> list[str]:
    chosen: list[str] = []
    for worker in sorted({holders[0] for holders in missing.values() if len(holders) == 1}):
        chosen.append(worker)  # a cell with one holder leaves no choice; taking it first spares others
        missing = {cell: holders for cell, holders in missing.items() if worker not in holders}
    while missing:
        gain: dict[str, int] = {}
        for holders in missing.values():
            for worker in holders:
                gain[worker] = gain.get(worker, 0) + 1
        best = max(gain.values())
        candidates = sorted(worker for worker, count in gain.items() if count == best)
        worker = candidates[turn % len(candidates)]
        chosen.append(worker)
        missing = {cell: holders for cell, holders in missing.items() if worker not in holders}
    return chosen


def _mix(cell: int, worker: str) -> int:
    """A fixed order per cell, so that equal loads do not always choose the same worker."""
    # A real hash: addresses differ in a digit or two, and a linear one pairs the same workers for every cell.
    return int.from_bytes(hashlib.blake2b(f"{cell} {worker}".encode(), digest_size=8).digest(), "little")
