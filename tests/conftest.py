from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

import torch_freeze
from tests.helpers import apart

# Shared machines pause for seconds, so no example has a deadline.
hypothesis.settings.register_profile("torch_freeze", deadline=None, print_blob=True)
hypothesis.settings.load_profile("torch_freeze")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and on a busy machine they wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_report_header() -> str:
    return str(torch_freeze.build_info())


def _why_no_gpu() -> str | None:
    info = torch_freeze.build_info()
    if not info.cuda:
        return f"no CUDA code in this build: {info.cpu_only_because}"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def pytest_configure() -> None:
    apart.put_aside()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The wheel takes long to compile. At the end pytest-xdist deals single tests out to all its
    # processes, and more than one of them would compile it.
    items.sort(key=lambda item: item.path.parent.name != "packaging")
    compiled = torch_freeze.build_info().compiled
    reasons = {"gpu": _why_no_gpu(), "compiled": None if compiled else "no compiled module"}
    for marker, reason in reasons.items():
        for item in items if reason else ():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
