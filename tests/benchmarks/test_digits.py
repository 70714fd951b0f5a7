"""Fine-tuning on real images: everyone learns the same, with cached features as without."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pandas", reason="compare.py needs pandas: pip install pandas")
pytest.importorskip("tabulate", reason="compare.py needs tabulate: pip install tabulate")
pytest.importorskip("tqdm", reason="compare.py needs tqdm: pip install tqdm")
pytest.importorskip("matplotlib", reason="compare.py needs matplotlib: pip install matplotlib")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

import pandas
from torch_freeze_bench import checks, command, report
from torch_freeze_bench.contestants import FROZEN_AWARE, FUSED, REFERENCE, SGD, Contestant, select
from torch_freeze_bench.records import FACTS, OURS, Measured
from torch_freeze_bench.suites import digits, epochs

from tests.benchmarks.compare_cases import CPU, GPUS, fact, setting, widest
from torch_freeze import freeze_except


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


class TestEpochs:
    """The suite that trains with a frozen prefix, which FeatureCache skips or not."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = pytest.importorskip("torchvision.models", reason="it builds the networks")
        monkeypatch.setattr(epochs, "QUICK", epochs.Extent(16, 8, 8, 1, 2))
        block = models.resnet.BasicBlock
        for name, classes in (("resnet18", 5), ("resnet50", 1000)):
            build = partial(models.ResNet, block, [1, 1, 1, 1], num_classes=classes)
            small = dataclasses.replace(epochs.NETWORKS[name], build=build, size=32)
            monkeypatch.setitem(epochs.NETWORKS, name, small)
        epochs.pretrained.cache_clear()

    def test_the_command_prints_what_it_measured(self, capsys: pytest.CaptureFixture[str]) -> None:
        given = ["--device", "cpu", "--suite", "epochs", "--quick", "--steps", "3"]
        assert command.main(given) == 0
        printed = capsys.readouterr().out
        assert widest(printed) <= 80, [x for x in printed.splitlines() if len(x) > 80]
        assert "WRONG" not in printed
        read = pandas.read_csv(next(Path("compare-results").glob("*_epochs.csv")))
        values = {(r.workload, r.contestant, r.measure): r.value for r in read.itertuples()}
        everyone = {"filter/default", "ours", "by hand", "cached"}
        for workload, found in (
            ("resnet18/half", everyone),
            ("resnet18/schedule", {"all/default", "ours", "cached"}),
            ("resnet50/head/iteration", everyone | {"filling"}),
        ):
            assert {c for w, c, _ in values if w == workload} - {FACTS} == found
            for key in found - {"filter/default", "all/default"}:
                assert float(values[workload, key, "difference"]) == 0
        losses = values["resnet18/half", "cached", "loss"].split()
        assert len(losses) == 2 * 16 // 8
        assert losses == values["resnet18/half", "filter/default", "loss"].split()
        (row,) = [line for line in printed.splitlines() if re.match("cached .*bits", line)][:1]
        assert f"{float(losses[-1]):.4f}" in row
        # Half of the network's features, in float32, and a flag for each sample.
        stored = float(values["resnet18/half", "cached", "features"])
        assert stored == 16 * (4 * 128 * 8 * 8 + 8 + 1)

    def test_another_result_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = epochs.Cached.scores

        def wrong(self: epochs.Cached, order: list[int]) -> Any:
            for scores, labels in right(self, order):
                yield 1.1 * scores, labels

        monkeypatch.setattr(epochs.Cached, "scores", wrong)
        found = epochs.run_digits(setting(quick=True), "resnet18", "half")
        assert report.unequal([found], SGD) == [f"cached on {found.title}"]
        (line,) = [t for t in epochs.reached([found]) if "losses and weights" in t.case]
        assert (line.status, line.target) == ("missed", "<= 0")

    @pytest.mark.parametrize(
        ("name", "cut"), [(n, c) for n in ("resnet18", "vit") for c in epochs.NETWORKS[n].trains]
    )
    def test_a_network_cut_by_hand_computes_the_same(self, name: str, cut: str) -> None:
        network = epochs.NETWORKS[name]
        torch.manual_seed(0)
        model = network.build()
        trains = network.trains[cut]
        freeze_except(model, *trains)
        prefix, suffix = network.cut(cut, model)
        images = torch.randn(4, 3, network.size, network.size)
        features = prefix(images)
        assert not features.requires_grad
        assert torch.equal(suffix(features), model(images))

    @pytest.mark.parametrize(
        ("filling", "cached", "share", "statuses"),
        [
            pytest.param(105.0, 52.0, 0.7, ["reached"] * 4, id="within the bounds"),
            pytest.param(106.0, 52.0, 0.7, ["missed", *["reached"] * 3], id="filling"),
            pytest.param(105.0, 56.0, 0.7, ["reached", "missed", *["reached"] * 2], id="cached"),
            pytest.param(105.0, 52.0, 0.8, [*["reached"] * 2, "missed", "reached"], id="gain"),
        ],
    )
    def test_figures_are_compared_with_their_targets(
        self, filling: float, cached: float, share: float, statuses: list[str]
    ) -> None:
        found = Measured("epochs", "made-up/half/iteration", "made-up", kind="iterations")
        times = {OURS: 100.0, epochs.FILLING: filling, epochs.CACHED: cached, epochs.BY_HAND: 50.0}
        for key, time in times.items():
            found.add(key, iteration=time)
        found.add(FACTS, share=share)
        found.compare(epochs.CACHED, 0.0, 1e-3)
        assert [line.status for line in epochs.reached([found])] == statuses

    def test_inexact_options_are_shown_and_not_judged(self) -> None:
        start, _ = epochs.pretrained("resnet18", epochs.QUICK, CPU)
        data = epochs.digits(5, 16, 8)
        found = Measured("epochs", "made-up", "made-up", kind="epochs")
        options = {"cached, bf16 stored": epochs.OPTIONS["cached, bf16 stored"]}
        network = epochs.NETWORKS["resnet18"]
        trains = network.trains["half"]
        epochs.run_all(
            found,
            setting(quick=True),
            start,
            data,
            lambda model: freeze_except(model, *trains) and None,
            lambda model: network.parts(model, trains),
            options,
        )
        (key,) = options
        assert (found.one(key, "difference") or 0) > 0
        assert not found.unequal(key)
        sizes = [found.one(k, "features") or 0 for k in (key, epochs.CACHED)]
        assert sizes[1] - sizes[0] == 16 * 2 * 128 * 8 * 8
