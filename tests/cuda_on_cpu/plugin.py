"""What pytest does otherwise on the simulation: pytest -p tests.cuda_on_cpu.plugin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import cuda_on_cpu


@pytest.fixture(autouse=True)
def _all_work_ends_well() -> Iterator[None]:
    """Run, at the end of each test, what nothing has waited for."""
    yield
    failure = cuda_on_cpu.finish()
    assert not failure, f"work on a stream failed: {failure}"
