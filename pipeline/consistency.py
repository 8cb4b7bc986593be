"""The levels of consistency that a read may ask for. Pure, but for the configuration's default."""

from __future__ import annotations

from headrace.gpu.errors import ConfigError
from headrace.pipeline import config
from headrace.pipeline.results import Bounded, Consistency

__all__ = ["consistency_of"]


def consistency_of(given: Consistency) -> tuple[str, float]:
    """The level and, for "bounded", the staleness in seconds.

    Raises
    ------
    ConfigError
        There is no such level.
    """
    if isinstance(given, Bounded):
        return "bounded", given.staleness / 1e3
    if given == "bounded":
        return "bounded", float(config.get("search.bounded-staleness"))
    if given in ("strong", "session", "eventual"):
        return given, 0.0
    raise ConfigError(
        f"consistency {given!r} is not known: use 'strong', 'session', 'bounded', 'eventual' or headrace.bounded(500)"
    )
