"""Tiny models that several test files freeze, and what the files look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def norm_net() -> Any:
    """3 -> 4 features, a batch norm, 4 -> 2."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def chain(layers: int = 4, norm: bool = False) -> Any:
    """Linear layers of 4 features; the norm, if any, comes after the first."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    return model.insert(1, nn.BatchNorm1d(4)) if norm else model


def trains(model: nn.Module) -> list[bool]:
    """For each linear layer, in order, whether it trains."""
    return [m.weight.requires_grad for m in model.modules() if isinstance(m, nn.Linear)]


class Recurrent(nn.Module):
    """An embedding of 20 words, a recurrent layer of the given kind and a head."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.cell = kind(4, 8, batch_first=True, **options)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(self.embed(x))[0])
        return out


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
