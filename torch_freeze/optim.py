"""FrozenAwareSGD: stock SGD that takes every parameter once and pays nothing for the frozen ones."""

from __future__ import annotations

from typing import Any

import torch


class FrozenAwareSGD(torch.optim.SGD):
    """Interim: stock's own step behind the frozen check, until the extension takes its place."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        else:
            loss = None
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    p.grad = None
        torch.optim.SGD.step(self)
        return loss
