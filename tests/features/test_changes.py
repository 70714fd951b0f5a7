"""FeatureCache when the model changes: norms that train, schedules, modes, hooks and values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_freeze import FeatureCache, freeze, gradual_unfreeze


def network() -> nn.Sequential:
    """Three blocks with batch norms, one of which has no parameters."""
    torch.manual_seed(0)

    def block(channels: int, affine: bool = True) -> nn.Sequential:
        norm = nn.BatchNorm2d(4, affine=affine)
        return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), norm, nn.ReLU())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(block(2), block(4, affine=False), block(4), head)


def samples(count: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 2, 6, 6, generator=generator)
    return TensorDataset(images, torch.arange(count) % 3)


@pytest.mark.parametrize("on_change", ["raise", "refill"])
def test_a_schedule_that_releases_norms_trains_as_without_the_cache(on_change: Any) -> None:
    results: list[tuple[list[Tensor], dict[str, Tensor]]] = []
    skipped: list[tuple[str, ...]] = []
    for cached in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        schedule = gradual_unfreeze(model, ["0", "1", "2", "3"], every=2)
        schedule.step()
        features = FeatureCache(model, samples(), on_change=on_change) if cached else None
        losses = []
        for epoch in range(8):
            if epoch:
                schedule.step()
            order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch)).tolist()
            data = samples() if features is None else features.dataset
            with warnings.catch_warnings():
                # The last epochs train everything.
                warnings.filterwarnings("ignore", "FeatureCache: .* forward is whole")
                for inputs, targets in DataLoader(data, 8, sampler=order):
                    scores = model(inputs) if features is None else features(inputs)
                    loss = nn.functional.cross_entropy(scores, targets)
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    losses.append(loss.detach())
            if features is not None:
                skipped.append(features.boundary)
        results.append((losses, model.state_dict()))
    (whole, expected), (losses, weights) = results
    assert all(map(torch.equal, losses, whole))
    assert [k for k, v in weights.items() if not torch.equal(v, expected[k])] == []
    assert len(set(skipped[::2])) == 4
    assert skipped[::2] == skipped[1::2]
    assert skipped[-1] == ()


class Doubled(nn.Module):
    """Twice its input in train mode."""

    def forward(self, value: Tensor) -> Tensor:
        return value * (2.0 if self.training else 1.0)


def add_one(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output + 1


@pytest.mark.parametrize("old", ["delete", "keep"])
@pytest.mark.parametrize("folder", ["memory", "disk"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda prefix: prefix.eval(), id="mode"),
        pytest.param(lambda prefix: prefix.register_forward_hook(add_one), id="hook"),
        pytest.param(lambda prefix: nn.init.ones_(prefix[0].weight), id="values"),
    ],
)
def test_a_refill_uses_nothing_that_was_stored_before_the_change(
    change: Callable[[Any], Any], folder: str, old: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), Doubled()), nn.Linear(8, 2))
    freeze(model, "0")
    data = TensorDataset(torch.randn(16, 8), torch.arange(16))
    path = tmp_path if folder == "disk" else None
    features = FeatureCache(model, data, path, on_change="refill", old=old, spot_check=0)
    before = [features(inputs) for inputs, _ in DataLoader(features.dataset, 8)]
    change(model[0])
    for epoch in range(2):
        for n, (inputs, rows) in enumerate(DataLoader(features.dataset, 8)):
            found = features(inputs)
            assert torch.equal(found, model(data.tensors[0][rows]))
            assert not torch.equal(found, before[n])
            assert features.stored == (16 if epoch else 8 * (n + 1))


def test_where_a_changed_prefix_cannot_be_stored_forward_is_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    freeze(model, "0", "1")
    data = TensorDataset(torch.randn(16, 8), torch.arange(16))
    features = FeatureCache(model, data, on_change="refill", spot_check=0)
    for inputs, _ in DataLoader(features.dataset, 8):
        features(inputs)
    freeze(model, "1", hold_norm=False)  # its output now depends on the other samples of a batch
    (first, _), second = DataLoader(features.dataset, 8)
    with pytest.warns(UserWarning, match="forward is whole"):
        features(first)
    assert features.boundary == ()
    for inputs, rows in [second, *DataLoader(features.dataset, 8)]:
        assert torch.equal(features(inputs), model(data.tensors[0][rows]))
