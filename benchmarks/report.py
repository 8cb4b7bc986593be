"""The one shape of every benchmark's report, so that two of them can be laid side by side.

A report is what JSON can hold: `name`, `seed`, `machine`, `versions`, `results` and `criteria`. It says what kind of
machine it was made on and never which one, so that it can be published as it is.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import operator
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from headrace.gpu.errors import ConfigError

__all__ = ["Criterion", "Report", "criterion", "machine", "quantiles", "show", "spread", "validate", "versions"]

LIBRARIES = (
    "headrace", "dask", "distributed", "streamz", "confluent-kafka", "faiss", "numpy", "pandas", "onnxruntime",
)  # fmt: skip
_DISTRIBUTIONS = {"faiss": "faiss-cpu"}
_MACHINE = ("cpu", "cores", "memory_gib", "gpu")
_SHAPE: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"name": (str,), "seed": (int,), "machine": (dict,), "versions": (dict,), "results": (dict,), "criteria": (list,)}
)
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}
)
_AIM = re.compile(r"(<=|>=|==|<|>) (-?\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Criterion:
    """One figure held against its aim.

    Attributes
    ----------
    name : str
    figure : float or None
        None: it could not be measured, and the aim is not held.
    unit : str
    aim : str
        A comparison with a number, such as ``"< 50"``.
    held : bool
    """

    name: str
    figure: float | None
    unit: str
    aim: str
    held: bool


@dataclass(frozen=True)
class Report:
    """What one run of one benchmark found; `results` may nest mappings of numbers, texts and None as it likes."""

    name: str
    seed: int
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    results: Mapping[str, Any]
    criteria: tuple[Criterion, ...]

    @classmethod
    def of(cls, name: str, seed: int, results: Mapping[str, Any], criteria: Iterable[Criterion]) -> Report:
        """A report about this machine and what is installed on it."""
        return cls(name, seed, machine(), versions(), results, tuple(criteria))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read a report back; ConfigError if it is none."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"this is no report but broken JSON ({error}): write it again") from error
        validate(data)
        return cls(**{**data, "criteria": tuple(Criterion(**one) for one in data["criteria"])})

    @property
    def held(self) -> bool:
        """True if every criterion is held."""
        return all(one.held for one in self.criteria)

    def to_json(self) -> str:
        """The report as JSON text, validated."""
        data = {**asdict(self), "criteria": [asdict(one) for one in self.criteria]}
        validate(data)
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def write(self, file: str | os.PathLike[str]) -> None:
        """Write the report to `file`, replacing it."""
        Path(file).write_text(self.to_json(), encoding="utf-8")


def criterion(name: str, figure: float | None, unit: str, aim: str) -> Criterion:
    """Hold `figure` against `aim`; one that is None or not finite holds nothing."""
    known = figure if figure is not None and math.isfinite(figure) else None
    return Criterion(name, known, unit, aim, _held(known, aim))


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95, p99 and max of `values`, each None where there are no values; ``count`` says how many there were."""
    # An observed value and not one between two: a p99 that nobody waited for would flatter or frighten.
    ordered = sorted(values)
    found: dict[str, float | None] = {
        f"p{share}": ordered[math.ceil(len(ordered) * share / 100) - 1] if ordered else None for share in (50, 95, 99)
    }
    return {**found, "max": ordered[-1] if ordered else None, "count": float(len(ordered))}


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """``{"median", "min", "max"}`` of repeated measurements; None if one of them is missing."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    if not numbers or len(numbers) < len(known):
        return {"median": None, "min": None, "max": None}
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def machine() -> dict[str, Any]:
    """What kind of machine this is: ``cpu``, ``cores`` this process may use, ``memory_gib``, ``gpu`` or None."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu(),
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu(),
    }


