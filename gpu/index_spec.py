"""What index a collection wants, and what that means for so many rows: pure data, the same for both backends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.gpu.errors import ConfigError

__all__ = ["DTYPES", "KINDS", "BuildParams", "IndexSpec", "build_params"]

KINDS = ("flat", "graph", "ivf_pq")
"""flat: exact. graph: HNSW on the host, CAGRA on RAPIDS. ivf_pq: compressed codes, re-ranked from the kept vectors."""

DTYPES = ("float32", "float16")
"""How an index keeps the vectors. float16 takes half the memory; scores are then those of the rounded vectors."""

_LIMITS = {
    "graph_degree": (2, 512),
    "graph_effort": (2, 4096),
    "lists": (1, 1 << 20),
    "pq_dim": (1, 1 << 16),
    "pq_bits": (4, 8),
}
_FEW_ROWS = 2048
_ROWS_PER_LIST = 39
_FEWEST_BITS = 256


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """The index of a collection's sealed segments. None: a default by size.

    Attributes
    ----------
    kind : one of `KINDS`
    dtype : one of `DTYPES`
    recall_target : float
        Recall at 10 that a search must reach, from above 0 to 1; sets the effort, from the calibration done when an
        index is built.
    graph_degree : int, optional
        graph: links per row.
    graph_effort : int, optional
        graph: candidates looked at for a row's links (efConstruction, intermediate_graph_degree).
    lists : int, optional
        ivf_pq: cells of the coarse quantiser.
    pq_dim : int, optional
        ivf_pq: parts that a vector is cut into; must divide its dimension.
    pq_bits : int, optional
        ivf_pq: bits of each part's code, 4 to 8. `pq_dim` times `pq_bits` must be whole bytes. On the host 4 is by far
        the fastest.

    Raises
    ------
    ConfigError
        A value that cannot be.
    """

    kind: str = "graph"
    dtype: str = "float32"
    recall_target: float = 0.95
    graph_degree: int | None = None
    graph_effort: int | None = None
    lists: int | None = None
    pq_dim: int | None = None
    pq_bits: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown index kind {self.kind!r}: use one of {', '.join(KINDS)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r} for an index: use one of {', '.join(DTYPES)}")
        target = self.recall_target
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target <= 1:
            raise ConfigError(f"recall_target is {target!r}: give a number above 0 and at most 1, such as 0.95")
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not low <= value <= high):
                raise ConfigError(f"{name} is {value!r}: give a whole number from {low} to {high}, or None")

    def to_wire(self) -> dict[str, Any]:
        """The fields as plain types, for msgpack or JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> IndexSpec:
        """The reverse of `to_wire`; fields left out take their defaults.

        Raises
        ------
        ConfigError
            A field that no index has, or a value that cannot be.
        """
        if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(cls)}):
            raise ConfigError(f"an index has no setting {unknown[0]!r}: take it out, or use a newer Headrace")
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class BuildParams:
    """What to build over so many rows: an `IndexSpec` with nothing left open. What a kind does not use it ignores.

    Attributes
    ----------
    kind, dtype : str
    graph_degree, graph_effort : int
    lists : int
        0: too few rows to train a quantiser; they are scored exactly.
    pq_dim, pq_bits : int
    """

    kind: str
    dtype: str
    graph_degree: int
    graph_effort: int
    lists: int
    pq_dim: int
    pq_bits: int


def build_params(spec: IndexSpec, rows: int, dim: int) -> BuildParams:
    """Settle what `spec` leaves open, for an index over `rows` vectors of `dim` numbers.

    Pure. Any `rows` will do, so that a collection's settings can be checked before it has rows.

    Raises
    ------
    ConfigError
        `pq_dim` and `pq_bits` do not fit `dim`.
    """
    pq_dim, pq_bits = _code(spec, dim) if spec.kind == "ivf_pq" else (0, 0)
    return BuildParams(
        kind=spec.kind,
        dtype=spec.dtype,
        graph_degree=spec.graph_degree or 32,
        graph_effort=spec.graph_effort or 100,
        lists=_lists(spec, rows) if spec.kind == "ivf_pq" else 0,
        pq_dim=pq_dim,
        pq_bits=pq_bits,
    )


def _lists(spec: IndexSpec, rows: int) -> int:
    if rows < _FEW_ROWS:
        return 0
    return min(spec.lists or 2 * math.isqrt(rows), rows // _ROWS_PER_LIST)


def _code(spec: IndexSpec, dim: int) -> tuple[int, int]:
    """Parts and bits of a code: as asked for, or by size: two bits a number, four where that makes a short code."""
    fits = [
        (parts, bits)
        for bits in ([4, 8] if spec.pq_bits is None else [spec.pq_bits])
        for parts in range(1, dim + 1)
        if dim % parts == 0 and parts * bits % 8 == 0 and spec.pq_dim in (None, parts)
    ]
    if not fits:
        raise ConfigError(
            f"pq_dim {spec.pq_dim} and pq_bits {spec.pq_bits} do not fit vectors of {dim} numbers: pq_dim must divide "
            f"{dim}, and pq_dim x pq_bits be a multiple of 8; leave both out if in doubt"
        )
    fewest = min(bits for _, bits in fits)
    aim = min(4 * dim, max(2 * dim, _FEWEST_BITS))
    return min((code for code in fits if code[1] == fewest), key=lambda code: abs(math.log(code[0] * code[1] / aim)))
