"""Runbooks of the big-ann-benchmarks' streaming track: what to insert, delete and ask, step by step.

The format is that of the NeurIPS 2023 challenge: a YAML file with a section for each data set, in it ``max_pts`` (most
points that are in the index at once) and steps numbered from 1. A step has an ``operation``: ``insert`` and ``delete``
take the vectors from ``start`` up to, not including, ``end``; ``replace`` gives the tags from ``tags_start`` to
``tags_end`` the vectors from ``ids_start`` to ``ids_end``; ``search`` asks the data set's queries. ``gt_url`` is where
they publish the true answers: it is not used, since here they are computed.

    python -m benchmarks.runbook        write benchmarks/runbooks/*.yaml again
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from headrace.gpu.errors import ConfigError

__all__ = ["FOLDER", "Runbook", "Step", "clustered", "expiration", "read", "scaled", "sliding_window", "write"]

FOLDER = Path(__file__).parent / "runbooks"
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "insert": ("start", "end"),
    "delete": ("start", "end"),
    "replace": ("tags_start", "tags_end", "ids_start", "ids_end"),
    "search": (),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `tags` are the ids that users see, `vectors` the rows of the data set they get; ranges, end excluded.

    For an insert both are the same, a delete has no vectors, a search has neither.
    """

    operation: str
    tags: range = range(0)
    vectors: range = range(0)

    def to_yaml(self) -> dict[str, Any]:
        """The step as it stands in a file."""
        names = _FIELDS[self.operation]
        numbers = (self.tags.start, self.tags.stop, self.vectors.start, self.vectors.stop)
        return {"operation": self.operation, **dict(zip(names, numbers[: len(names)], strict=True))}


@dataclass(frozen=True)
class Runbook:
    """Steps over one data set.

    Attributes
    ----------
    dataset : str
    max_points : int
        Most that are in the index at once, as the file says.
    steps : tuple of Step
    """

    dataset: str
    max_points: int
    steps: tuple[Step, ...]

    @property
    def vectors(self) -> int:
        """How many vectors the data set must have."""
        return max((max(step.tags.stop, step.vectors.stop) for step in self.steps), default=0)

    def check(self) -> None:
        """Go through the steps without any vectors.

        Raises
        ------
        ConfigError
            A step inserts what is there already, deletes or replaces what is not, or there are more points than
            `max_points`; names the step.
        """
        live = Live(self.vectors)
        for number, step in enumerate(self.steps, 1):
            try:
                live.take(step)
            except ConfigError as error:
                raise ConfigError(f"runbook {self.dataset!r}, step {number}: {error}") from error
            if live.count > self.max_points:
                raise ConfigError(
                    f"runbook {self.dataset!r}, step {number}: {live.count} points are in the index and max_pts is "
                    f"{self.max_points}: correct one of them"
                )


class Live:
    """Which tags are in the index, and with which vector: what the store is held against."""

    def __init__(self, size: int) -> None:
        self._vector = np.full(size, -1, dtype=np.int64)
        self.count = 0

    def take(self, step: Step) -> None:
        """Do a step; ConfigError if it cannot be done, and then nothing is."""
        there = self._vector[step.tags.start : step.tags.stop] >= 0
        if step.operation == "insert" and there.any():
            raise ConfigError(f"it inserts {step.tags.start + int(there.argmax())}, which is there already")
        if step.operation in ("delete", "replace") and not there.all():
            raise ConfigError(f"{step.operation} of {step.tags.start + int(there.argmin())}, which is not there")
        if step.operation == "delete":
            self._vector[step.tags.start : step.tags.stop] = -1
            self.count -= len(step.tags)
        elif step.operation != "search":
            self._vector[step.tags.start : step.tags.stop] = step.vectors
            self.count += len(step.tags) if step.operation == "insert" else 0

    def tags(self) -> npt.NDArray[np.int64]:
        """The tags that are there, rising."""
        return np.flatnonzero(self._vector >= 0)

    def vectors(self) -> npt.NDArray[np.int64]:
        """The row of the data set that each of them has."""
        return self._vector[self.tags()]


