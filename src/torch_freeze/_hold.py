"""Holding batch-norm-like layers of frozen modules in eval behaviour.

A held layer has `training = False` and, in its instance `__dict__`, a small callable named `train`
that hides the class's method. `Module.train()` of any parent calls `child.train(mode)` and so this
callable, which records the mode as the layer's own and leaves `training` False. The reasons:

- the forward is the class's own and reads `training` as always. There is no hook, no wrapper and
  no cost, and torch.compile, torch.export and fused inference code see an ordinary eval-mode layer;
- the layer keeps its type and identity, its parameters and its state_dict keys;
- deepcopy copies `__dict__` and with it the hold. The layer is memoized before its `__dict__`, so
  the copy's callable refers to the copy;
- pickle writes plain torch, which loads where torch_freeze is not installed. In place of the
  callable it stores the bound `train` of a stand-in: another object of the layer's class that
  shares the layer's parameters, buffers and children, and keeps the layer's own mode as its
  `training`. When it is called, it records the mode and passes it to the children, and the layer
  itself stays in eval behaviour. Only its return value is the stand-in instead of the layer, until
  torch_freeze looks at the layer and `held_by` restores the callable.

Alternatives that were rejected: momentum 0 and track_running_stats False (both normalize by the
batch), a forward pre-hook (it costs time per call, and code that reads `training` bypasses it), a
class made per instance (it breaks `type(m) is nn.BatchNorm2d` and pickle), and patching
`Module.train` (it is global, and lost where torch_freeze is not imported). There are two limits.
Writing `layer.training = True` directly is not prevented; audit reports it and a second freeze
repairs it. A conversion that builds new layers, such as SyncBatchNorm.convert_sync_batchnorm, loses
the hold: convert first, then freeze.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

# Key in a stand-in's `__dict__`, with the `train` that the user had put on the layer, or None.
_STAND_IN = "_torch_freeze_stand_in"


class HeldTrain:
    """Stands in for `layer.train` while the layer is held; remembers the layer's own mode."""

    # Pickles of earlier versions name this class and these slots.
    __slots__ = ("layer", "mode", "shadowed")

    def __init__(self, layer: nn.Module, mode: bool, shadowed: Any) -> None:
        self.layer = layer
        self.mode = mode
        self.shadowed = shadowed

    def __call__(self, mode: bool = True) -> nn.Module:
        """Record `mode`, pass it to modules inside the layer, and stay in eval behaviour."""
        # The class's own train lets children (activations of a fused norm) and subclasses follow,
        # and raises for a wrong mode.
        if self.shadowed is None:
            type(self.layer).train(self.layer, mode)
        else:
            self.shadowed(mode)
        self.mode = mode
        self.layer.training = False
        return self.layer

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldTrain:
        return HeldTrain(
            copy.deepcopy(self.layer, memo), self.mode, copy.deepcopy(self.shadowed, memo)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Not type(layer)(), because pickle does not call __init__ either.
        stand_in: nn.Module = object.__new__(type(self.layer))
        own = {key: value for key, value in vars(self.layer).items() if key != "train"}
        vars(stand_in).update(own, training=self.mode)
        vars(stand_in)[_STAND_IN] = self.shadowed
        return getattr, (stand_in, "train")


def is_norm(module: nn.Module) -> bool:
    """Whether `module` updates running statistics, or a spectral norm's vectors, in training.

    torch's batch and instance norms (including SyncBatchNorm, lazy norms and subclasses) count if
    they track statistics, and so does spectral norm. Any other module counts if it owns a buffer
    named `running_…`, which is the convention of third-party norms. LayerNorm and GroupNorm have no
    such buffer and never count.
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
    """Whether `module` is torch's spectral norm, or a layer with the older hook for it."""
    if isinstance(module, _SpectralNorm):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def held_by(module: nn.Module) -> HeldTrain | None:
    """The hold on `module`, or None. This restores the callable of an unpickled hold."""
    train = module.__dict__.get("train")
    if isinstance(train, HeldTrain):
        return train
    if train is None:
        if _STAND_IN not in module.__dict__:
            return None
        # The stand-in itself has replaced the layer, as after `self.norm = self.norm.eval()`.
        shadowed = module.__dict__.pop(_STAND_IN)
        held = HeldTrain(module, module.training, shadowed)
        module.training = False
    else:
        stand_in = train.__self__ if isinstance(train, MethodType) else None
        if not isinstance(stand_in, nn.Module) or _STAND_IN not in stand_in.__dict__:
            return None
        held = HeldTrain(module, stand_in.training, stand_in.__dict__[_STAND_IN])
    module.__dict__["train"] = held
    return held


def hold(module: nn.Module) -> bool:
    """Hold `module`; True if it was not held before. This also repairs a written `training`."""
    fresh = held_by(module) is None
    if fresh:
        shadowed = module.__dict__.get("train")
        # Written to __dict__ directly, past a subclass's __setattr__.
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
