"""Optimizers that take all parameters once and pay nothing for frozen ones."""

from torch_freeze.optim.sgd import FrozenAwareSGD

__all__ = ["FrozenAwareSGD"]
