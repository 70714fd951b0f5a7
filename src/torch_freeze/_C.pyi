from typing import Any
from weakref import ReferenceType

from torch import Tensor

def sgd_step(
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    grad_scale: Tensor | float | None = None,
    found_inf: Tensor | float | None = None,
    done: list[tuple[int, list[Tensor]]] | None = None,
    unless_observed: bool = False,
) -> Any: ...
def sgd_zero_grad(
    param_groups: list[dict[str, Any]], state: dict[Tensor, Any], set_to_none: bool = True
) -> None: ...

adam_step = sgd_step
adam_zero_grad = sgd_zero_grad
adamw_step = sgd_step
adamw_zero_grad = sgd_zero_grad

sgd: OptimizerSteps
adam: OptimizerSteps
adamw: OptimizerSteps

def is_observed() -> bool: ...
def has_accumulator_hook(param: Tensor) -> bool: ...

class OptimizerSteps: ...

class BackwardStep:
    def __init__(
        self,
        optimizer: ReferenceType[Any],
        steps: OptimizerSteps,
        bucket_bytes: int | None,
        clip_value: float | None,
    ) -> None: ...
    def attach(self, param_groups: list[dict[str, Any]]) -> None: ...
    def check_step(
        self, param_groups: list[dict[str, Any]], grad_scale: Any, found_inf: Any
    ) -> None: ...
    def end_step(self, param_groups: list[dict[str, Any]]) -> None: ...
    def check_zero_grad(self, set_to_none: bool) -> None: ...
    def check_between_steps(self, function: str) -> None: ...
    def close(self) -> None: ...
    @staticmethod
    def check_free(param_groups: list[dict[str, Any]], first: int) -> None: ...
    @property
    def bucket_bytes(self) -> int: ...
