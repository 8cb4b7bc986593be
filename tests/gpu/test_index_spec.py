"""What an index may be, and what is settled by size."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.gpu.errors import ConfigError
from headrace.gpu.index_spec import DTYPES, KINDS, IndexSpec, build_params

SPECS = st.builds(
    IndexSpec,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    recall_target=st.floats(0.01, 1),
    graph_degree=st.none() | st.integers(2, 512),
    graph_effort=st.none() | st.integers(2, 4096),
    lists=st.none() | st.integers(1, 1 << 20),
    pq_dim=st.none() | st.integers(1, 64),
    pq_bits=st.none() | st.integers(4, 8),
)


@given(SPECS)
def test_a_spec_survives_the_wire(spec: IndexSpec) -> None:
    assert IndexSpec.from_wire(json.loads(json.dumps(spec.to_wire()))) == spec


def test_fields_left_out_on_the_wire_take_their_defaults() -> None:
    assert IndexSpec.from_wire({"kind": "flat"}) == IndexSpec(kind="flat")


def test_an_unknown_field_on_the_wire_is_named() -> None:
    with pytest.raises(ConfigError, match="'colour'"):
        IndexSpec.from_wire({"kind": "flat", "colour": "red"})


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("kind", "hnsw", "flat, graph, ivf_pq"),
        ("dtype", "int8", "float32, float16"),
        ("recall_target", 0, "above 0 and at most 1"),
        ("recall_target", 1.5, "above 0 and at most 1"),
        ("recall_target", True, "above 0 and at most 1"),
        ("recall_target", "high", "above 0 and at most 1"),
        ("graph_degree", 1, "from 2 to 512"),
        ("graph_degree", 32.0, "a whole number"),
        ("graph_effort", 0, "from 2 to 4096"),
        ("lists", 0, "from 1"),
        ("pq_dim", -3, "from 1"),
        ("pq_bits", 3, "from 4 to 8"),
        ("pq_bits", True, "from 4 to 8"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(field: str, value: Any, cure: str) -> None:
    with pytest.raises(ConfigError, match=f"{value!r}.*{cure}"):
        IndexSpec(**{field: value})


@given(SPECS, st.integers(0, 10**9), st.integers(1, 2000))
def test_parameters_always_fit_what_is_built(spec: IndexSpec, rows: int, dim: int) -> None:
    try:
        params = build_params(spec, rows, dim)
    except ConfigError:
        assume(False)
    assert (params.kind, params.dtype) == (spec.kind, spec.dtype)
    assert params.graph_degree == (spec.graph_degree or 32)
    assert params.graph_effort == (spec.graph_effort or 100)
    if spec.kind == "ivf_pq":
        assert dim % params.pq_dim == 0
        assert params.pq_dim * params.pq_bits % 8 == 0
        assert spec.pq_dim in (None, params.pq_dim)
        assert spec.pq_bits in (None, params.pq_bits)
        assert params.lists == 0 if rows < 2048 else 1 <= params.lists <= rows // 39
        assert params.lists <= (spec.lists or rows)
    else:
        assert (params.lists, params.pq_dim, params.pq_bits) == (0, 0, 0)


@given(st.integers(0, 10**7), st.integers(0, 10**6), st.integers(1, 2000))
def test_more_rows_never_take_fewer_lists(rows: int, more: int, dim: int) -> None:
    spec = IndexSpec(kind="ivf_pq")
    assert build_params(spec, rows, dim).lists <= build_params(spec, rows + more, dim).lists


@given(st.integers(1, 2000))
def test_a_code_is_found_for_every_dimension(dim: int) -> None:
    params = build_params(IndexSpec(kind="ivf_pq"), 10**6, dim)
    assert params.pq_dim * params.pq_bits <= 8 * max(dim, 1), "a code is never longer than a byte a number"


@pytest.mark.parametrize(
    ("dim", "code"), [(384, (192, 4)), (100, (50, 4)), (32, (32, 4)), (101, (101, 8)), (1, (1, 8))]
)
def test_default_codes(dim: int, code: tuple[int, int]) -> None:
    params = build_params(IndexSpec(kind="ivf_pq"), 10**6, dim)
    assert (params.pq_dim, params.pq_bits) == code


@pytest.mark.parametrize(("spec", "dim"), [({"pq_dim": 7}, 384), ({"pq_bits": 4}, 7), ({"pq_dim": 3, "pq_bits": 5}, 9)])
def test_codes_that_do_not_fit_are_refused(spec: dict[str, int], dim: int) -> None:
    with pytest.raises(ConfigError, match=f"{dim} numbers.*leave both out"):
        build_params(IndexSpec(kind="ivf_pq", **spec), 10**6, dim)
    build_params(IndexSpec(kind="graph", **spec), 10**6, dim)
