from __future__ import annotations

import gc
import itertools
from collections import defaultdict
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import torch_freeze
from tests.helpers import apart, optim_cases

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pairwise",
        action="store_true",
        help="repeat in short what has been run: of each test only so many cases that all pairs of "
        "values of its parameters occur, and with each set of hyper-parameters few steps",
    )


def pytest_report_header() -> str:
    return str(torch_freeze.build_info())


def _why_no_gpu() -> str | None:
    info = torch_freeze.build_info()
    if not info.cuda:
        return f"no CUDA code in this build: {info.cpu_only_because}"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--pairwise"):
        optim_cases.most_steps = optim_cases.FEW_STEPS
    apart.put_aside()


def _covering_all_pairs(cases: list[pytest.Function]) -> list[pytest.Function]:
    """The cases of one test that together have each pair of values there is, of two parameters."""
    pairs = {}
    for case in cases:
        values = ((name, id(value)) for name, value in case.callspec.params.items())
        pairs[case] = set(itertools.combinations_with_replacement(values, 2))
    chosen, missing = set(), set().union(*pairs.values())
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [case for case in cases if case in chosen]


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The wheel takes long to compile. At the end pytest-xdist deals single tests out to all its
    # processes, and more than one of them would compile it.
    items.sort(key=lambda item: item.path.parent.name != "packaging")
    compiled = torch_freeze.build_info().compiled
    reasons = {"gpu": _why_no_gpu(), "compiled": None if compiled else "no compiled module"}
    for marker, reason in reasons.items():
        for item in items if reason else ():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--pairwise"):
        tests = defaultdict(list)
        for item in items:
            if hasattr(item, "callspec"):
                # Apart: without a GPU, a skipped case stands for none that runs.
                on_gpu = item.get_closest_marker("gpu") is not None
                tests[item.nodeid.partition("[")[0], on_gpu].append(item)
        kept = {case for cases in tests.values() for case in _covering_all_pairs(cases)}
        left_out = [item for item in items if hasattr(item, "callspec") and item not in kept]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_finish() -> None:
    """Garbage is looked for in what the tests make, not each time in torch and all the tests."""
    gc.collect()
    gc.freeze()
