"""The runbook format of the big-ann-benchmarks, and the runbooks that are kept here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.runbook import FOLDER, Live, Runbook, Step, clustered, expiration, kept, read, scaled, sliding_window
from benchmarks.runbook import write as write_runbook
from headrace.gpu.errors import ConfigError

THEIRS = """
random-xs:
  max_pts: 10000
  1:
    operation: insert
    start: 0
    end: 10000
  2:
    operation: search
  3:
    operation: delete
    start: 0
    end: 5000
  4:
    operation: insert
    start: 0
    end: 4000
  5:
    operation: replace
    tags_start: 7000
    tags_end: 8000
    ids_start: 0
    ids_end: 1000
  gt_url: none
"""

_KEPT = dict(kept())


def _file(folder: Path, text: str) -> Path:
    file = folder / "runbook.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_their_format_is_read(tmp_path: Path) -> None:
    assert read(_file(tmp_path, THEIRS)) == Runbook(
        "random-xs",
        10_000,
        (
            Step("insert", range(10_000), range(10_000)),
            Step("search"),
            Step("delete", range(5000)),
            Step("insert", range(4000), range(4000)),
            Step("replace", range(7000, 8000), range(1000)),
        ),
    )


def test_a_data_set_is_chosen_by_name(tmp_path: Path) -> None:
    two = THEIRS + THEIRS.replace("random-xs", "other").replace("10000", "9000")
    file = _file(tmp_path, two)
    assert read(file, "other").max_points == 9000
    with pytest.raises(ConfigError, match="no runbook for None: it has random-xs, other"):
        read(file)
    with pytest.raises(ConfigError, match="no runbook for 'third'"):
        read(file, "third")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("operation: search", "operation: look", "step 2 must have an operation"),
        ("  3:\n", "  30:\n", "has a step 4 but no step 3"),
        ("start: 0\n    end: 5000", "start: 0", "step 3 .delete. lacks 'end'"),
        ("end: 5000", "end: 5000\n    ends: 1", "unknown field 'ends'"),
        ("end: 5000", "end: 0", "nothing lies from 0 to 0"),
        ("end: 5000", "end: many", "end is 'many'"),
        ("start: 7000", "start: -1", "tags_start is -1"),
        ("ids_end: 1000", "ids_end: 999", "1000 tags cannot take 999 vectors"),
        ("end: 5000", "end: 10001", "step 3: delete of 10000, which is not there"),
        ("end: 4000", "end: 5001", "step 4: it inserts 5000, which is there already"),
        ("max_pts: 10000", "max_pts: 9999", "step 1: 10000 points are in the index and max_pts is 9999"),
        ("max_pts: 10000", "max_pts: lots", "max_pts, a whole number"),
        ("gt_url: none", "max: 3", "unknown field 'max'"),
        ("random-xs:", "random-xs", "cannot be read as a runbook"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in THEIRS
    with pytest.raises(ConfigError, match=said):
        read(_file(tmp_path, THEIRS.replace(old, new, 1)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read(tmp_path / "nowhere.yaml")


def test_live_knows_tags_and_vectors(tmp_path: Path) -> None:
    live = Live(10_000)
    for step in read(_file(tmp_path, THEIRS)).steps:
        live.take(step)
    assert live.count == 9000
    np.testing.assert_array_equal(live.tags(), [*range(4000), *range(5000, 10_000)])
    np.testing.assert_array_equal(
        live.vectors(), [*range(4000), *range(5000, 7000), *range(1000), *range(8000, 10_000)]
    )


@pytest.mark.parametrize("made", [sliding_window, expiration, clustered])
def test_a_runbook_comes_back_as_it_was_written(made: Any, tmp_path: Path) -> None:
    runbook = made("data", 4000)
    file = tmp_path / "runbook.yaml"
    write_runbook(file, runbook)
    assert read(file) == runbook


def test_the_kept_runbooks_are_those_that_would_be_written() -> None:
    books = dict(kept())
    assert sorted(books) == sorted(FOLDER.glob("*.yaml"))
    for file, runbook in books.items():
        assert read(file) == runbook
        assert runbook.vectors <= 100_000
        operations = [step.operation for step in runbook.steps]
        assert operations.count("search") >= 10
        assert "delete" in operations
    assert any(step.operation == "replace" for runbook in books.values() for step in runbook.steps)


@given(st.sampled_from(sorted(FOLDER.glob("*.yaml"))), st.integers(1000, 99_999))
def test_a_runbook_over_fewer_vectors_can_still_be_played(file: Path, rows: int) -> None:
    whole = _KEPT[file]
    small = scaled(whole, rows)
    small.check()
    assert small.vectors <= rows
    assert all(len(step.tags) == len(step.vectors) for step in small.steps if step.operation == "replace")
    searches = [sum(step.operation == "search" for step in one.steps) for one in (whole, small)]
    assert searches[0] == searches[1]
    assert small.max_points == pytest.approx(whole.max_points * rows / whole.vectors, rel=0.05)


def test_a_runbook_is_not_stretched() -> None:
    runbook = sliding_window("data", 4000)
    assert scaled(runbook, 5000) is runbook


def test_the_files_are_plain_yaml_of_that_format() -> None:
    for file in FOLDER.glob("*.yaml"):
        ((_, section),) = yaml.safe_load(file.read_text(encoding="utf-8")).items()
        assert set(section) == {"max_pts", *range(1, len(section))}
