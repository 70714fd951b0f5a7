"""torch_freeze: freeze parts of a PyTorch network, at no cost for what is frozen."""

from torch_freeze._build import BuildInfo, __version__, build_info
from torch_freeze.optim import FrozenAwareSGD

__all__ = [
    "BuildInfo",
    "FrozenAwareSGD",
    "__version__",
    "build_info",
]