def versions() -> dict[str, str | None]:
    """Python's version and those of the libraries that a figure depends on; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def validate(data: Any) -> None:
    """Check that `data`, as read from JSON, is a report.

    Raises
    ------
    ConfigError
        Names the first field that is missing, too much, or not what it should be.
    """
    _fields("report", data, tuple(_SHAPE))
    for name, kinds in _SHAPE.items():
        if not isinstance(data[name], kinds) or isinstance(data[name], bool):
            raise ConfigError(f"{name} of a report is {data[name]!r} but must be {kinds[0].__name__}: correct it")
    # Nothing else about the machine may get in: what names it must not be published.
    _fields("machine", data["machine"], _MACHINE)
    _fields("versions", data["versions"], ("python", *LIBRARIES))
    for at, one in enumerate(data["criteria"]):
        _fields(f"criterion {at}", one, ("name", "figure", "unit", "aim", "held"))
        if one["figure"] is not None and (
            isinstance(one["figure"], bool) or not isinstance(one["figure"], int | float)
        ):
            raise ConfigError(f"figure of criterion {one['name']!r} is {one['figure']!r}: give a number or null")
        if one["held"] is not _held(one["figure"], one["aim"]):
            raise ConfigError(
                f"criterion {one['name']!r} says held={one['held']!r} of {one['figure']} {one['aim']}: correct it"
            )
    _check_results("results", data["results"])


def show(report: Report, console: Console) -> None:
    """Print the results, a table for each section of them, and then the criteria."""
    on = report.machine
    console.print(
        f"[bold]{report.name}[/bold]  seed {report.seed}; {on['cpu']}, {on['cores']} cores, {on['memory_gib']} GiB, "
        f"GPU: {on['gpu'] or 'none'}"
    )
    for title, section in report.results.items():
        console.print(_section(title, section if isinstance(section, Mapping) else {title: section}))
    table = Table(title="criteria", title_justify="left")
    for column in ("", "name", "figure", "unit", "aim"):
        table.add_column(column, justify="right" if column == "figure" else "left")
    for one in report.criteria:
        mark = "[green]held[/green]" if one.held else "[red]missed[/red]"
        table.add_row(mark, one.name, _cell(one.figure), one.unit, one.aim)
    console.print(table)


def _held(figure: float | None, aim: Any) -> bool:
    found = _AIM.fullmatch(aim) if isinstance(aim, str) else None
    if found is None:
        raise ConfigError(f"aim {aim!r} is no comparison with a number: write it like '< 50'")
    if figure is None:
        return False
    return _COMPARISONS[found[1]](figure, float(found[2]))


def _fields(what: str, data: Any, wanted: Sequence[str]) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{what} is {type(data).__name__}: write an object with the fields {', '.join(wanted)}")
    if wrong := sorted(map(str, set(wanted) ^ set(data))):
        kind = "lacks" if wrong[0] in wanted else "has an unknown field"
        raise ConfigError(f"{what} {kind} {wrong[0]!r}: its fields are {', '.join(wanted)}")


def _check_results(place: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{place} has the field {name!r}: names are str")
            _check_results(f"{place}.{name}", inner)
    elif isinstance(value, list | tuple):
        for at, inner in enumerate(value):
            _check_results(f"{place}[{at}]", inner)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{place} is {value}, which JSON cannot hold: give None where nothing was measured")
    elif value is not None and not isinstance(value, str | int):
        raise ConfigError(f"{place} is {type(value).__name__} {value!r}: give a number, a text, None or a mapping")


def _section(title: str, section: Mapping[str, Any]) -> Table:
    """Rows of numbers become a table with a column for each of their names; anything else, name and value."""
    rows = {name: row for name, row in section.items() if isinstance(row, Mapping) and "median" not in row}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row)) or ["value"]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in section.items():
        table.add_row(name, *([_cell(row.get(column, "")) for column in columns] if name in rows else [_cell(row)]))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        median, least, most = (_cell(value.get(name)) for name in ("median", "min", "max"))
        return median if least == most else f"{median} ({least}..{most})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
    return "-" if value is None else str(value)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(line.strip() for line in answer.splitlines() if line.strip()) or None
