"""What a long run says on stderr."""

from __future__ import annotations

import time

import pytest

from benchmarks import progress as module
from benchmarks.progress import progress


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work") as report:
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_what_is_slow_says_what_and_how_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    monkeypatch.setattr(module, "EVERY", 0.05)
    with progress("work") as report:
        report(1, 3000)
        time.sleep(0.1)
        report(2000, 3000)
        report(2001, 3000)  # too soon after the last one
    said = capsys.readouterr().err.splitlines()
    assert said == ["work: begun", "work: 2,000 of 3,000, 0 s", "work: 0 s"]


def test_a_terminal_has_one_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for _ in range(2):
        with progress("outer") as outer, progress("inner") as inner:
            outer(1, 2)
            inner(1, 2)
    said = capsys.readouterr().err
    assert "outer" in said
    assert "inner: 0 s" in said
