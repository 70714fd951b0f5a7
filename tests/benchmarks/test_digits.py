"""Fine-tuning on real images: everyone learns the same, and the frozen backbone stays."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

import digits
import models
from contestants import OURS, REFERENCE, Contestant, select
from digits import DigitsOutcome
from measure import Budget
from suites import Setting

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.fixture(scope="module", params=DEVICES)
def outcome(request: pytest.FixtureRequest) -> Iterator[DigitsOutcome]:
    """A short training by everyone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    setting = Setting(
        torch.device(request.param), Budget(), False, random.Random(0), lambda text: None
    )
    yield digits.run_digits(setting, pretrain_epochs=4, epochs=4)
    torch.set_num_threads(before)


def test_everyone_follows_the_reference_curve(outcome: DigitsOutcome) -> None:
    assert [row.contestant for row in outcome.rows] == select(any_frozen=True, compiled=False)
    assert all(row.holds for row in outcome.rows)


def test_frozen_aware_sgd_follows_every_bit_of_the_curve_on_a_cpu(outcome: DigitsOutcome) -> None:
    if outcome.device != "cpu":
        pytest.skip("bit-equality to the loop is promised on the CPU")
    assert outcome.ours.largest_gap == 0
    assert outcome.ours.losses == next(
        row.losses for row in outcome.rows if row.contestant.key == "filter/default"
    )


def test_the_training_trains(outcome: DigitsOutcome) -> None:
    assert outcome.pretrained_accuracy > 80
    for row in outcome.rows:
        assert row.losses[-1] < row.losses[0] / 2
        assert row.accuracy > outcome.accuracy_before + 20


def test_gradients_and_state_of_the_head_alone_are_held(outcome: DigitsOutcome) -> None:
    for row in outcome.rows:
        assert row.memory is not None
        assert row.memory.gradients == row.memory.state == 4 * outcome.trainable_elements


def test_the_halves_of_the_data_are_five_classes_each_and_do_not_overlap() -> None:
    for first in (0, 5):
        data = digits.load_digits(first, torch.device("cpu"))
        assert set(data.train[1].tolist()) == set(data.test[1].tolist()) == set(range(5))
        assert data.train[0].shape[1:] == data.test[0].shape[1:] == (1, 8, 8)
        assert float(data.train[0].max()) == 1.0
    assert (
        sum(
            len(half[1])
            for first in (0, 5)
            for half in (
                digits.load_digits(first, torch.device("cpu")).train,
                digits.load_digits(first, torch.device("cpu")).test,
            )
        )
        == 1797
    )


def test_the_batches_are_the_same_for_whoever_asks() -> None:
    data = digits.load_digits(0, torch.device("cpu")).train
    first, again, other = (digits.batches(data, 2, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert sum(len(labels) for _, labels in first) == 2 * len(data[1])


@pytest.mark.parametrize("contestant", [OURS, REFERENCE, Contestant("all", "fused")])
def test_the_backbone_stays_as_it_was(contestant: Contestant) -> None:
    start = digits.DigitNet()
    start.backbone.requires_grad_(False)
    before = copy.deepcopy(start.state_dict())
    run = digits._start(contestant, start)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 5
    for _ in range(3):
        run.iterate(images, labels, torch.device("cpu"))
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone.")
    assert len(run.row.losses) == len(run.row.iteration) == 3


def test_without_scikit_learn_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(models.MissingPackageError, match="pip install scikit-learn"):
        digits.load_digits(0, torch.device("cpu"))
