"""The options of Headrace, kept where Dask keeps its own.

``headrace.yaml`` holds every option with its default and the reason for it, ``headrace-schema.yaml`` what it may be.
To add an option, write it into both: nothing here names one. Importing this module hands the defaults to `dask.config`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

from headrace.gpu.errors import ConfigError

__all__ = ["apply_dask_defaults", "cache_dir", "check", "get", "options"]

_HERE = Path(__file__).parent
_SCHEMA: Mapping[str, Any] = yaml.safe_load((_HERE / "headrace-schema.yaml").read_text(encoding="utf-8"))
_ROOT: Mapping[str, Any] = _SCHEMA["properties"]["headrace"]
_DEFAULTS: Mapping[str, Any] = yaml.safe_load((_HERE / "headrace.yaml").read_text(encoding="utf-8"))
dask.config.update_defaults(_DEFAULTS)

_SECRET = ("kafka.", "snapshots.options.")
"""Passwords may be among these: what they are is not shown."""

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (Mapping,),
    "null": (type(None),),
}
_UNITS: Mapping[str, tuple[Any, str]] = {
    "duration": (lambda text: parse_timedelta(text, default="seconds"), "seconds or a text such as '250ms'"),
    "bytes": (parse_bytes, "bytes or a text such as '64 MiB'"),
}

DASK_DEFAULTS: Mapping[str, Any] = {
    # Dask's 30 s would hold a caller for as long when a worker is dead. The bare 250 ms that suits the reads is too
    # little for everybody: Client takes this as the time for its whole handshake, and a connection that is being made
    # while its own process is stalled (a model loads, a machine is busy) fails although nobody is dead. Reads do not
    # wait for it: they go to another copy after a few milliseconds.
    "distributed.comm.timeouts.connect": "1s",
    # Past it a silent worker is restarted and what it holds is copied again, so it must outlast a pause that catching
    # up can mend. A copy that does not answer stops being read and written long before (ingest.apply-deadline).
    "distributed.scheduler.worker-ttl": "30s",
    # Rows live on a worker, not in its tasks: what was sent to a worker is meant for that one.
    "distributed.scheduler.work-stealing": False,
    # Whoever dies is started again by its nanny, however long that takes. Dask would close the nanny of a worker that
    # is not there 15 s after it died: it was killed again meanwhile, or is slow to start on a busy machine.
    "distributed.deploy.lost-worker-timeout": "365d",
    # A task is not to blame for the workers that are killed under it.
    "distributed.scheduler.allowed-failures": 10,
    "distributed.scheduler.no-workers-timeout": "5s",
    # The index is not Dask's to spill: it lies outside the data that these watch.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    # Dask has its workers give memory back after every 64 KiB that are freed. Then a message's buffer, or an array of
    # some hundred rows, is asked from the kernel anew each time and filled with zeros by it: 30 us a message instead of
    # 1.5, 420 us for 200 rows of 384 numbers instead of 30. These are still given back, in larger pieces.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 16 << 20,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 4 << 20,
    # The sampling profiler takes the GIL every 10 ms on the workers that answer queries.
    "distributed.worker.profile.enabled": False,
}


def options() -> dict[str, Any]:
    """Every option by its dotted name (without ``headrace.``) and the rule of the schema that it must keep."""
    return dict(_options(_ROOT, ""))


def get(key: str) -> Any:
    """An option's value, checked, in the unit the program counts in.

    Parameters
    ----------
    key : str
        Dotted name without ``headrace.``, such as ``"ingest.max-batch"``.

    Returns
    -------
    value
        As the schema says; a duration as float seconds, a size as int bytes, free-form settings (``kafka``) as a flat
        dict from dotted names to values.

    Raises
    ------
    ConfigError
        There is no such option, or its value cannot be; names the option, the value and what it may be.
    """
    rules = options()
    if key not in rules:
        raise ConfigError(_unknown(key, rules))
    value = _section(f"headrace.{key}")
    _check_value(key, value, rules[key])
    unit = rules[key].get("format")
    if unit and value is not None:
        return _UNITS[unit][0](value)
    return dict(_flat(value)) if rules[key].get("type") == "object" else value


def check() -> None:
    """Check the whole ``headrace`` section, so that a misspelt option is an error and not a default.

    Raises
    ------
    ConfigError
        At the first option that is unknown (with the nearest known one) or has a value that cannot be.
    """
    _check_section("", _section("headrace"), _ROOT)


def _section(name: str) -> Any:
    """An option, or all below it.

    Where this module was first imported inside a ``with dask.config.set(...)``, Dask takes the defaults away at its
    end, because they were not there at its beginning.
    """
    try:
        return dask.config.get(name)
    except KeyError:
        dask.config.update(dask.config.config, _DEFAULTS, priority="old")
        return dask.config.get(name)


def kafka_settings() -> dict[str, str]:
    """The option ``headrace.kafka`` as librdkafka wants it: for every client that reads or writes a topic."""
    return {name: str(value) for name, value in get("kafka").items()}


def snapshot_options() -> dict[str, Any]:
    """The option ``headrace.snapshots.options`` as fsspec wants it: sections within it stay sections."""
    get("snapshots.options")
    return dict(_section("headrace.snapshots.options"))


def cache_dir() -> Path:
    """Where models are built once: the option ``cache-dir``, or ``headrace`` in ``$XDG_CACHE_HOME`` or ~/.cache."""
    chosen = get("cache-dir")
    if chosen is not None:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace"


def apply_dask_defaults() -> None:
    """Give Dask the settings that a Headrace cluster wants; whatever the user has set himself stays.

    For whoever starts a cluster, before it starts: it changes defaults of the whole process. Calling it again changes
    nothing.
    """
    import distributed  # noqa: F401  # its own defaults must be in place, to be told apart from the user's settings

    # `update_defaults` keeps what differs from the old default; a user may also have written that very default down.
    theirs, unset = dask.config.collect(), object()
    wanted: dict[str, Any] = {}
    dask.config.set(
        {key: value for key, value in DASK_DEFAULTS.items() if dask.config.get(key, unset, config=theirs) is unset},
        config=wanted,
    )
    dask.config.update_defaults(wanted)


def _options(rule: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, inner in rule["properties"].items():
        if "properties" in inner:
            yield from _options(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _check_section(prefix: str, section: Any, rule: Mapping[str, Any]) -> None:
    if not isinstance(section, Mapping):
        name = f"headrace.{prefix}".rstrip(".")
        raise ConfigError(f"{name} is {section!r}: it is a section, write its options below it")
    for name, value in section.items():
        # Environment variables cannot hold a hyphen, so Dask takes both spellings for the same option.
        inner = rule["properties"].get(str(name).replace("_", "-"))
        if inner is None:
            raise ConfigError(_unknown(f"{prefix}{name}", options()))
        if "properties" in inner:
            _check_section(f"{prefix}{name}.", value, inner)
        else:
            _check_value(f"{prefix}{name}", value, inner)


def _check_value(key: str, value: Any, rule: Mapping[str, Any]) -> None:
    if wanted := _fault(value, rule):
        variable = "DASK_HEADRACE__" + key.upper().replace(".", "__").replace("-", "_")
        shown = "what it may not be" if key.startswith(_SECRET) else repr(value)
        raise ConfigError(
            f"headrace.{key} is {shown} but must be {wanted}: change it in the configuration, or set {variable}"
        )
    if rule.get("type") == "object":
        for name, inner in _flat(value):
            _check_value(f"{key}.{name}", inner, rule["additionalProperties"])


def _fault(value: Any, rule: Mapping[str, Any]) -> str:
    """What `value` should have been, in words; empty where it is right."""
    if "enum" in rule:
        return "" if value in rule["enum"] else "one of " + ", ".join(map(str, rule["enum"]))
    kinds = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    convert, words = _UNITS.get(rule.get("format", ""), (None, " or ".join(kinds)))
    limits = {
        "at least": rule.get("minimum"),
        "more than": rule.get("exclusiveMinimum"),
        "at most": rule.get("maximum"),
    }
    words += "".join(f", {word} {limit}" for word, limit in limits.items() if limit is not None)
    # In Python True is an int; in a configuration it is a mistake.
    if isinstance(value, bool) and "boolean" not in kinds:
        return words
    if not any(isinstance(value, _TYPES[kind]) for kind in kinds):
        return words
    if convert is not None and value is not None:
        try:
            value = convert(value)
        except (ValueError, KeyError):
            return words
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, above, high = limits.values()
        # Written so that nan, which compares with nothing, is refused.
        if not ((low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)):
            return words
    return ""


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """librdkafka's names are dotted, and Dask makes sections of dots: ``{"a": {"b": 1}}`` is ``a.b = 1``."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    spelt = key.replace("_", "-")
    near = difflib.get_close_matches(spelt, known, n=1, cutoff=0.5)
    hint = f"did you mean headrace.{near[0]}?" if near else "the options are " + ", ".join(sorted(known))
    return f"headrace has no option {spelt!r}: {hint}"
