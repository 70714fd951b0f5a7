"""FeatureCache beside norms that train: schedules release them, and planning leaves them alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_freeze import FeatureCache, freeze_except, gradual_unfreeze


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


def test_making_a_cache_leaves_running_statistics_as_they_were() -> None:
    model = network()
    freeze_except(model, "2", "3")
    before = copy.deepcopy(model.state_dict())
    FeatureCache(model, samples())
    assert model[2][1].training
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == []


@pytest.mark.parametrize("on_change", ["raise", "refill"])
def test_a_schedule_that_releases_norms_trains_as_without_the_cache(on_change: str) -> None:
    results: list[tuple[list[Tensor], dict[str, Tensor]]] = []
    skipped: list[tuple[str, ...]] = []
    for cached in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        schedule = gradual_unfreeze(model, ["0", "1", "2", "3"], every=2)
        schedule.step()
        features = FeatureCache(model, samples(), on_change=on_change) if cached else None  # type: ignore[arg-type]
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
