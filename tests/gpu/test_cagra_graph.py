"""A graph as CAGRA builds it, made here with NumPy, and served by FAISS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.gpu import archive
from headrace.gpu.errors import BackendError
from headrace.gpu.host import cagra_graph, exact, graph

METRICS = ["cosine", "ip", "l2"]
DEGREE, DIM = 24, 32


def clustered(n: int, dim: int, metric: str, seed: int = 0, clusters: int = 200) -> np.ndarray:
    """Rows around so many middles that a row's nearest neighbours are all of its own cluster."""
    middles = np.random.default_rng(99).normal(size=(clusters, dim))
    rng = np.random.default_rng(seed)
    rows = (middles[rng.integers(0, clusters, n)] + 0.4 * rng.normal(size=(n, dim))).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows


def cagra_links(vectors: np.ndarray, metric: str, degree: int) -> np.ndarray:
    """CAGRA's graph by the rules of its paper (Ootomo et al. 2023, arXiv:2308.15136, section III).

    Of each row's nearest neighbours those with the fewest shorter ways round over another neighbour are kept; then half
    of the links are the strongest of these, the other half reverse ones, the strongest first.
    """
    n = len(vectors)
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    _, near = faiss.knn(vectors, vectors, degree + 1, metric=kind)
    near = np.take_along_axis(near, np.argsort(near == np.arange(n)[:, None], axis=1, kind="stable"), axis=1)[
        :, :degree
    ]
    detours = np.zeros((n, degree), dtype=np.int32)
    for between in range(degree - 1):
        beyond = near[near[:, between]]
        for target in range(between + 1, degree):
            detours[:, target] += (beyond[:, :target] == near[:, target : target + 1]).any(axis=1)
    strongest = np.take_along_axis(near, np.argsort(detours, axis=1, kind="stable"), axis=1)
    back: list[list[int]] = [[] for _ in range(n)]
    for column in strongest.T.tolist():
        for row, target in enumerate(column):
            if len(back[target]) < degree:
                back[target].append(row)
    links = np.empty((n, degree), dtype=np.uint32)
    for row, (own, reverse) in enumerate(zip(strongest.tolist(), back, strict=True)):
        half = own[: degree // 2]
        links[row] = list(dict.fromkeys(half + reverse[: degree // 2] + own + reverse))[:degree]
    return links


def recall(
    index: Any, vectors: np.ndarray, queries: np.ndarray, metric: str, effort: int, allowed: Any = None
) -> float:
    _, rows = graph.search(index, allowed, queries, 10, effort=effort)
    _, truth = exact.search(vectors, allowed, queries, 10, metric)
    return float(np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows.tolist(), truth.tolist(), strict=True)]))


@pytest.fixture(scope="module", params=METRICS)
def built(request: pytest.FixtureRequest) -> tuple[str, np.ndarray, np.ndarray]:
    vectors = clustered(20_000, DIM, request.param)
    return request.param, vectors, cagra_links(vectors, request.param, DEGREE)


def test_a_graph_from_a_device_is_found_on_the_host(built: tuple[str, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    metric, vectors, links = built
    archive.write(tmp_path / "graph", "graph", metric, vectors, links=links)
    index = graph.load(tmp_path / "graph")
    queries = clustered(200, DIM, metric, seed=1)
    assert recall(index, vectors, queries, metric, 128) >= 0.95
    efforts = graph.efforts(index, 10)
    assert recall(index, vectors, queries, metric, efforts[-1]) >= 0.99
    some = np.random.default_rng(0).random(len(vectors)) < 0.4
    assert recall(index, vectors, queries, metric, 128, some) >= 0.95
    rows = np.array([5, 19_999, 0])
    np.testing.assert_array_equal(graph.vectors(index, rows), vectors[rows])
    assert graph.nbytes(index)["vectors"] == vectors.nbytes
    # From here on it is a graph of the host's.
    graph.save(index, tmp_path / "again")
    again = graph.load(tmp_path / "again")
    answers = [graph.search(each, None, queries, 10, effort=64) for each in (index, again)]
    np.testing.assert_array_equal(answers[0][1], answers[1][1])


def test_the_lowest_level_is_the_given_graph(built: tuple[str, np.ndarray, np.ndarray]) -> None:
    metric, vectors, links = built
    index = cagra_graph.over(vectors, links, metric)
    hnsw = index.hnsw.hnsw
    table = faiss.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size())
    starts = faiss.vector_to_array(hnsw.offsets)[:-1].astype(np.int64)
    lowest = table[starts[:, None] + np.arange(DEGREE)]
    bridges = faiss.vector_to_array(hnsw.levels) > 1
    np.testing.assert_array_equal(lowest[~bridges], links[~bridges])
    np.testing.assert_array_equal(lowest[bridges][:, : DEGREE // 2], links[bridges][:, : DEGREE // 2])
    assert 0.06 < bridges.mean() < 0.11
    assert (lowest[bridges] != links[bridges]).any(axis=1).mean() > 0.99
    assert ((lowest >= -1) & (lowest < len(vectors))).all()


def test_a_graph_from_a_device_takes_in_no_rows_nor_after_it_was_saved(tmp_path: Path) -> None:
    vectors = clustered(600, DIM, "l2", clusters=4)
    index = cagra_graph.over(vectors, cagra_links(vectors, "l2", DEGREE).astype(np.uint32), "l2")
    for turn in range(2):
        assert graph.extension(index) is None
        graph.save(index, tmp_path / str(turn))
        index = graph.load(tmp_path / str(turn))
    np.testing.assert_array_equal(graph.search(index, None, vectors[:5], 1, effort=32)[1].ravel(), np.arange(5))


def test_float16_vectors_stay_as_they_are(tmp_path: Path) -> None:
    vectors = clustered(3000, 16, "l2", clusters=20).astype(np.float16)
    vectors[7, 3] = 6e-8  # the smallest that float16 has
    archive.write(tmp_path / "graph", "graph", "l2", vectors, links=cagra_links(vectors.astype(np.float32), "l2", 16))
    index = graph.load(tmp_path / "graph")
    assert index.rows.dtype == np.float16
    np.testing.assert_array_equal(index.rows, vectors)
    assert recall(index, vectors, clustered(100, 16, "l2", seed=1, clusters=20), "l2", 64) >= 0.95


@pytest.mark.parametrize(("n", "dim"), [(1, 4), (2, 4), (300, 4)])
def test_few_rows_come_without_a_graph(tmp_path: Path, n: int, dim: int) -> None:
    vectors = clustered(n, dim, "ip")
    archive.write(tmp_path / "graph", "graph", "ip", vectors, links=np.empty((0, 0), dtype=np.uint32))
    index = graph.load(tmp_path / "graph")
    answers = graph.search(index, None, vectors, 10, effort=16), exact.search(vectors, None, vectors, 10, "ip")
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    np.testing.assert_array_equal(graph.vectors(index, np.arange(n)), vectors)


@pytest.mark.parametrize(
    "links",
    [
        np.zeros((30, 4), dtype=np.int32),
        np.zeros(30, dtype=np.uint32),
        np.zeros((29, 4), dtype=np.uint32),
        np.full((30, 4), 30, dtype=np.uint32),
    ],
)
def test_links_that_cannot_be_are_refused(tmp_path: Path, links: np.ndarray) -> None:
    archive.write(tmp_path / "graph", "graph", "l2", clustered(30, 4, "l2"), links=links)
    with pytest.raises(BackendError, match="links rows that it does not hold"):
        graph.load(tmp_path / "graph")


def lines(width: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 12), min_size=width, max_size=width)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 8).flatmap(lambda width: st.tuples(lines(width), st.lists(st.integers(-1, 12), max_size=9))))
def test_bridges_keep_the_stronger_half_and_never_link_twice(both: tuple[list[int], list[int]]) -> None:
    near, far = both
    merged = cagra_graph._merged(np.array([near], dtype=np.int32), np.array([far], dtype=np.int32).reshape(1, -1))
    half = len(near) // 2
    wanted = [row for row in dict.fromkeys(near[:half] + far + near[half:]) if row >= 0][: len(near)]
    assert merged.dtype == np.int32
    assert merged.tolist() == [wanted + [-1] * (len(near) - len(wanted))]


# --- the file


def test_an_archive_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "index"
    vectors = clustered(10, 4, "ip")
    archive.write(path, "flat", "ip", vectors, more=[1, 2])
    assert archive.is_archive(path)
    before = path.read_bytes()
    with pytest.raises(BackendError, match="cannot write"):
        archive.write(tmp_path / "no" / "index", "flat", "ip", vectors)
    with pytest.raises(ZeroDivisionError):
        archive.write(path, "flat", "ip", vectors, more=Broken())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    assert archive.read(path, "flat")["more"].tolist() == [1, 2]


class Broken:
    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise ZeroDivisionError


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index"
    archive.write(path, "flat", "l2", clustered(50, 16, "l2"))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for content in (b"", b"PK", whole[:-30], whole[: len(whole) // 2], bytes(changed), whole + b"x", b"no archive" * 9):
        path.write_bytes(content)
        with pytest.raises(BackendError, match="index"):
            archive.read(path, "flat")
    path.write_bytes(whole)
    with pytest.raises(BackendError, match="kind 'flat', not 'graph'"):
        archive.read(path, "graph")
    with pytest.raises(BackendError, match="cannot read"):
        archive.read(tmp_path / "nothing", "flat")
    assert not archive.is_archive(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("metric", "vectors"),
    [
        ("hamming", np.zeros((3, 2), dtype=np.float32)),
        ("l2", np.zeros((3, 2))),
        ("l2", np.zeros(3, dtype=np.float32)),
        ("l2", np.zeros((0, 2), dtype=np.float32)),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path: Path, metric: str, vectors: np.ndarray) -> None:
    archive.write(tmp_path / "index", "flat", metric, vectors)
    with pytest.raises(BackendError, match="no index"):
        archive.read(tmp_path / "index", "flat")
