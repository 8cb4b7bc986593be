"""Which vectors cannot be used, and why: one vectorised test for the batch, a second look only at the doubtful ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.streams.attributes import short

__all__ = ["kind_fault", "length_fault", "list_fault", "vector_faults"]

Floats = npt.NDArray[np.float32]

# Squared norms outside these bounds are looked at again. Nothing that a model or a user makes on purpose lies there,
# and it includes NaN, infinity, zero, and almost every vector whose bytes are in the wrong order.
_LEAST, _MOST = 1e-30, 1e30

_NO_NUMBERS = {
    "b": "True or False", "c": "complex numbers", "m": "durations", "M": "dates", "S": "bytes", "U": "texts",
}  # fmt: skip


def vector_faults(vectors: Floats, metric: str, *, raw: bool = False, largest: float = float("inf")) -> dict[int, str]:
    """Row and reason of each vector that cannot be used.

    Parameters
    ----------
    vectors : float32 (v, dim)
    metric : {"cosine", "ip", "l2"}
    raw : bool
        The numbers were read from bytes, so they may be big-endian ones.
    largest : float
        No number may be larger; not looked at for cosine, where vectors are divided by their lengths.
    """
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
        doubtful = ~((squares > _LEAST) & (squares < _MOST))  # not the other way round: NaN compares false
        faults = {}
        for row in np.flatnonzero(doubtful).tolist():
            if why := _fault(vectors[row], float(squares[row]), metric, raw):
                faults[row] = why
        if metric != "cosine" and np.isfinite(largest):
            for row in np.flatnonzero(np.abs(vectors).max(axis=1, initial=0) > largest).tolist():
                worst = float(np.abs(vectors[row]).max())
                faults.setdefault(
                    row, f"the vector has the number {worst:g}, too large for float16: make the collection with float32"
                )
    return faults


def kind_fault(given: Any, array: npt.NDArray[Any] | None = None) -> str:
    """What is in the place of numbers in a vector, or several, that a program hands in; empty if nothing is.

    NumPy would make numbers of these without a word; in a record they are refused, too (`list_fault`).

    Parameters
    ----------
    given : array_like
    array : array, optional
        What `numpy.asarray` makes of it, where that is known.
    """
    if isinstance(given, list | tuple):
        types = set(map(type, given))
        if types <= {int, float}:
            return ""
        if {bool, np.bool_} & types:
            return _NO_NUMBERS["b"]
    array = np.asarray(given) if array is None else array
    if array.dtype.kind == "O":
        kinds = {np.asarray(element).dtype.kind for element in array.flat}
        return next((_NO_NUMBERS[kind] for kind in sorted(kinds) if kind in _NO_NUMBERS), "")
    return _NO_NUMBERS.get(array.dtype.kind, "")


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
        odd = vector[(vector != 0) & ~_makes_sense(vector)][0]
        return (
            f"the vector's bytes look big-endian, for {odd:.3g} makes sense only if they are reversed: "
            "send little-endian float32"
        )
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
