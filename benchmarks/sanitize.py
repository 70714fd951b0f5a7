"""A short run of the CUDA step for compute-sanitizer, which slows every access down.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py

Every dtype, every kind of misalignment, more tensors than one launch takes, and the scaled step
with and without an overflow. Results are checked elsewhere; here only the accesses count.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_freeze import FrozenAwareAdamW, FrozenAwareSGD

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The last tile of 4096 elements that begin one element in holds less than a vector.
SIZES = (1, 7, 127, 128, 129, 4096, 4099)


def sgd(momentum: float = 0, weight_decay: float = 0) -> Make:
    """Makes SGD."""
    return lambda params: FrozenAwareSGD(
        params, lr=0.1, momentum=momentum, weight_decay=weight_decay
    )


def adamw(*, fused: bool | None) -> Make:
    """Makes AdamW with all of its state; the counts of updates lie on the device if `fused`."""
    return lambda params: FrozenAwareAdamW(params, amsgrad=True, fused=fused)


def steps(params: Sequence[Tensor], grads: Sequence[Tensor], make: Make) -> None:
    """A first step, a steady one, a scaled one and one that overflowed."""
    optimizer = make(list(params))
    for found_inf in (None, None, 0.0, 1.0):
        if found_inf is not None:  # as GradScaler.step hands them over
            scaling = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(found_inf)}
            for name, value in scaling.items():
                setattr(optimizer, name, value.to(params[0].device))
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()


# More tensors than the largest table of kernel parameters holds.
TWO_LAUNCHES = ((sgd(momentum=0.9), 1100), (adamw(fused=True), 600))


def run(device: str) -> None:
    """All cases on `device`."""
    for dtype in DTYPES:
        for offset in range(9):
            params = []
            grads = []
            for numel in SIZES:
                # Each array is an allocation of its own, so that a byte past it is a byte too many.
                flat = torch.ones(numel + offset, device=device, dtype=dtype)
                params.append(torch.nn.Parameter(flat[offset:]))
                grads.append(
                    torch.ones(numel + 8 - offset, device=device, dtype=dtype)[8 - offset :]
                )
            steps(params, grads, sgd(momentum=0.9, weight_decay=0.01))
            steps(
                params, grads, sgd()
            )  # where no momentum lies otherwise, gradients move in vectors
            steps(params, grads, adamw(fused=None))
            steps(params, grads, adamw(fused=True))
    for make, count in TWO_LAUNCHES:
        params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(count)]
        params[0].requires_grad_(False)
        steps(params, [torch.ones_like(p) for p in params], make)


def main() -> int:
    """Run on the GPU; without one say so and return 2."""
    # Allocations of the driver's own, with ends that memcheck knows.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if not torch.cuda.is_available():
        print("sanitize.py: torch finds no CUDA device", file=sys.stderr)
        return 2
    run("cuda")
    torch.cuda.synchronize()
    print(f"sanitize.py: all cases ran on {torch.cuda.get_device_name()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
