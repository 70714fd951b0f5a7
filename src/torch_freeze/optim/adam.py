"""FrozenAwareAdam and FrozenAwareAdamW: torch's Adam and AdamW that skip frozen parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT, _device_dtype_check_for_fused, _get_scalar_dtype

from torch_freeze._build import load_extension
from torch_freeze.optim import _stock, _strategy
from torch_freeze.optim._base import FrozenAware, FrozenState

_C = load_extension()

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class _Adam(FrozenAware):
    """What Adam and AdamW share here."""

    _frozen_state_option = "frozen_state"

    def _check_own_options(self, options: dict[str, Any]) -> None:
        self._check_frozen_state(options)

    def _check_stock(self, group: dict[str, Any], index: int, params: list[Tensor]) -> None:
        for p in params:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    "Adam does not support sparse gradients, please consider SparseAdam instead"
                )
            if group["fused"]:
                _device_dtype_check_for_fused(p)

    def _step_stock(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self._ready(group, p) for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        moments = [[state[name] for state in states if name in state] for name in _MOMENTS]
        foreach, fused = _stock.form(group, params, [*grads, *moments[0], *moments[1]])
        beta1, beta2 = group["betas"]
        adam(
            params,
            grads,
            moments[0],
            moments[1],
            moments[2] if group["amsgrad"] else [],
            [state["step"] for state in states],
            foreach=foreach,
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=fused,
            has_complex=any(map(torch.is_complex, params)),
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )

    def _ready(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """The state of a parameter: made if there is none, from zero on if it is marked so."""
        state: dict[str, Any] = self.state[param]
        on_device = bool(group["capturable"] or group["fused"])
        if "step" not in state:
            state["step"] = torch.zeros(
                (),
                dtype=_get_scalar_dtype(is_fused=group["fused"]),
                device=param.device if on_device else "cpu",
            )
        stale = state.pop("state_stale", False)
        if stale:
            state["step"].zero_()
        for name in _MOMENTS[: 3 if group["amsgrad"] else 2]:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            elif stale:
                state[name].zero_()
        return state


class FrozenAwareAdamW(_Adam, torch.optim.AdamW):
    r"""`torch.optim.AdamW` that takes all parameters once and skips those that are frozen."""

    _step_kernels = staticmethod(_C.adamw_step)
    _zero_grad_kernels = staticmethod(_C.adamw_zero_grad)
    _partial_steps = _C.adamw

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        step_in_backward: bool = False,
        bucket_mb: float | None = None,
        clip_value: float | None = None,
        frozen_state: FrozenState = "keep",
    ) -> None:
        backward = _strategy.check_options(step_in_backward, bucket_mb, clip_value, differentiable)
        self._configure({"frozen_state": frozen_state} if frozen_state != "keep" else {}, backward)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._prepare()


class FrozenAwareAdam(_Adam, torch.optim.Adam):
    r"""`torch.optim.Adam` that takes all parameters once and skips those that are frozen."""

    _step_kernels = staticmethod(_C.adam_step)
    _zero_grad_kernels = staticmethod(_C.adam_zero_grad)
    _partial_steps = _C.adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        step_in_backward: bool = False,
        bucket_mb: float | None = None,
        clip_value: float | None = None,
        frozen_state: FrozenState = "keep",
    ) -> None:
        backward = _strategy.check_options(step_in_backward, bucket_mb, clip_value, differentiable)
        self._configure({"frozen_state": frozen_state} if frozen_state != "keep" else {}, backward)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._prepare()
