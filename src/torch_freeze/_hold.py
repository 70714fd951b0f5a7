"""Holding batch-norm-like layers of frozen modules in eval behaviour.

How, and why this way. A held layer has `training = False` and, in its instance `__dict__`, a small
callable named `train` in place of the class's method. `Module.train()` of any parent calls
`child.train(mode)`, finds the callable, which notes the mode as the layer's own and leaves
`training` False. So:

- the forward is the class's own, reading the attribute it always reads: no hook, no wrapper, no
  cost, and torch.compile, torch.export and fused inference code see an ordinary eval-mode layer;
- the layer keeps its type and identity, its parameters and its state_dict keys;
- deepcopy and pickle copy `__dict__`, and with it the hold. The callable is an instance of an
  importable class that refers to its layer: both memoise the layer before its `__dict__`, so the
  copy's callable refers to the copy. (An overriding bound method would pickle as "the attribute
  `train` of the layer" and come back as the class's own; a lambda would not pickle at all.)

Rejected: momentum 0 and track_running_stats False (both normalise by the batch), a forward pre-hook
(a cost per call, and bypassed by code that reads `training`), a class made per instance (breaks
`type(m) is nn.BatchNorm2d` and pickle), patching `Module.train` (global; lost where torch_freeze is
not imported). The limits: `layer.training = True` written directly is not caught here (audit names
it, a second freeze mends it), and a conversion that builds new layers, such as
SyncBatchNorm.convert_sync_batchnorm, builds them without the hold: convert first, then freeze.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


class HeldTrain:
    """Stands in for `layer.train` while the layer is held; remembers the layer's own mode."""

    __slots__ = ("layer", "mode", "shadowed")

    def __init__(self, layer: nn.Module, mode: bool, shadowed: Any) -> None:
        self.layer = layer
        self.mode = mode
        self.shadowed = shadowed

    def __call__(self, mode: bool = True) -> nn.Module:
        """Note `mode`, pass it to modules inside the layer, and stay in eval behaviour."""
        # The class's own train, so that children (activations of a fused norm) and what a
        # subclass adds follow, and so that a wrong mode raises as ever.
        if self.shadowed is None:
            type(self.layer).train(self.layer, mode)
        else:
            self.shadowed(mode)
        self.mode = mode
        self.layer.training = False
        return self.layer


def is_norm(module: nn.Module) -> bool:
    """Whether `module` updates running statistics, or a spectral norm's vectors, in training.

    torch's batch and instance norms (SyncBatchNorm, lazy ones and subclasses included) count when
    they track statistics, and so does spectral norm. Any other module counts when it owns a buffer
    named `running_…`, the convention third-party norms follow; LayerNorm and GroupNorm have none
    and never count.
    """
    buffers = module._buffers
    if not buffers:
        return False
    if isinstance(module, _NormBase):
        return buffers.get("running_mean") is not None
    if is_spectral_norm(module):
        return True
    for name, buffer in buffers.items():
        if name.startswith("running_") and buffer is not None:
            return True
    return False


def is_spectral_norm(module: nn.Module) -> bool:
    """Whether `module` is torch's spectral norm, or a layer that has it by the older hook."""
    if isinstance(module, _SpectralNorm):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def held_by(module: nn.Module) -> HeldTrain | None:
    """The hold on `module`, or None."""
    held = module.__dict__.get("train")
    return held if isinstance(held, HeldTrain) else None


def hold(module: nn.Module) -> bool:
    """Hold `module`; True if it was not held before. Holding again mends a direct write."""
    fresh = held_by(module) is None
    if fresh:
        shadowed = module.__dict__.get("train")
        # Written to __dict__ itself: a subclass's __setattr__ has no say in it.
        module.__dict__["train"] = HeldTrain(module, module.training, shadowed)
    module.training = False
    return fresh


def release(module: nn.Module) -> bool:
    """End the hold and restore the layer's own mode; True if it was held."""
    held = held_by(module)
    if held is None:
        return False
    if held.shadowed is None:
        del module.__dict__["train"]
    else:
        module.__dict__["train"] = held.shadowed
    module.training = held.mode
    return True