def read(file: Path, dataset: str | None = None) -> Runbook:
    """The runbook for `dataset` in a file; without a name, the only one there.

    Raises
    ------
    ConfigError
        The file is no runbook, or has none for that data set, or a step cannot be done; says which.
    """
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as a runbook ({error}): give a YAML file") from error
    if not isinstance(sections, Mapping) or not sections:
        raise ConfigError(f"{file} is no runbook: it has no section that is named for a data set")
    if dataset is None and len(sections) == 1:
        (dataset,) = sections
    if dataset not in sections:
        raise ConfigError(f"{file} has no runbook for {dataset!r}: it has {', '.join(map(str, sections))}")
    section = sections[dataset]
    if not isinstance(section, Mapping) or not _whole(section.get("max_pts")):
        raise ConfigError(f"{file}: {dataset!r} must have steps and max_pts, a whole number")
    steps: list[Step] = []
    while (number := len(steps) + 1) in section:
        steps.append(_step(f"{file}: {dataset!r}, step {number}", section[number]))
    if unknown := [key for key in section if key not in ("max_pts", "gt_url") and not _whole(key)]:
        raise ConfigError(f"{file}: {dataset!r} has the unknown field {unknown[0]!r}: take it out")
    if left := sorted(key for key in section if _whole(key) and not 1 <= key <= len(steps)):
        raise ConfigError(f"{file}: {dataset!r} has a step {left[0]} but no step {len(steps) + 1}: number them from 1")
    runbook = Runbook(str(dataset), section["max_pts"], tuple(steps))
    runbook.check()
    return runbook


def write(file: Path, runbook: Runbook) -> None:
    """Write a runbook as `read` reads it."""
    section: dict[Any, Any] = {"max_pts": runbook.max_points}
    section.update({number: step.to_yaml() for number, step in enumerate(runbook.steps, 1)})
    text = yaml.safe_dump({runbook.dataset: section}, sort_keys=False)
    file.write_text(text, encoding="utf-8")


