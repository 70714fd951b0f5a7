"""Steps for callgrind to count, each kind at two counts of parameters; see test_walk_cost.py.

Run under valgrind with the path of the library made from walk_cost_marks.c.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

from torch_freeze import FrozenAwareAdamW, FrozenAwareSGD

COUNTS = (100, 300)
SGD_KINDS = ("trainable", "trainable, no momentum", "frozen", "group")
ADAMW_KINDS = ("AdamW: trainable", "AdamW: trainable, amsgrad", "AdamW: frozen", "AdamW: group")
KINDS = (*SGD_KINDS, *ADAMW_KINDS)
ONE_LAUNCH = "momentum of bfloat16, in a state_dict too"


def count_launches(marks: ctypes.CDLL) -> None:
    """Step parameters whose narrow momentum lies side by side and is referred to from elsewhere."""
    params = [torch.nn.Parameter(torch.ones(64)) for _ in range(8)]
    optimizer = FrozenAwareSGD(params, lr=0.1, momentum=0.9, momentum_dtype=torch.bfloat16)
    side_by_side = torch.zeros(8, 64, dtype=torch.bfloat16)
    for p, buffer in zip(params, side_by_side, strict=True):
        optimizer.state[p]["momentum_buffer"] = buffer
        p.grad = torch.ones(64)
    saved = optimizer.state_dict()
    marks.start()
    optimizer.step()
    marks.stop(f"{ONE_LAUNCH}/{len(saved['state'])}".encode())


def count(marks: ctypes.CDLL, kind: str, number: int) -> None:
    """Step `number` one-element parameters of the kind, the third time to be counted."""
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(number)]
    if kind in ADAMW_KINDS:
        optimizer = FrozenAwareAdamW(params, lr=0.1, amsgrad="amsgrad" in kind)
    else:
        optimizer = FrozenAwareSGD(params, lr=0.1, momentum=0.0 if "no momentum" in kind else 0.9)
    if kind.endswith("group"):
        whole = optimizer.param_groups[0]
        optimizer.param_groups[:] = [whole | {"params": [p]} for p in params]
    for step in range(3):
        for p in params:
            p.grad = torch.ones(1)
        if kind.endswith("frozen") and step:
            for p in params:
                p.requires_grad_(False)
                p.grad = None
        if step == 2:
            marks.start()
        optimizer.step()
    marks.stop(f"{kind}/{number}".encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.disable()
    library = ctypes.CDLL(sys.argv[1])
    for kind in KINDS:
        for number in COUNTS:
            count(library, kind, number)
    count_launches(library)
