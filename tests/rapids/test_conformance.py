"""The conformance suites of all backends, run on our RAPIDS modules over stand-ins that take what RAPIDS takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.rapids_api

pytest.importorskip("cuvs", reason="the RAPIDS wheels are not installed")

from headrace.gpu.backend import Backend  # noqa: E402
from tests.gpu import test_backend_conformance, test_far_from_origin, test_filtered, test_index_kinds  # noqa: E402
from tests.gpu.test_filtered import indexed  # noqa: E402, F401
from tests.rapids import stand_ins  # noqa: E402

for suite in (test_backend_conformance, test_far_from_origin, test_filtered, test_index_kinds):
    globals().update({name: value for name, value in vars(suite).items() if name.startswith("test_")})


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with pytest.MonkeyPatch.context() as patch:
        stand_ins.install(patch)
        yield stand_ins.backend()
