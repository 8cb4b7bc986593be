"""Three workers, two copies, clients of all kinds at all levels, and everything breaks once: every promise is kept.

It is the soak of ``benchmarks/soak.py`` for some 50 s: workers are killed and stand still, the scheduler is killed and
replaced, the broker is away. Any length by hand: ``headrace bench soak --seconds 3600``.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.soak import soak
from tests.faults.conftest import Kept

# Dask leaves sockets to a scheduler that was killed to the collector, which may come by at any time.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

SEED = int(os.environ.get("HEADRACE_SOAK_SEED", "43"))


def test_every_level_keeps_its_promise_while_everything_breaks(kept: Kept) -> None:
    kept(soak(50.0, SEED, each=True))
