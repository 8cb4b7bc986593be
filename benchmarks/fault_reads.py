"""Reads at a fixed rate from a client in a process of its own, each with what it took and what it found.

In a process of its own, because the scheduler of a cluster on this machine lives in the program that started it, and
a read must not be slow because that program is busy breaking things.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import headrace

__all__ = ["Asked", "One", "Reads", "reading", "vector"]

LIMIT = 10
_MOST_AT_ONCE = 256


class One(NamedTuple):
    """One read: when it began (`time.monotonic`), how long it took (ms), the recall of its answer, or its error."""

    began: float
    ms: float
    recall: float
    error: str


@dataclass(frozen=True)
class Asked:
    """What is read: `rate` searches a second among `rows` rows that nobody changes meanwhile, see `vector`."""

    address: str
    collection: str
    rate: float
    rows: int
    dim: int
    seed: int
    consistency: str = "eventual"


def vector(seed: int, number: int, dim: int, *, still: bool) -> npt.NDArray[np.float32]:
    """A vector, float32 (dim,): those that stay `still` lie so far from the others that they are found alone."""
    values = np.random.default_rng([seed, number, still]).standard_normal(dim, dtype=np.float32)
    values[0] = 8.0 if still else -8.0
    return values


class Reads:
    """What `reading` has found, once its block has ended."""

    def __init__(self) -> None:
        self.all: list[One] = []

    def between(self, begin: float, end: float) -> list[One]:
        """Those that were under way at some moment of the time from `begin` to `end`."""
        return [one for one in self.all if one.began <= end and one.began + one.ms / 1e3 >= begin]


@contextlib.contextmanager
def reading(asked: Asked) -> Iterator[Reads]:
    """Read while the block runs; it begins once the first answers are there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(asked, theirs), daemon=True)
    process.start()
    theirs.close()
    reads = Reads()
    try:
        _hear(ours)
        yield reads
        ours.send("stop")
        reads.all = [One(*one) for one in _hear(ours)]
    finally:
        ours.close()
        process.join(10.0)
        if process.is_alive():
            process.kill()


def _hear(pipe: Connection) -> Any:
    if not pipe.poll(60.0):
        raise headrace.ClusterError("the process that reads did not answer within 60 s: is the machine overloaded?")
    try:
        return pipe.recv()
    except EOFError as error:
        raise headrace.ClusterError("the process that reads has ended before its time: its error is above") from error


def _main(asked: Asked, pipe: Connection) -> None:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # that workers die is the point
    pipe.send(asyncio.run(_read(asked, pipe)))


async def _read(asked: Asked, pipe: Connection) -> list[One]:
    vectors = np.stack([vector(asked.seed, number, asked.dim, still=True) for number in range(asked.rows)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.random.default_rng(asked.seed)
    found: list[One] = []
    under_way: set[asyncio.Task[None]] = set()
    async with headrace.connect_async(asked.address) as db:
        collection = await db.collection(asked.collection)

        async def one(which: int, note: bool) -> None:
            began, recall, why = time.monotonic(), 0.0, ""
            try:
                hits: Any = await collection.search(vectors[which], limit=LIMIT, consistency=asked.consistency)
                recall = _recall(vectors, which, [hit.id for hit in hits])
            except headrace.HeadraceError as error:
                why = f"{type(error).__name__}: {error}"
            if note:
                found.append(One(began, (time.monotonic() - began) * 1e3, recall, why))

        for _ in range(20):  # connections are made, and what is slow is learnt
            await one(0, note=False)
        pipe.send("ready")
        start, sent = time.monotonic(), 0
        while not pipe.poll():
            due = start + sent / asked.rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent += 1
            if len(under_way) < _MOST_AT_ONCE:
                task = asyncio.ensure_future(one(int(order.integers(asked.rows)), note=True))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
    return found


def _recall(vectors: npt.NDArray[np.float32], which: int, ids: Sequence[object]) -> float:
    scores = vectors @ vectors[which]
    worst = np.partition(scores, -LIMIT)[-LIMIT] - 1e-6  # of equals, either will do
    good = {f"still-{number}" for number in np.flatnonzero(scores >= worst).tolist()}
    return len(good & set(ids)) / LIMIT
