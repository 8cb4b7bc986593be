"""What every backend must do alike, but for the index kinds, which have a suite of their own."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.gpu import backend as backends
from headrace.gpu import ranking
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.errors import BackendError
from headrace.gpu.index_spec import DTYPES
from tests.gpu.searches import METRICS, check_search, on_host, random_rows, true_scores

DEEP = 1_000_000


# --- the choice of a backend


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(BackendError, match="'tpu'"):
        resolve("tpu")


def test_auto_takes_the_host_where_rapids_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_missing", lambda name: "no CUDA device" if name == "rapids" else "")
    assert resolve("auto").name == "host"
    with pytest.raises(BackendError, match=r"'rapids'.*no CUDA device"):
        resolve("rapids")
    assert backends.available() == {"host": "", "rapids": "no CUDA device"}


# --- frames: decode_json and to_lists


def decoded(backend: Backend, values: list[bytes]) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """The usable values by their position, without what is missing."""
    frame, bad = backend.frames.decode_json(values)
    columns = backend.frames.to_lists(frame)
    rows = on_host(getattr(frame.index, "values", frame.index)).tolist()
    assert all(len(column) == len(rows) for column in columns.values())
    return {
        row: {name: column[place] for name, column in columns.items() if column[place] is not None}
        for place, row in enumerate(rows)
    }, bad


def test_records_become_columns(backend: Backend) -> None:
    frame, bad = backend.frames.decode_json([b'{"text":"a","n":1}', b'{"n":2.5,"ok":true}', b'{"text":null,"n":3}'])
    assert bad == {}
    columns = backend.frames.to_lists(frame)
    assert columns == {"text": ["a", None, None], "n": [1, 2.5, 3], "ok": [None, True, None]}
    assert [type(value) for value in columns["n"]] == [int, float, int]
    assert type(columns["ok"][1]) is bool


def test_no_values_and_empty_objects(backend: Backend) -> None:
    assert decoded(backend, []) == ({}, {})
    assert decoded(backend, [b"{}"]) == ({0: {}}, {})
    assert decoded(backend, [b"{}", b"x", b"{}"])[0] == {0: {}, 2: {}}


def test_a_batch_of_bad_values_only(backend: Backend) -> None:
    usable, bad = decoded(backend, [b"", b"  ", b"[1]", b"7", b'"a"', b"null", b"true"])
    assert usable == {}
    assert [bad[row] for row in range(7)] == [
        "empty",
        "empty",
        "not a JSON object but an array",
        "not a JSON object but a number",
        "not a JSON object but a string",
        "not a JSON object but null",
        "not a JSON object but a boolean",
    ]


def test_one_bad_value_never_touches_its_neighbours(backend: Backend) -> None:
    good = b'{"a":1}'
    for broken, reason in [
        (b'{"a":\xff}', "not UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a":1', "not JSON"),
        (b'{"a":NaN}', "not JSON"),
        (b'{"a":1e999}', "not JSON"),
        (b'{"a":1}{"a":2}', "not JSON"),
        (b'{"a":1},{"a":2}', "not JSON"),
        (b"]", "not JSON"),
        (b"1,2,3", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a":"\\ud800"}', "not JSON"),
        (b'{"a":"\n"}', "not JSON"),
        (b'{"a":1,"a":2}', "duplicate key 'a'"),
    ]:
        usable, bad = decoded(backend, [good, broken, good])
        assert usable == {0: {"a": 1}, 2: {"a": 1}}, broken
        assert list(bad) == [1], broken
        assert bad[1].startswith(reason), broken


@pytest.mark.parametrize(
    "values",
    [
        [b'{"a":[1', b"2]}"],
        [b'{"a":"x', b'y"}'],
        [b'{"a":[1', b"2]},5"],
        [b'{"a":[1', b'2]},{"b":1', b'"c":2}'],
        [b'{"a":[1', b"2]}", b"5,6,7"],
        [b"[", b"]"],
        [b"", b'{"a":1},{"a":2}', b""],
    ],
)
def test_neighbours_never_merge(backend: Backend, values: list[bytes]) -> None:
    usable, bad = decoded(backend, values)
    assert usable == {}
    assert sorted(bad) == list(range(len(values)))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b'{"a":1,"a":1}', "a"),
        (b'{"a":1,"b":"x","a":null}', "a"),
        (b'{"a":"x","a":{"b":[["y"]]}}', "a"),
        (b'{"a":1,"\\u0061":2}', "a"),
        (b'{"q\\"":1,"q\\u0022":2}', 'q"'),
        (b'{"v":[{"k":1,"k":2}]}', "k"),
        (b'{"v":{"w":{"k":"\\\\","k":2}}}', "k"),
        (b'{"a":"\\"\\"","a":1}', "a"),
    ],
)
def test_a_duplicate_key_is_found_and_named(backend: Backend, value: bytes, key: str) -> None:
    usable, bad = decoded(backend, [b'{"a":"x","b":["y",{"z":"\\\\"}]}', value])
    assert bad == {1: f"duplicate key {key!r}"}
    assert usable == {0: {"a": "x", "b": ["y", {"z": "\\"}]}}


@pytest.mark.parametrize(
    "value",
    [
        rb'{"a":"\"","b":"\\"}',
        rb'{"a":"\\\"\\","b\"":["\"",{"c":"\\\\"}]}',
        rb'{"a":"\u0022","\u0062":"\\u0022"}',
        b"{\"a\":\"{'a':1,'a':2}\"}",
        b'{"a":{"a":{"a":1}},"b":[{"a":1},{"a":1}]}',
        b'{\n "a" : "x" ,\r\n\t"b" : [ ] \n}',
    ],
)
def test_quotes_and_backslashes_are_no_duplicates(backend: Backend, value: bytes) -> None:
    assert decoded(backend, [value, b'{"a":1}']) == ({0: json.loads(value), 1: {"a": 1}}, {})


@pytest.mark.parametrize(
    "value",
    [
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b"[" * DEEP,
        b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}",
    ],
)
def test_deep_nesting_has_a_reason(backend: Backend, value: bytes) -> None:
    assert decoded(backend, [b'{"a":1}', value]) == ({0: {"a": 1}}, {1: "nested too deeply"})


@pytest.mark.parametrize("depth", [200, 600, 1000])
def test_nesting_that_the_parser_takes_never_crashes(backend: Backend, depth: int) -> None:
    nested = b"[" * depth + b'"x"' + b"]" * depth
    usable, bad = decoded(backend, [b'{"b":1}', b'{"a":' + nested + b"}", b'{"a":1,"a":' + nested + b"}"])
    assert usable[0] == {"b": 1}
    assert bad[2].startswith("duplicate key")
    assert (1 in usable) != (bad.get(1) == "nested too deeply")


@pytest.mark.parametrize(
    "number", [2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64 + 1, -(2**63) - 1, 10**300 + 1, 0]
)
def test_whole_numbers_stay_exact(backend: Backend, number: int) -> None:
    frame, _ = backend.frames.decode_json([b"{}", b'{"n":%d}' % number, b'{"n":null}', b'{"n":1}'])
    assert backend.frames.to_lists(frame)["n"] == [None, number, None, 1]
    assert type(backend.frames.to_lists(frame)["n"][1]) is int


def test_floats_stay_floats(backend: Backend) -> None:
    values = [1e300, -1e19, 0.1, 5e-324, 1.0]
    frame, _ = backend.frames.decode_json([b'{"x":%s}' % repr(value).encode() for value in values])
    got = backend.frames.to_lists(frame)["x"]
    assert got == values
    assert {type(value) for value in got} == {float}


def test_records_that_disagree_keep_their_kinds(backend: Backend) -> None:
    values = [1, "1", True, 1.5, None, [1, 2], {"a": [None, "x"]}, "", False]
    frame, bad = backend.frames.decode_json([json.dumps({"f": value}).encode() for value in values])
    got = backend.frames.to_lists(frame)["f"]
    assert not bad
    assert got == values
    assert [type(value) for value in got] == [type(value) for value in values]


def test_field_names_may_be_anything(backend: Backend) -> None:
    record = {"": 1, "index": 2, "json": "x", "a b": 3, "ü": 4, "0": 5}
    assert decoded(backend, [json.dumps(record).encode()])[0] == {0: record}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=6) | st.floats(-1e6, 1e6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
PIECES = st.lists(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b'"a"', b'"a":1', b"1", b" ", b"\n", b"\xff", b"null"]
    ),
    max_size=7,
).map(b"".join)
RECORDS = st.dictionaries(st.sampled_from(["a", "b", '"', "\\", "é"]), JSON, max_size=4)
VALUES = st.lists(
    PIECES | JSON.map(lambda item: json.dumps(item).encode()) | RECORDS.map(lambda item: json.dumps(item).encode()),
    max_size=5,
)


def rejects_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate")
    return dict(pairs)


def rounded(item: Any, level: int = 0) -> Any:
    """Nested whole numbers beyond 64 bits may become floats."""
    if isinstance(item, dict):
        return {name: rounded(value, level + 1) for name, value in item.items() if value is not None or level}
    if isinstance(item, list):
        return [rounded(value, level + 1) for value in item]
    return float(item) if type(item) is int and level > 1 and not -(2**63) <= item < 2**64 else item


def expected(values: list[bytes]) -> dict[int, dict[str, Any]]:
    usable = {}
    for row, value in enumerate(values):
        try:
            item = json.loads(value.decode(), object_pairs_hook=rejects_duplicates)
        except ValueError:
            continue
        if isinstance(item, dict):
            usable[row] = rounded(item)
    return usable


def test_decoding_a_batch_is_decoding_each_value(backend: Backend) -> None:
    @settings(max_examples=400, deadline=None)
    @given(VALUES)
    def check(values: list[bytes]) -> None:
        usable, bad = decoded(backend, values)
        want = expected(values)
        assert usable == want
        for row, item in want.items():
            assert {name: type(usable[row][name]) for name in item} == {name: type(item[name]) for name in item}
        assert sorted([*usable, *bad]) == list(range(len(values)))

    check()


# --- frames: vectors


def test_list_column_as_a_matrix(backend: Backend) -> None:
    frame, _ = backend.frames.decode_json(
        [b'{"v":[1,2.5,-3]}', b"{}", b'{"v":[1,2]}', b'{"v":null}', b'{"v":[4,5,6e0]}', b'{"v":[]}']
    )
    matrix, rows = map(on_host, backend.frames.vectors(frame, "v", 3))
    np.testing.assert_array_equal(matrix, np.array([[1, 2.5, -3], [4, 5, 6]], dtype=np.float32))
    assert (matrix.dtype, rows.dtype) == (np.float32, np.int64)
    assert rows.tolist() == [0, 4]
    matrix[0, 0] = 9  # the caller may normalise in place


@pytest.mark.parametrize("odd", ['[1,"2",3]', "[1,null,3]", "[1,true,3]", "[[1,2,3],4,5]", '"abc"', '{"a":1}', "7"])
def test_what_is_no_list_of_numbers_is_left_out(backend: Backend, odd: str) -> None:
    frame, _ = backend.frames.decode_json([b'{"v":[0,1,2]}', b'{"v":%s}' % odd.encode(), b'{"v":[1,1,0.5]}'])
    matrix, rows = map(on_host, backend.frames.vectors(frame, "v", 3))
    assert rows.tolist() == [0, 2]
    assert matrix.tolist() == [[0, 1, 2], [1, 1, 0.5]]


def test_rows_are_positions_in_the_frame_not_in_the_batch(backend: Backend) -> None:
    frame, _ = backend.frames.decode_json([b"broken", b'{"v":[1]}', b"{}", b'{"v":[2]}'])
    assert on_host(backend.frames.vectors(frame, "v", 1)[1]).tolist() == [0, 2]


@pytest.mark.parametrize("values", [[], [b"{}"], [b'{"w":1}'], [b'{"v":null}'], [b'{"v":[]}']])
def test_no_vectors_at_all(backend: Backend, values: list[bytes]) -> None:
    frame, _ = backend.frames.decode_json(values)
    matrix, rows = map(on_host, backend.frames.vectors(frame, "v", 4))
    assert (matrix.shape, matrix.dtype, rows.shape, rows.dtype) == ((0, 4), np.float32, (0,), np.int64)


def test_numbers_too_large_for_float32_become_infinite(backend: Backend) -> None:
    frame, _ = backend.frames.decode_json([b'{"v":[1e300,-1e300,1e-300]}'])
    assert on_host(backend.frames.vectors(frame, "v", 3)[0]).tolist() == [[math.inf, -math.inf, 0]]


# --- k-means


def test_training_finds_the_clusters(backend: Backend) -> None:
    xp = backend.xp
    middles = random_rows(8, 16, seed=1) * 10
    sample = np.repeat(middles, 50, axis=0) + random_rows(400, 16, seed=2) * 0.01
    centroids = backend.kmeans.train(xp.asarray(sample), 8, seed=3, iterations=30, init=xp.asarray(middles + 0.5))
    assert on_host(centroids).dtype == np.float32
    np.testing.assert_allclose(on_host(centroids), middles, atol=0.02)
    labels, distances = backend.kmeans.assign(xp.asarray(sample), centroids)
    assert on_host(labels).tolist() == np.repeat(np.arange(8), 50).tolist(), "a warm start keeps the cells' numbers"
    assert float(on_host(distances).max()) < 0.02


def test_training_from_scratch_lowers_the_error_and_repeats(backend: Backend) -> None:
    sample = backend.xp.asarray(random_rows(600, 8))
    one, two = (on_host(backend.kmeans.train(sample, 16, seed=5)) for _ in range(2))
    np.testing.assert_allclose(one, two, atol=1e-4)
    error = on_host(backend.kmeans.assign(sample, backend.xp.asarray(one))[1]).mean()
    start = on_host(backend.kmeans.assign(sample, sample[:16])[1]).mean()
    assert error < start


@pytest.mark.parametrize("n", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("warm", [False, True])
def test_training_on_few_vectors_is_quiet(backend: Backend, n: int, warm: bool, capfd: pytest.CaptureFixture) -> None:
    sample = random_rows(n, 4)
    init = backend.xp.asarray(random_rows(8, 4, seed=9)) if warm else None
    centroids = backend.kmeans.train(backend.xp.asarray(sample), 8, init=init)
    assert on_host(centroids).shape == (8, 4)
    assert np.isfinite(on_host(centroids)).all()
    if n <= 8 and not warm:
        assert float(on_host(backend.kmeans.assign(backend.xp.asarray(sample), centroids)[1]).max()) == 0
    assert capfd.readouterr() == ("", "")


def test_few_vectors_move_only_their_own_cells(backend: Backend) -> None:
    init = np.eye(6, dtype=np.float32)
    sample = np.array([[0.9, 0.1, 0, 0, 0, 0], [0.7, 0.1, 0, 0, 0, 0]], dtype=np.float32)
    centroids = on_host(backend.kmeans.train(backend.xp.asarray(sample), 6, init=backend.xp.asarray(init)))
    np.testing.assert_array_equal(centroids[1:], init[1:])
    np.testing.assert_allclose(centroids[0], sample.mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(init, np.eye(6))


def test_training_on_equal_vectors(backend: Backend) -> None:
    centroids = on_host(backend.kmeans.train(backend.xp.ones((100, 4), dtype=np.float32), 8))
    assert centroids.shape == (8, 4)
    assert np.isfinite(centroids).all()


def test_training_that_cannot_be(backend: Backend) -> None:
    xp = backend.xp
    with pytest.raises(BackendError, match="0 vectors"):
        backend.kmeans.train(xp.empty((0, 4), dtype=np.float32), 8)
    with pytest.raises(BackendError, match=r"\(3, 4\).*\(8, 4\)"):
        backend.kmeans.train(xp.ones((10, 4), dtype=np.float32), 8, init=xp.ones((3, 4), dtype=np.float32))


def test_assignment_is_the_nearest(backend: Backend) -> None:
    vectors, centroids = random_rows(500, 24), random_rows(37, 24, seed=1)
    labels, distances = backend.kmeans.assign(backend.xp.asarray(vectors), backend.xp.asarray(centroids))
    truth = -true_scores(centroids, vectors, "l2")
    assert (labels.dtype, distances.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(on_host(labels), truth.argmin(axis=1))
    np.testing.assert_allclose(on_host(distances), truth.min(axis=1), rtol=1e-5)


def test_a_label_does_not_depend_on_the_batch(backend: Backend) -> None:
    # Half-way between two centroids, float32 products of different shapes disagree about the nearer one.
    xp = backend.xp
    centroids = random_rows(64, 96, "cosine", seed=4)
    pairs = np.random.default_rng(0).integers(0, 64, size=(400, 2))
    vectors = ((centroids[pairs[:, 0]] + centroids[pairs[:, 1]]) / 2).astype(np.float32)
    together = on_host(backend.kmeans.assign(xp.asarray(vectors), xp.asarray(centroids))[0])
    kept = backend.kmeans.nearest(xp.asarray(centroids))
    for size in (1, 7, 64):
        apart = [on_host(kept.labels(xp.asarray(vectors[i : i + size]))) for i in range(0, len(vectors), size)]
        np.testing.assert_array_equal(np.concatenate(apart), together)


def test_of_equally_near_centroids_the_first_is_taken(backend: Backend) -> None:
    # The same numbers in another order: the distances are equal, but not the sums that a computer makes of them.
    xp = backend.xp
    values = np.random.default_rng(0).normal(size=33)
    centroids = np.stack([np.random.default_rng(seed).permutation(values) for seed in range(40)]).astype(np.float32)
    vectors = np.repeat(np.linspace(0.1, 3, 50, dtype=np.float32)[:, None], 33, axis=1)
    labels, _ = backend.kmeans.assign(xp.asarray(vectors), xp.asarray(centroids))
    assert set(on_host(labels).tolist()) == {0}


def test_assignment_of_no_vectors(backend: Backend) -> None:
    labels, distances = backend.kmeans.assign(
        backend.xp.empty((0, 4), dtype=np.float32), backend.xp.ones((3, 4), dtype=np.float32)
    )
    assert labels.shape == distances.shape == (0,)


# --- exact search


def exact_search(backend: Backend, vectors, allowed, queries, k, metric):
    xp = backend.xp
    allowed = None if allowed is None else xp.asarray(allowed)
    return backend.exact.search(xp.asarray(vectors), allowed, xp.asarray(queries), k, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 700, 5000])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.05, 0.002])
@pytest.mark.parametrize("count", [1, 9])
def test_exact_search(backend: Backend, metric: str, dtype: str, n: int, share: float, count: int) -> None:
    vectors, queries = random_rows(n, 20, metric).astype(dtype), random_rows(count, 20, metric, seed=7)
    allowed = np.random.default_rng(1).random(n) < share
    for k in (1, 10, 100):
        answer = exact_search(backend, vectors, allowed, queries, k, metric)
        check_search(answer, vectors, allowed, queries, k, metric)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_search_without_a_filter(backend: Backend, dtype: str) -> None:
    vectors, queries = random_rows(900, 20).astype(dtype), random_rows(12, 20, seed=7)
    for asked in (queries, queries[:1]):
        answer = exact_search(backend, vectors, None, asked, 5, "ip")
        check_search(answer, vectors, np.ones(900, dtype=bool), asked, 5, "ip")


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_of_nothing(backend: Backend, metric: str) -> None:
    vectors, allowed = random_rows(6, 4, metric), np.zeros(6, dtype=bool)
    queries = random_rows(2, 4, metric, seed=1)
    check_search(exact_search(backend, vectors, allowed, queries, 3, metric), vectors, allowed, queries, 3, metric)
    check_search(
        exact_search(backend, vectors[:0], allowed[:0], queries, 3, metric),
        vectors[:0],
        allowed[:0],
        queries,
        3,
        metric,
    )
    scores, rows = exact_search(backend, vectors, ~allowed, queries[:0], 3, metric)
    assert scores.shape == rows.shape == (0, 3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [40, 3000])
def test_exact_search_among_equal_rows(backend: Backend, metric: str, n: int) -> None:
    vectors = np.repeat(random_rows(2, 8, metric), n // 2, axis=0)
    allowed = np.arange(n) % 3 > 0
    check_search(
        exact_search(backend, vectors, allowed, vectors[:3], 15, metric), vectors, allowed, vectors[:3], 15, metric
    )


def test_small_distances_far_from_the_origin_are_exact(backend: Backend) -> None:
    vectors = (np.full((200, 16), 1000) + np.arange(200)[:, None] * 0.25).astype(np.float32)
    scores, rows = map(on_host, exact_search(backend, vectors, np.ones(200, dtype=bool), vectors[50:51], 3, "l2"))
    assert scores[0].tolist() == [0, 1, 1]
    assert rows[0, 0] == 50


def test_exact_search_agrees_with_a_plain_sort(backend: Backend) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        n, dim = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 5))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        # Few different small whole numbers: many ties, and products without rounding.
        vectors = rng.integers(-2, 3, size=(n, dim)).astype(data.draw(st.sampled_from(DTYPES)))
        queries = rng.integers(-2, 3, size=(data.draw(st.integers(0, 16)), dim)).astype(np.float32)
        allowed = rng.random(n) < data.draw(st.sampled_from([0, 0.02, 0.5, 1]))
        k, metric = data.draw(st.integers(1, 40)), data.draw(st.sampled_from(["ip", "l2"]))
        check_search(exact_search(backend, vectors, allowed, queries, k, metric), vectors, allowed, queries, k, metric)

    check()


def test_a_query_that_is_no_number_finds_nothing(backend: Backend) -> None:
    queries = np.array([[np.nan] * 4, [1, 0, 0, 0]], dtype=np.float32)
    vectors, allowed = np.eye(4, dtype=np.float32), np.ones(4, dtype=bool)
    _, rows = map(on_host, exact_search(backend, vectors, allowed, queries, 1, "ip"))
    assert rows[1].tolist() == [0]


def test_search_takes_arrays_that_are_not_contiguous(backend: Backend) -> None:
    wide = random_rows(3000, 24)
    vectors, queries = wide[::2, 3:19], np.asfortranarray(wide[:5, 3:19])
    allowed = np.arange(1500) % 2 == 0
    check_search(exact_search(backend, vectors, allowed, queries, 4, "ip"), vectors, allowed, queries, 4, "ip")


# --- ranking of what a library has found


@pytest.mark.parametrize("metric", METRICS)
def test_ranking_keeps_allowed_rows_only_and_sorts_them(metric: str) -> None:
    vectors, queries = random_rows(50, 8, metric), random_rows(3, 8, metric, seed=1)
    allowed = np.arange(50) % 2 == 0
    found = np.tile(np.array([4, 7, 49, 0xFFFFFFFF, 50, 10, 48, 0], dtype=np.uint32), (3, 1))
    among = np.isin(np.arange(50), [4, 10, 48, 0])
    for k in (2, 6, 12):
        answer = ranking.rank(np, vectors, allowed, queries, found, k, metric)
        check_search(answer, vectors, among, queries, k, metric)
    signed = np.array([[-1, 2]] * 3)
    assert ranking.rank(np, vectors, allowed, queries, signed, 2, metric)[1].tolist() == [[2, -1]] * 3


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_bits_are_numbered_from_the_lowest(allowed: list[bool]) -> None:
    words = ranking.bitset(np, np.array(allowed))
    assert (words.dtype, len(words)) == (np.uint32, -(-len(allowed) // 32))
    assert int.from_bytes(words.astype("<u4").tobytes(), "little") == sum(
        1 << row for row, bit in enumerate(allowed) if bit
    )
