"""Fine-tuning on real images: everyone learns the same, and the frozen backbone stays."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("pandas", reason="compare.py needs pandas: pip install pandas")
pytest.importorskip("tabulate", reason="compare.py needs tabulate: pip install tabulate")
pytest.importorskip("tqdm", reason="compare.py needs tqdm: pip install tqdm")
pytest.importorskip("matplotlib", reason="compare.py needs matplotlib: pip install matplotlib")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from torch_freeze_bench import checks
from torch_freeze_bench.contestants import FROZEN_AWARE, FUSED, REFERENCE, SGD, Contestant, select
from torch_freeze_bench.records import OURS, Measured
from torch_freeze_bench.suites import digits

from tests.benchmarks.compare_cases import CPU, GPUS, fact, setting


@pytest.fixture(scope="module", params=["cpu", GPUS])
def outcome(request: pytest.FixtureRequest) -> Iterator[tuple[str, Measured]]:
    """A short training by everyone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    on = setting(device=torch.device(request.param))
    yield request.param, digits.run_digits(on, pretrain_epochs=4, epochs=4)
    torch.set_num_threads(before)


def test_everyone_follows_the_reference_curve(outcome: tuple[str, Measured]) -> None:
    device, found = outcome
    assert found.contestants == [c.key for c in select(any_frozen=True)]
    assert all(found.of(key, "difference") for key in found.contestants)
    assert not any(map(found.unequal, found.contestants))
    if device == "cpu":  # where bit-equality to the loop is promised
        assert found.one(OURS, "difference") == 0
        assert found.of(OURS, "loss") == found.of("filter/default", "loss")


def test_the_training_trains(outcome: tuple[str, Measured]) -> None:
    _, found = outcome
    before, pretrained = fact(found, "accuracy"), fact(found, "pretrained accuracy")
    assert pretrained > 80
    for key in found.contestants:
        losses = found.of(key, "loss")
        assert losses[-1] < losses[0] / 2
        assert (found.one(key, "accuracy") or 0) > before + 20


def test_the_halves_of_the_data_are_five_classes_each_and_do_not_overlap() -> None:
    halves = [digits.load_digits(first, CPU) for first in (0, 5)]
    for train, test in halves:
        assert set(train[1].tolist()) == set(test[1].tolist()) == set(range(5))
        assert train[0].shape[1:] == test[0].shape[1:] == (1, 8, 8)
        assert float(train[0].max()) == 1.0
    assert sum(len(part[1]) for half in halves for part in half) == 1797


def test_the_batches_are_the_same_for_whoever_asks() -> None:
    data = digits.load_digits(0, CPU)[0]
    first, again, other = (digits.batches(data, 2, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert sum(len(labels) for _, labels in first) == 2 * len(data[1])


@pytest.mark.parametrize("contestant", [FROZEN_AWARE, REFERENCE, FUSED], ids=lambda c: c.key)
def test_the_backbone_stays_as_it_was(contestant: Contestant) -> None:
    start = digits.digit_net()
    start[0].requires_grad_(False)
    before = copy.deepcopy(start.state_dict())
    run = digits.Run(contestant, SGD, start)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 5
    for _ in range(3):
        run.iterate(images, labels)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("0.")
    assert len(run.losses) == len(run.iteration) == 3


def test_without_scikit_learn_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(checks.MissingPackageError, match="pip install scikit-learn"):
        digits.load_digits(0, CPU)
