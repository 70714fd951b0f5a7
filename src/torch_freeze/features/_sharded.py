"""What FSDP shards: the part that trains may be, what runs before the boundary may not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torch_freeze import _format


def _fsdp(name: str) -> Any:
    """A class of torch.distributed.fsdp, whose import is slow and was done where it is used."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def check_wrappers(model: nn.Module) -> None:
    """Refuse FSDP1, which replaces the parameters of what it wraps by one."""
    if any(isinstance(m, _fsdp("FullyShardedDataParallel")) for m in model.modules()):
        raise ValueError(
            "FeatureCache: the model has a part in FullyShardedDataParallel (FSDP1). Use "
            "torch.distributed.fsdp.fully_shard on the modules that train."
        )


def has_shards(model: nn.Module) -> bool:
    """Whether a module is sharded by FSDP2."""
    return any(isinstance(m, _fsdp("FSDPModule")) for m in model.modules())


def why_refused(
    modules: Mapping[str, nn.Module],
    skipped: Iterable[nn.Module],
    boundary: Iterable[nn.Module],
    tensors: Mapping[str, torch.Tensor],
) -> str:
    """Why features cannot be computed of a model with shards; "" if they can.

    Args:
        modules: all of the model, by name.
        skipped: the modules of the prefix.
        boundary: the modules whose calls are skipped, or get something stored.
        tensors: parameters and buffers of the prefix.
    """
    inside, ends = set(map(id, skipped)), set(map(id, boundary))
    found = []
    for name, module in modules.items():
        if not isinstance(module, _fsdp("FSDPModule")):
            continue
        # What takes something stored may be sharded itself: a pass for features ends before it.
        below = {id(m) for m in module.modules()} - {id(module)}
        if id(module) in inside or below & ends:
            found.append(name or "the model")
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    found = found or [name for name, tensor in tensors.items() if isinstance(tensor, kind)]
    if not found:
        return ""
    return (
        f"FeatureCache: {_format.listed(found)} is sharded and has to run before the features are "
        "there. All processes have to gather shards at the same time, and each runs the frozen "
        "prefix only for samples that have no features yet. Shard the modules that train, each "
        "by itself: fully_shard(model.layer4), not fully_shard(model)."
    )


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Leave FSDP2's modules with the parameters that they have between iterations.

    After a pass without a backward one they would keep the gathered ones, which an optimizer that
    is made next would get.
    """
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, _fsdp("FSDPModule")):
                module.reshard()
