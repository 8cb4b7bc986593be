"""Rows to search, and the judge of an answer."""

from __future__ import annotations

from typing import Any

import numpy as np

METRICS = ["cosine", "ip", "l2"]


def on_host(array: Any) -> np.ndarray:
    return array.get() if hasattr(array, "get") else np.asarray(array)


def random_rows(n: int, dim: int, metric: str = "ip", seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows


def true_scores(vectors: np.ndarray, queries: np.ndarray, metric: str) -> np.ndarray:
    """Float64 (q, n), higher is better."""
    wide, asked = vectors.astype(np.float64), queries.astype(np.float64)
    if metric == "l2":
        return -((asked[:, None, :] - wide[None, :, :]) ** 2).sum(axis=2)
    return asked @ wide.T


def check_search(answer, vectors, allowed, queries, k, metric, *, exact=True) -> float:
    """Check an answer against a plain sort of all scores; returns the recall."""
    scores, rows = map(on_host, answer)
    assert scores.shape == rows.shape == (len(queries), k)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    truth = np.where(allowed[None, :], true_scores(vectors, queries, metric), -np.inf)
    found = min(k, int(allowed.sum()))
    assert (rows[:, found:] == -1).all()
    assert (scores[:, found:] == (np.inf if metric == "l2" else -np.inf)).all()
    rows, values = rows[:, :found], scores[:, :found] * (-1 if metric == "l2" else 1)
    assert allowed[rows].all(), "a row that is not allowed came back"
    assert all(len(set(line)) == found for line in rows.tolist()), "a row came back twice"
    scale = 1e-4 * max(1.0, float(np.abs(truth[np.isfinite(truth)]).max(initial=0)))
    np.testing.assert_allclose(values, np.take_along_axis(truth, rows, axis=1), rtol=1e-4, atol=scale)
    assert (np.diff(values, axis=1) <= 0).all(), "not best first"
    best = -np.sort(-truth, axis=1)[:, :found]
    if exact:
        np.testing.assert_allclose(values, best, rtol=1e-4, atol=scale)
    return float((values >= best[:, -1:] - scale).mean()) if found and len(queries) else 1.0


def clustered(n: int, dim: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows around 30 middles, as cells hold them, and queries near some of them."""
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(30, dim))[rng.integers(0, 30, n)] + 0.4 * rng.normal(size=(n, dim))).astype(np.float32)
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, (rows[::97] + rng.normal(size=rows[::97].shape) * 0.01).astype(np.float32)