def scaled(runbook: Runbook, rows: int) -> Runbook:
    """The same steps over `rows` vectors, every range shrunk alike; as it is where the data set has enough of them."""
    size = runbook.vectors
    if rows >= size:
        return runbook

    def shrunk(span: range) -> range:
        return range(span.start * rows // size, span.stop * rows // size)

    steps = []
    for step in runbook.steps:
        tags, vectors = shrunk(step.tags), shrunk(step.vectors)
        if step.operation == "replace":
            # Both ranges were as long as each other; rounded apart, the shorter counts.
            length = min(len(tags), len(vectors))
            tags = range(tags.start, tags.start + length)
            vectors = range(vectors.start, vectors.start + length)
        if step.operation == "search" or tags:
            steps.append(Step(step.operation, tags, vectors))
    return _measured(runbook.dataset, steps)


def sliding_window(dataset: str, size: int, *, steps: int = 40) -> Runbook:
    """Half of the vectors come in, then each step brings as many new ones as it takes old ones away."""
    block = size // steps
    half = steps // 2
    made = []
    for at in range(steps):
        made.append(_insert(at * block, (at + 1) * block))
        if at >= half:
            made.append(Step("delete", range((at - half) * block, (at - half + 1) * block)))
            made.append(Step("search"))
    return _measured(dataset, made)


def expiration(dataset: str, size: int, *, steps: int = 50, seed: int = 0) -> Runbook:
    """Each block expires: of 18, one never, three after 30 steps, the others after 12, as the challenge deals them out.

    Of a block that stays for long, a third is replaced half-way by vectors that were kept back for it.
    """
    chance = random.Random(seed)
    block = size // steps
    made: list[Step] = []
    ends: dict[int, list[range]] = {}
    changes: dict[int, list[Step]] = {}
    for at in range(steps):
        start, kept = at * block, at * block + block * 3 // 4
        draw = chance.randrange(18)
        life = steps if draw == 0 else 30 if draw <= 3 else 12
        first = range(start, kept if life > 12 else start + block)
        made.append(Step("insert", first, first))
        if life > 12:
            spare = range(kept, start + block)
            changed = Step("replace", range(start, start + len(spare)), spare)
            changes.setdefault(at + min(life, 30) // 2, []).append(changed)
        ends.setdefault(at + life, []).append(first)
        made += changes.get(at, [])
        made += [Step("delete", span) for span in ends.get(at, [])]
        made.append(Step("search"))
    return _measured(dataset, made)


def clustered(dataset: str, size: int, *, blocks: int = 16, rounds: int = 3, seed: int = 0) -> Runbook:
    """For vectors in the order of their clusters: each round brings a part of every cluster and takes some away again.

    What comes in at one time is alike, and whole neighbourhoods go: the hard case for an index that is extended.
    """
    chance = random.Random(seed)
    block = size // blocks
    part = block // rounds
    made: list[Step] = []
    for turn in range(rounds):
        order = list(range(blocks))
        chance.shuffle(order)
        for at in order:
            start = at * block + turn * part
            made.append(_insert(start, start + part))
            if order.index(at) % 4 == 3:
                made.append(Step("search"))
        for at in order[: blocks // 2]:
            start = at * block + turn * part
            gone = chance.randrange(part // 4, part // 2)
            made.append(Step("delete", range(start, start + gone)))
        made.append(Step("search"))
    return _measured(dataset, made)


def _insert(start: int, end: int) -> Step:
    return Step("insert", range(start, end), range(start, end))


def _measured(dataset: str, steps: Sequence[Step]) -> Runbook:
    made = Runbook(dataset, 0, tuple(steps))
    live, most = Live(made.vectors), 0
    for step in steps:
        live.take(step)
        most = max(most, live.count)
    return replace(made, max_points=most)


def _step(where: str, entry: Any) -> Step:
    if not isinstance(entry, Mapping) or entry.get("operation") not in _FIELDS:
        raise ConfigError(f"{where} must have an operation: {', '.join(_FIELDS)}")
    operation: str = entry["operation"]
    names = _FIELDS[operation]
    if wrong := sorted(map(str, {*entry} ^ {"operation", *names})):
        kind = "has the unknown field" if wrong[0] in entry else "lacks"
        raise ConfigError(f"{where} ({operation}) {kind} {wrong[0]!r}: it takes {', '.join(names) or 'nothing'}")
    if bad := [name for name in names if not _whole(entry[name]) or entry[name] < 0]:
        raise ConfigError(f"{where}: {bad[0]} is {entry[bad[0]]!r}: give a whole number, 0 or more")
    spans = [range(entry[low], entry[high]) for low, high in zip(names[::2], names[1::2], strict=True)]
    if empty := [span for span in spans if not span]:
        raise ConfigError(f"{where}: nothing lies from {empty[0].start} to {empty[0].stop}: the end must be higher")
    if operation == "replace" and len(spans[0]) != len(spans[1]):
        raise ConfigError(f"{where}: {len(spans[0])} tags cannot take {len(spans[1])} vectors: give as many")
    tags = spans[0] if spans else range(0)
    return Step(operation, tags, range(0) if operation == "delete" or not spans else spans[-1])


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def kept() -> Iterable[tuple[Path, Runbook]]:
    """The runbooks of this project and the files they are kept in."""
    yield FOLDER / "sliding_window.yaml", sliding_window("docstrings-100k", 100_000)
    yield FOLDER / "expiration.yaml", expiration("docstrings-100k", 100_000)
    yield FOLDER / "clustered.yaml", clustered("docstrings-100k-clustered", 100_000)


if __name__ == "__main__":
    for path, runbook in kept():
        write(path, runbook)
        print(f"{path}: {len(runbook.steps)} steps, at most {runbook.max_points} points", file=sys.stderr)
