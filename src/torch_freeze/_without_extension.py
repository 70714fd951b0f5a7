"""Replaces the compiled module with Python: the functions of ``_C.pyi`` that the optimizer needs.

This module decides what to update; every update goes through torch's own functional form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._build import without_extension
from ._state_names import ADAM, SGD, StateNames

_Params = list[tuple[int, list[Tensor]]]


class _Kernels:
    """The functions of one optimizer."""

    def __init__(self, optimizer: str, names: StateNames) -> None:
        self._step_name, self._names = f"{optimizer}.step", names

    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        grad_scale: Any = None,
        found_inf: Any = None,
        done: _Params | None = None,
        unless_observed: bool = False,
    ) -> Any:
        """Return the parameters to step, all with torch's form; called again when that is done."""
        names = self._names
        if unless_observed and is_observed():
            return NotImplemented
        if done is None:
            self._check_policies(param_groups)
            rest = [(i, self._to_step(i, group, state)) for i, group in enumerate(param_groups)]
            if any(params for _, params in rest):
                return [(i, params) for i, params in rest if params]
        for group in param_groups:
            for p in _frozen(group):
                p.grad = None
            policy = group.get(names.policy, "keep")
            if policy == "reset":
                for p in _frozen(group):
                    entry = state.get(p, {})
                    if any(entry.get(name) is not None for name in names.all):
                        entry[names.stale] = True
            elif policy == "drop":
                self._drop_state(group, state)
        return None

    def zero_grad(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any], set_to_none: bool = True
    ) -> None:
        """Reset all gradients, and free the state of frozen parameters where that is asked for."""
        for group in param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if set_to_none:
                    p.grad = None
                    continue
                if p.grad.grad_fn is not None:
                    p.grad.detach_()
                else:
                    p.grad.requires_grad_(False)
                p.grad.zero_()
            if group.get(self._names.policy) == "drop":
                self._drop_state(group, state)

    def _check_policies(self, param_groups: list[dict[str, Any]]) -> None:
        option = self._names.policy
        for index, group in enumerate(param_groups):
            policy = group.get(option, "keep")
            if policy not in ("keep", "reset", "drop"):
                raise ValueError(
                    f"{self._step_name}: {option} of param_groups[{index}] is {policy!r}; it has "
                    "to be 'keep', 'reset' or 'drop'"
                )

    def _drop_state(self, group: dict[str, Any], state: dict[Tensor, Any]) -> None:
        for p in _frozen(group):
            entry = state.get(p)
            if entry is not None:
                for name in (*self._names.all, self._names.stale):
                    entry.pop(name, None)
                if not entry:
                    del state[p]

    def _to_step(self, index: int, group: dict[str, Any], state: dict[Tensor, Any]) -> list[Tensor]:
        """Trainable parameters with a gradient; raises before anything is written."""
        found = []
        for position, p in enumerate(group["params"]):
            if not p.requires_grad or p.grad is None:
                continue
            place = f"param_groups[{index}]['params'][{position}]"
            entry = state.get(p, {})
            tensors = {name: entry.get(name) for name in self._names.all}
            for what, tensor in {"the gradient": p.grad, **tensors}.items():
                if tensor is None:
                    continue
                if not isinstance(tensor, Tensor):
                    raise TypeError(
                        f"{self._step_name}: {what} of {place} is a {type(tensor).__name__}; it "
                        "must be a tensor or None"
                    )
                plain = p.layout is torch.strided and not p.is_nested
                plain &= what != self._names.counter
                if plain and (tensor.shape != p.shape or tensor.device != p.device):
                    raise ValueError(
                        f"{self._step_name}: {what} of {place} has shape {list(tensor.shape)} on "
                        f"{tensor.device}; the parameter has {list(p.shape)} on {p.device}. Set it "
                        "to None, or give it the parameter's shape and device."
                    )
            found.append(p)
        return found


_sgd = _Kernels("FrozenAwareSGD", SGD)
_adam = _Kernels("FrozenAwareAdam", ADAM)
_adamw = _Kernels("FrozenAwareAdamW", ADAM)
sgd_step, sgd_zero_grad = _sgd.step, _sgd.zero_grad
adam_step, adam_zero_grad = _adam.step, _adam.zero_grad
adamw_step, adamw_zero_grad = _adamw.step, _adamw.zero_grad

sgd = adam = adamw = None
"""Stand for the optimizers where steps in backward are made, which need the compiled module."""


def is_observed() -> bool:
    """Whether a profiler records. It is always assumed, because a stock step always records."""
    return True


def has_accumulator_hook(param: Tensor) -> bool:
    """Whether DistributedDataParallel reduces the gradient of `param`, which Python cannot see.

    This assumes that nothing changed since it wrapped the model, so it never causes a warning.
    """
    return param.requires_grad


class BackwardStep:
    """Steps in backward, which need the compiled module."""

    def __init__(
        self, optimizer: Any, steps: None, bucket_bytes: int | None, clip_value: float | None
    ) -> None:
        raise RuntimeError(
            f"step_in_backward=True needs the compiled module. {without_extension()}"
        )

    @staticmethod
    def check_free(param_groups: list[dict[str, Any]], first: int) -> None:
        """Do nothing: no optimizer can step parameters in backward here."""


def _frozen(group: dict[str, Any]) -> Iterator[Tensor]:
    return (p for p in group["params"] if not p.requires_grad)
