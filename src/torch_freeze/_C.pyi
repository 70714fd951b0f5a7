from collections.abc import Sequence
from typing import Any
from weakref import ReferenceType

from torch import Tensor

# (param, grad, momentum: addresses; numel; group; index in the group; fresh)
_Update = tuple[int, int, int, int, int, int, bool]
# (lr, momentum, dampening, weight_decay, nesterov, maximize, device_lr: address, it is double;
# rounding_seed)
_Group = tuple[float, float, float, float, bool, bool, int, bool, int]

def sgd_step(
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    grad_scale: Tensor | float | None = None,
    found_inf: Tensor | float | None = None,
    done: list[tuple[int, list[Tensor]]] | None = None,
    unless_observed: bool = False,
) -> Any: ...
def zero_grad(
    param_groups: list[dict[str, Any]], state: dict[Tensor, Any], set_to_none: bool = True
) -> None: ...
def is_observed() -> bool: ...
def has_accumulator_hook(param: Tensor) -> bool: ...

class BackwardStep:
    def __init__(
        self,
        optimizer: ReferenceType[Any],
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

def _kernel_on_host_step(
    updates: Sequence[_Update],
    groups: Sequence[_Group],
    dtypes: tuple[str, str, str],
    resident: int,
    *,
    grad_scale: int = 0,
    found_inf: int = 0,
    backwards: bool = False,
    stochastic: bool = False,
    chosen: Sequence[int] | None = None,
) -> list[dict[str, int]]: ...
def _kernel_on_host_accesses(
    updates: Sequence[_Update],
    groups: Sequence[_Group],
    dtypes: tuple[str, str, str],
    resident: int,
    chosen: Sequence[int] | None = None,
    *,
    grad_scale: int = 0,
    stochastic: bool = False,
) -> list[tuple[int, int, int, bool]]: ...
def _kernel_on_host_capacities(
    dtypes: tuple[str, str, str], groups: int, *, stochastic: bool = False
) -> list[tuple[int, int]]: ...
def _cpu_kernel_step(
    updates: Sequence[_Update],
    groups: Sequence[_Group],
    dtypes: tuple[str, str, str],
    *,
    grad_scale: int = 0,
    found_inf: int = 0,
    stochastic: bool = False,
) -> None: ...
