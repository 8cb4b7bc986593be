"""What a search is asked with, and how the answers of several workers become one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster.state import CollectionSpec
from headrace.cluster.wire import rows_from_wire
from headrace.gpu.errors import RecordError
from headrace.gpu.store import StoredRow
from headrace.pipeline.results import Hit
from headrace.streams.vector_checks import kind_fault

__all__ = ["best", "texts_in", "vectors_in"]

Vectors = npt.NDArray[np.float32]

_LONGEST = float(np.sqrt(np.finfo(np.float32).max))


def texts_in(query: Any, spec: CollectionSpec) -> list[str] | None:
    """The texts that a query is made of; None if it is made of numbers.

    Raises
    ------
    RecordError
        There is no encoder for texts, or a text cannot be written in UTF-8.
    """
    if isinstance(query, str):
        texts = [query]
    elif isinstance(query, list | tuple) and query and all(isinstance(text, str) for text in query):
        texts = list(query)
    else:
        return None
    if spec.encoder is None:
        raise RecordError(f"collection {spec.name!r} has no encoder: search it with a vector of {spec.dim} numbers")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(f"the query is no text in UTF-8: {error.reason} at position {error.start}") from error
    return texts


def vectors_in(query: Any, spec: CollectionSpec) -> tuple[Vectors, bool]:
    """Query vectors, float32 (q, dim), normalised for cosine; and whether it was a single one.

    Raises
    ------
    RecordError
        They have another length, or numbers that are not finite in float32, or no direction where the metric is cosine.
    """
    try:
        given = np.asarray(query)
        why = kind_fault(query, given)  # NumPy would make numbers of it, and leave out imaginary parts
        given = given if why else given.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"the query is neither a text nor a vector nor a list of either: {error}") from error
    if why:
        raise RecordError(f"the query has {why} in it: search with real numbers")
    vectors = np.atleast_2d(given)
    if vectors.ndim != 2 or (len(vectors) and vectors.shape[1] != spec.dim):
        raise RecordError(
            f"the query has shape {np.shape(query)}, collection {spec.name!r} holds vectors of {spec.dim} numbers"
        )
    if not (np.abs(vectors) <= np.finfo(np.float32).max).all():  # nor NaN
        raise RecordError("the query has numbers that are not finite in float32: leave them out")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if spec.metric != "cosine":
        if not (norms < _LONGEST).all():
            raise RecordError(f"the query's norm is {norms.max():.3g} and its square overflows float32: scale it")
    else:
        if not (norms > 0).all():
            raise RecordError("the query is a zero vector, which has no direction to compare by cosine")
        vectors = vectors / norms
    return vectors.astype(np.float32), given.ndim == 1


def best(answers: Sequence[tuple[Sequence[Any], Sequence[float]]], limit: int, metric: str) -> list[Hit]:
    """Merge workers' answers to one query: of an id the newer version counts, then the score.

    Parameters
    ----------
    answers : sequence of (rows, scores)
        Rows as `headrace.cluster.wire.rows_to_wire` sends them.
    """
    newest: dict[str | int, tuple[StoredRow, float]] = {}
    for wire, scores in answers:
        for row, score in zip(rows_from_wire(wire), scores, strict=True):
            if row is not None and (row.id not in newest or newest[row.id][0].offset < row.offset):
                newest[row.id] = row, score
    sign = 1.0 if metric == "l2" else -1.0
    ranked = sorted(newest.values(), key=lambda pair: sign * pair[1])[:limit]
    return [Hit(row.id, score, row.attributes, row.topic_partition, row.offset) for row, score in ranked]
