"""What all optimizers share for parameters that no kernel takes and torch's own form updates."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torch_freeze._build import build_info, without_extension

BUILT = build_info()


def form(
    group: dict[str, Any], params: list[Tensor], others: Iterable[Tensor | None]
) -> tuple[bool | None, bool | None]:
    """Choose ``foreach`` and ``fused`` for torch's functional form of some parameters of a group.

    They are the group's own unless the device has no kernels here, or a tensor is not contiguous:
    torch's fused form on the CPU reads such tensors as if they were and gives wrong results.
    """
    device = params[0].device
    foreach, fused = group["foreach"], group["fused"]
    kernels_wanted = bool(fused) or (foreach is None and fused is None)
    if kernels_wanted and not _has_kernels(device):
        foreach, fused = device.type == "cuda", False
    if fused and not all(t.is_contiguous() for t in (*params, *others) if t is not None):
        fused = False
    return foreach, fused


def unscale(param: Tensor, grad_scale: Any) -> None:
    """Divide the gradient in place, or replace it if it is expanded and cannot be written to."""
    grad = param.grad
    if grad is None:
        return
    scale = torch.as_tensor(grad_scale, device=grad.device)
    if grad.layout is torch.strided and torch._debug_has_internal_overlap(grad) == 1:
        param.grad = grad / scale
    else:
        grad.div_(scale)


def _has_kernels(device: torch.device) -> bool:
    if device.type == "cuda" and BUILT.compiled and not BUILT.cuda:
        _warn_cpu_only()
        return False
    return BUILT.compiled


@functools.cache
def _warn_cpu_only() -> None:
    warnings.warn(
        "torch_freeze was built without CUDA code, so CUDA tensors are updated by torch's own "
        "foreach operators. Rebuild it where an nvcc of torch's CUDA version is installed: "
        "USE_CUDA=1 pip install --force-reinstall --no-deps --no-build-isolation "
        "<folder of torch_freeze's source>",
        RuntimeWarning,
        stacklevel=6,
    )


@functools.cache
def warn_not_compiled(name: str) -> None:
    """Warn once that an optimizer has no kernels."""
    warnings.warn(
        f"{name} uses torch's own operators, with the same results at their speed. "
        f"{without_extension()}",
        RuntimeWarning,
        stacklevel=4,
    )
