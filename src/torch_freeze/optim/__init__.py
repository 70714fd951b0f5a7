"""Optimizers that take all parameters once and spend nothing on frozen ones."""

from torch_freeze.optim.adam import FrozenAwareAdam, FrozenAwareAdamW
from torch_freeze.optim.sgd import FrozenAwareSGD

__all__ = ["FrozenAwareAdam", "FrozenAwareAdamW", "FrozenAwareSGD"]
