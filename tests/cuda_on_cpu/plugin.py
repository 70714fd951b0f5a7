"""What pytest does otherwise on the simulation: pytest -p cuda_on_cpu.plugin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import cuda_on_cpu

# What the simulation lacks, and parts of the ids of the tests that need it.
LEFT_OUT = {
    "sparse CUDA tensors": ("xa sparse gradient",),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what needs a part of CUDA that is not there."""
    for item in items:
        for lacking, parts in LEFT_OUT.items():
            if any(part in item.nodeid for part in parts):
                item.add_marker(pytest.mark.skip(reason=f"simulated CUDA has no {lacking}"))


@pytest.fixture(autouse=True)
def _all_work_ends_well() -> Iterator[None]:
    """Run, at the end of each test, what nothing has waited for."""
    yield
    failure = cuda_on_cpu.finish()
    assert not failure, f"work on a stream failed: {failure}"
