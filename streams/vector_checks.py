"""Which vectors cannot be used, and why: one vectorised test for the batch, a second look only at the doubtful ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.streams.attributes import short

__all__ = ["length_fault", "list_fault", "vector_faults"]

Floats = npt.NDArray[np.float32]

# Squared norms outside these bounds are looked at again. Nothing that a model or a user makes on purpose lies there,
# and it includes NaN, infinity, zero, and almost every vector whose bytes are in the wrong order.
_LEAST, _MOST = 1e-30, 1e30


def vector_faults(vectors: Floats, metric: str, *, raw: bool = False) -> dict[int, str]:
    """Row and reason of each vector that cannot be used.

    Parameters
    ----------
    vectors : float32 (v, dim)
    metric : {"cosine", "ip", "l2"}
    raw : bool
        The numbers were read from bytes, so they may be big-endian ones.
    """
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
        doubtful = ~((squares > _LEAST) & (squares < _MOST))  # not the other way round: NaN compares false
        faults = {}
        for row in np.flatnonzero(doubtful).tolist():
            if why := _fault(vectors[row], float(squares[row]), metric, raw):
                faults[row] = why
    return faults


def length_fault(found: int, dim: int) -> str:
    """The reason for a binary value of `found` bytes, which is not ``4 * dim``."""
    hint = "is it float64?" if found == 8 * dim else "check the vector's dimension"
    return f"the value has {found} bytes, but {dim} float32 numbers take {4 * dim}: {hint}"


def list_fault(given: Any, dim: int) -> str:
    """The reason for a JSON `vector` that is no list of `dim` numbers."""
    if not isinstance(given, list):
        return f"the vector is {short(given)}: it must be a list of {dim} numbers"
    for position, number in enumerate(given):
        if type(number) not in (int, float):
            return f"the vector has {short(number)} at position {position}: it must be a list of {dim} numbers"
    if len(given) != dim:
        return f"the vector has {len(given)} numbers, but this collection's have {dim}"
    return "the vector has a number beyond float32: send finite numbers only"


def _fault(vector: Floats, square: float, metric: str, raw: bool) -> str:
    if raw and _looks_swapped(vector):
        return "the vector's bytes look big-endian: send little-endian float32"
    for test, what in ((np.isnan, "NaN"), (np.isinf, "an infinite number")):
        if (hits := np.flatnonzero(test(vector))).size:
            return f"the vector has {what} at position {hits[0]}: send finite numbers only"
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(square):
        return f"the vector's norm is {norm:.3g} and its square overflows float32: scale the vector"
    if metric == "cosine" and norm == 0:
        return "the vector has zero norm, so it has no direction for the metric cosine"
    if metric == "cosine" and square < np.finfo(np.float32).tiny:
        return f"the vector's norm is {norm:.3g} and its square underflows float32: scale the vector"
    return ""


def _looks_swapped(vector: Floats) -> bool:
    """True if the numbers make no sense, and do with their bytes reversed.

    All nonzero numbers must make sense reversed, and some must not as they are: one NaN in a good vector is a NaN.
    A swapped vector of fewer than 20 nonzero numbers may make sense both ways, and is taken as it is.
    """
    reversed_ = vector.byteswap()
    sense, reversed_sense = _makes_sense(vector[vector != 0]), _makes_sense(reversed_[reversed_ != 0])
    return bool(sense.size and sense.mean() < 0.9 and reversed_sense.all())


def _makes_sense(numbers: Floats) -> npt.NDArray[np.bool_]:
    sizes = np.abs(numbers)
    sense: npt.NDArray[np.bool_] = (sizes > 1e-12) & (sizes < 1e12)
    return sense
