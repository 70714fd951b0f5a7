from typing import Any

from torch import Tensor

def sgd_step(
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    grad_scale: Tensor | float | None = None,
    found_inf: Tensor | float | None = None,
    done: list[tuple[int, list[Tensor]]] | None = None,
) -> list[tuple[int, list[Tensor]]] | None: ...
def zero_grad(param_groups: list[dict[str, Any]], set_to_none: bool = True) -> None: ...
def is_observed() -> bool: ...
