"""The shape of a report, and what it says was held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.report import Criterion, Report, criterion, quantiles, show, spread, validate
from headrace.gpu.errors import ConfigError


@pytest.fixture(scope="module")
def report() -> Report:
    results = {
        "settings": {"seconds": 20.0, "backend": "host"},
        "vectors": {"apply": {"p50": spread([3.0, 1.0, 2.0]), "p99": 9.5}, "kafka": {"p50": 1.25}},
        "note": None,
    }
    return Report.of(
        "freshness", 7, results, [criterion("p50", 14.9, "ms", "< 15"), criterion("rate", 0.9, "share", ">= 0.95")]
    )


def _data(report: Report) -> dict[str, Any]:
    return dict(json.loads(report.to_json()))


@pytest.mark.parametrize(
    ("figure", "aim", "held"),
    [
        (14.99, "< 15", True),
        (15, "< 15", False),
        (15, "<= 15", True),
        (0.95, ">= 0.95", True),
        (0.9499, ">= 0.95", False),
        (1, "> 1", False),
        (0, "== 0", True),
        (1, "== 0", False),
        (None, "< 15", False),
        (float("nan"), "< 15", False),
        (float("-inf"), "< 15", False),
    ],
)
def test_held_follows_from_figure_and_aim(figure: float | None, aim: str, held: bool) -> None:
    assert criterion("x", figure, "ms", aim).held is held


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-1000, 1000))
def test_opposite_aims_are_never_held_together(figure: float, bound: int) -> None:
    assert criterion("x", figure, "", f"< {bound}").held is not criterion("x", figure, "", f">= {bound}").held


@pytest.mark.parametrize("aim", ["15", "<15", "about 15", "< fast", ""])
def test_an_aim_that_is_no_comparison_is_refused(aim: str) -> None:
    with pytest.raises(ConfigError, match="no comparison"):
        criterion("x", 1.0, "ms", aim)


def test_one_miss_is_a_miss(report: Report) -> None:
    assert [one.held for one in report.criteria] == [True, False]
    assert not report.held
    assert Report.of("x", 0, {}, report.criteria[:1]).held


def test_a_report_comes_back_from_its_file_as_it_went(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    report.write(file)
    again = Report.from_json(file.read_bytes())
    assert again == report
    assert isinstance(again.criteria[0], Criterion)
    assert again.to_json() == report.to_json()


def test_it_says_what_kind_of_machine_and_which_versions(report: Report) -> None:
    assert report.machine["cpu"]
    assert report.machine["cores"] >= 1
    assert report.machine["memory_gib"] > 0
    assert report.versions["python"]
    assert all(report.versions[name] for name in ("headrace", "faiss", "numpy", "confluent-kafka"))


@pytest.mark.parametrize("field", ["name", "seed", "machine", "versions", "results", "criteria"])
def test_every_field_must_be_there(report: Report, field: str) -> None:
    data = _data(report)
    del data[field]
    with pytest.raises(ConfigError, match=f"lacks '{field}'"):
        validate(data)


def test_nothing_that_names_the_machine_gets_in(report: Report) -> None:
    data = _data(report)
    data["machine"]["node"] = "somebody's"
    with pytest.raises(ConfigError, match="unknown field 'node'"):
        validate(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": True}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"criteria": {}}, "criteria"),
        ({"criteria": [{"name": "x"}]}, "lacks"),
        ({"criteria": [{"name": "x", "figure": 20, "unit": "ms", "aim": "< 15", "held": True}]}, "held"),
        ({"criteria": [{"name": "x", "figure": 20, "unit": "ms", "aim": "< 15", "held": 0}]}, "held"),
        ({"criteria": [{"name": "x", "figure": "20", "unit": "ms", "aim": "< 15", "held": False}]}, "figure"),
        ({"results": {"a": {"b": [1.0, float("inf")]}}}, r"results\.a\.b\[1\]"),
        ({"results": {"a": {1, 2}}}, r"results\.a"),
    ],
)
def test_what_is_wrong_is_named(report: Report, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate({**_data(report), **change})


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Report.from_json(text)


def test_quantiles_are_observed_values() -> None:
    assert quantiles(list(range(1, 201))) == {"p50": 100, "p95": 190, "p99": 198, "max": 200, "count": 200.0}
    assert quantiles([5.0])["p99"] == 5.0
    assert quantiles([])["p50"] is None


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_quantiles_rise_and_lie_within(values: list[float]) -> None:
    found = quantiles(values)
    line = [found[name] or 0.0 for name in ("p50", "p95", "p99", "max")]
    assert line == sorted(line)
    assert set(line) <= set(values)


def test_a_missing_repetition_is_not_passed_over() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([3.0, None])["median"] is None
    assert spread([])["median"] is None


def test_it_prints_results_and_misses(report: Report) -> None:
    console = Console(width=120, force_terminal=False)
    with console.capture() as out:
        show(report, console)
    text = out.get()
    assert "2 (1..3)" in text
    assert "apply" in text
    assert "missed" in text
    assert ">= 0.95" in text
