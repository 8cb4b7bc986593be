"""What may be asked of a new collection."""

from __future__ import annotations

import re
from collections.abc import Mapping

from headrace.cluster.state import CollectionSpec
from headrace.gpu.backend import METRICS
from headrace.gpu.errors import ConfigError
from headrace.pipeline import config
from headrace.pipeline.encoders import describe
from headrace.streams.attributes import short

__all__ = ["check_new", "make_spec"]

MOST_CELLS, MOST_REPLICAS = 65_536, 16
"""As in ``headrace-schema.yaml``."""

MOST_LETTERS = 249
"""Of a name: it is the topic's and the snapshots' folder's, too, unless others are given."""

_NAME = re.compile(r"[A-Za-z0-9._-]*[A-Za-z0-9][A-Za-z0-9._-]*")


def make_spec(
    name: str,
    dim: int | None,
    metric: str,
    encoder: str | None,
    cells: int | None,
    replicas: int | None,
    ids: str,
    attributes: Mapping[str, str] | None,
) -> CollectionSpec:
    """Check a new collection's arguments; raises `ConfigError` or `EncoderError`."""
    stamp = None
    if encoder is not None:
        info = describe(encoder)
        stamp = info.stamp
        if dim not in (None, info.dim):
            raise ConfigError(
                f"dim={dim} does not fit encoder {encoder!r}, whose vectors have {info.dim} numbers: leave dim out"
            )
        dim = info.dim
    cells = config.get("cells") if cells is None else cells
    replicas = config.get("replicas") if replicas is None else replicas
    check_new(name, replicas)
    for what, number in (("dim", dim), ("cells", cells), ("replicas", replicas)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise ConfigError(f"{what}={number!r} cannot be: give a whole number")
    if dim is None or not 1 <= dim <= 65_536:
        raise ConfigError(f"dim={dim} cannot be: give the vectors' length (1 to 65536), or an encoder")
    if metric not in METRICS:
        raise ConfigError(f"metric {metric!r} is not known: use one of {', '.join(METRICS)}")
    if ids not in ("string", "integer"):
        raise ConfigError(f"ids={ids!r} is not known: use 'string' or 'integer'")
    if not 1 <= cells <= MOST_CELLS or not 1 <= replicas <= MOST_REPLICAS:
        raise ConfigError(
            f"cells={cells}, replicas={replicas} cannot be: give 1 to {MOST_CELLS} cells and 1 to {MOST_REPLICAS} "
            "replicas"
        )
    if not isinstance(attributes, Mapping | None):
        raise ConfigError(f"attributes={attributes!r} cannot be: give a dict of names to kinds")
    for column, kind in (attributes or {}).items():
        _check_column(column, kind)
        if kind not in ("int", "float", "bool", "str"):
            raise ConfigError(f"attribute {column!r} cannot be a {kind!r}: use 'int', 'float', 'bool' or 'str'")
    return CollectionSpec(name, dim, metric, stamp, cells, replicas, ids)


def _check_column(name: object, kind: object) -> None:
    """Refuse a column that no record could fill."""
    try:
        usable = isinstance(name, str) and bool(name) and bool(name.encode())
    except UnicodeEncodeError:  # a lone surrogate
        usable = False
    if not usable:
        raise ConfigError(f"an attribute cannot be named {short(name)}: give a text in UTF-8")
    if name in ("id", "vector"):
        raise ConfigError(f"an attribute cannot be named {name!r}: every record has one, which is no attribute")
    if name == "text" and kind != "str":
        raise ConfigError(f"attribute 'text' cannot be a {kind!r}: it holds records' texts, so use 'str'")


def check_new(name: str, replicas: int | None) -> None:
    """Raise `ConfigError` if no collection can have this name, or so many copies."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"collection name {short(name)} cannot be: use letters, digits, '.', '-' and '_'")
    if len(name) > MOST_LETTERS:
        raise ConfigError(
            f"a collection name of {len(name)} letters cannot be: give at most {MOST_LETTERS}, as Kafka's topics have"
        )
    if replicas is not None and (not isinstance(replicas, int) or isinstance(replicas, bool)):
        raise ConfigError(f"replicas={replicas!r} cannot be: give a whole number")
    if replicas is not None and not 1 <= replicas <= MOST_REPLICAS:
        raise ConfigError(f"replicas={replicas} cannot be: give 1 to {MOST_REPLICAS}")
