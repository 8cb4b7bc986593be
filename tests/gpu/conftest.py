"""The backends that the conformance suite is run on: the host always, RAPIDS with ``-m gpu`` where a device is."""

from __future__ import annotations

import pytest

from headrace.gpu.backend import Backend, resolve


@pytest.fixture(params=[pytest.param("host"), pytest.param("rapids", marks=pytest.mark.gpu)], scope="module")
def backend(request: pytest.FixtureRequest) -> Backend:
    return resolve(request.param)
