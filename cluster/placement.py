"""Who holds which cell: a pure, deterministic function from what is known to who should hold what.

Few rows move: a copy that is there stays, and only what is missing is given to whoever holds least. Copies are
scattered, because each missing copy is placed by itself, so that the copies of one worker's cells spread over all the
others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["assign_readers", "cover", "place"]


def place(
    cells: Iterable[int],
    workers: Sequence[str],
    replicas: int,
    *,
    rows: Mapping[int, int] | None = None,
    current: Mapping[int, Sequence[str]] | None = None,
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
        Copies that exist now; those on `workers` stay.

    Returns
    -------
    dict of int to tuple of str
        The first copy is the one that speaks for the cell when rows move.
    """
    alive = sorted(workers)
    rows, current = rows or {}, current or {}
    weight = {cell: rows.get(cell, 0) + 1 for cell in cells}
    load = dict.fromkeys(alive, 0)
    placed: dict[int, list[str]] = {}
    for cell in weight:
        placed[cell] = [worker for worker in current.get(cell, ()) if worker in load][: max(1, replicas)]
        for worker in placed[cell]:
            load[worker] += weight[cell]
    for cell in sorted(weight, key=lambda number: (-weight[number], number)):
        while len(placed[cell]) < min(replicas, len(alive)):
            worker = min((w for w in alive if w not in placed[cell]), key=lambda w: (load[w], _mix(cell, w), w))
            placed[cell].append(worker)
            load[worker] += weight[cell]
    return {cell: tuple(holders) for cell, holders in placed.items()}


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
    """The fewest workers that together hold all `cells` (greedy), ties taken in turn so that copies share the reads.

    Returns
    -------
    list of str
        Empty when some cell has no copy outside `avoid`.
    """
    missing = {cell: [worker for worker in serving.get(cell, ()) if worker not in avoid] for cell in cells}
    if not all(missing.values()):
        return []
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
