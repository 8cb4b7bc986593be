"""Stand-ins for RAPIDS, put in place for a test that asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest


@pytest.fixture
def rapids(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The stand-ins that note what was asked of them; at the end all work must have been waited for."""
    # Not at the top: this file is read where the wheels are not installed, too.
    from headrace.gpu.rapids import handles
    from tests.rapids import stand_ins

    own = stand_ins.install(monkeypatch)
    yield own
    assert handles._threads.resources.waiting == 0, "a result was handed out before it was there"
