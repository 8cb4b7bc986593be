"""The soak of ``benchmarks/soak.py`` for a minute: workers die and stand still at random, and every promise is kept."""

from __future__ import annotations

import os

import pytest

from benchmarks.soak import soak
from tests.faults.conftest import Kept

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SEED = int(os.environ.get("HEADRACE_SOAK_SEED", "43"))


def test_a_minute_of_random_faults(kept: Kept) -> None:
    kept(soak(60.0, SEED))
