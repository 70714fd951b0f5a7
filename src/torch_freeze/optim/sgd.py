"""FrozenAwareSGD: torch.optim.SGD that takes all parameters once and skips frozen ones."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _device_dtype_check_for_fused
from torch.optim.sgd import sgd

from torch_freeze._build import load_extension
from torch_freeze._state_names import SGD
from torch_freeze.optim import _stock
from torch_freeze.optim._base import FrozenAware, FrozenState

_C = load_extension()


class FrozenAwareSGD(FrozenAware, torch.optim.SGD):
    r"""`torch.optim.SGD` that takes all parameters once and skips those that are frozen.

    A parameter is frozen while its ``requires_grad`` is False. The optimizer reads that at every
    step, so you may freeze or unfreeze anything between any two steps; the optimizer needs no
    call. A frozen parameter never moves, whatever its gradient, its momentum or the weight decay.
    Its ``.grad`` is set to None and its momentum is kept. Everything else is as in
    `torch.optim.SGD`: arguments, defaults, errors, ``param_groups``, state and results.

    One call updates all tensors of all param groups, with one kernel launch per device and dtype
    on CUDA and one parallel region on the CPU. ``foreach=True``, ``foreach=False`` or
    ``fused=False`` select that implementation of torch's instead, which then skips frozen
    parameters too. Sparse and complex tensors, tensor subclasses, devices other than CPU and CUDA,
    and ``differentiable=True`` always use torch's own operators.

    Results are bit-identical to ``torch.optim.SGD(foreach=False)`` on the CPU for float32 and
    float64. bfloat16 and float16 are computed in float32 and rounded once, when stored.

    Args:
        params: all parameters, frozen or not; also param groups or (name, parameter) pairs, as
            for `torch.optim.SGD`.
        lr: learning rate; a float or a tensor of one element.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: L2 penalty.
        nesterov: use Nesterov momentum; needs a momentum and no dampening.
        maximize: maximize the objective instead of minimizing it.
        foreach: None for the fused kernels; True or False for torch's multi-tensor or
            single-tensor implementation.
        differentiable: let autograd differentiate through the step (torch's implementation).
        fused: None or True for the fused kernels; False for torch's other implementations.
        step_in_backward: apply gradients while backward runs, and free them at once. One
            ``backward()`` then makes one step. Whatever needs more than that raises an error; the
            documentation's page on memory lists it.
        bucket_mb: with ``step_in_backward``, MiB of gradients to collect before they are applied
            together. None means a tenth of the trainable parameters' gradients, but at most 4 MiB
            on the CPU and 32 MiB elsewhere. At its peak, gradient memory is one bucket and the
            largest gradient.
        clip_value: with ``step_in_backward``, clamp every element of a gradient to
            [-clip_value, clip_value], as `torch.nn.utils.clip_grad_value_` does.
        frozen_momentum: what becomes of a frozen parameter's momentum. ``"keep"`` keeps it, as
            torch does; ``"reset"`` lets it start from zero after unfreezing; ``"drop"`` does the
            same and frees its memory at the next `zero_grad` or `step` after freezing. It can also
            be set per param group.
        momentum_dtype: None for each parameter's own dtype, or `torch.bfloat16`. The latter is
            stored with stochastic rounding, which is off by less than `2**-7` of the value at
            each store and exact on average. For float32 and bfloat16 parameters. It can also be
            set per param group.
        momentum_seed: seed of that rounding. The one in the param group grows by one at each step.

    Raises:
        ValueError: a hyper-parameter is negative or otherwise invalid, with torch's message; at a
            step, a gradient or momentum buffer has another shape or device than its parameter.
        TypeError: a parameter is not a tensor; at a step, a momentum buffer has a type that
            cannot hold it.
        RuntimeError: options contradict each other, with torch's message; with
            ``step_in_backward``, gradients that cannot be applied in one step.

    An error raised by a step leaves parameters, gradients and state as they were.

    Results are those of `torch.optim.SGD
    <https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html>`_. For momentum see
    Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.

    Example:
        >>> import torch, torch_freeze
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> optimizer = torch_freeze.FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> _ = model[0].requires_grad_(False)  # frozen from here on
        >>> before = model[0].weight.clone()
        >>> model(torch.ones(3, 8)).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(model[0].weight, before)
        True
        >>> _ = model[0].requires_grad_(True)  # it trains again from the next backward on
    """

    _step_kernels = staticmethod(_C.sgd_step)
    _zero_grad_kernels = staticmethod(_C.sgd_zero_grad)
    _partial_steps = _C.sgd
    _state_names = SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        step_in_backward: bool = False,
        bucket_mb: float | None = None,
        clip_value: float | None = None,
        frozen_momentum: FrozenState = "keep",
        momentum_dtype: torch.dtype | None = None,
        momentum_seed: int = 0,
    ) -> None:
        self._configure(
            step_in_backward=step_in_backward,
            bucket_mb=bucket_mb,
            clip_value=clip_value,
            differentiable=differentiable,
            frozen_momentum=frozen_momentum,
            momentum_dtype=momentum_dtype,
            momentum_seed=momentum_seed,
        )
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,  # type: ignore[arg-type, unused-ignore]  # a Tensor since torch 2.12
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._prepare()

    def _check_stock(self, group: dict[str, Any], index: int, params: list[Tensor]) -> None:
        for p in params:
            sparse = p.grad is not None and p.grad.is_sparse
            if sparse and group["fused"]:
                raise RuntimeError("`_fused_sgd` does not support sparse gradients")
            if sparse and group["weight_decay"] != 0:
                raise RuntimeError(
                    f"FrozenAwareSGD.step: param_groups[{index}] has "
                    f"weight_decay={group['weight_decay']} and a parameter with a sparse gradient, "
                    "which SGD cannot decay; put such parameters into a group with weight_decay=0"
                )
            if group["fused"]:
                _device_dtype_check_for_fused(p)

    def _step_stock(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for part in self._parts(group, params):
            grads = [p.grad for p in part if p.grad is not None]
            has_momentum = group["momentum"] != 0
            buffers = [_buffer(self.state[p]) for p in part] if has_momentum else []
            foreach, fused = _stock.form(group, part, [*grads, *buffers])
            on_cpu = part[0].device.type == "cpu"
            multi_tensor = foreach or (foreach is None and fused is None and not on_cpu)
            plain = not group["weight_decay"] and not group["maximize"]
            if multi_tensor and group["nesterov"] and plain:
                # torch's multi-tensor form would write the momentum into .grad itself.
                grads = [g.clone() for g in grads]
            sgd(
                part,
                grads,
                buffers,
                has_sparse_grad=any(g.is_sparse for g in grads),
                foreach=foreach,
                fused=fused,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )
            for p, buffer in zip(part, buffers, strict=has_momentum):
                self.state[p]["momentum_buffer"] = buffer
                self.state[p].pop("momentum_stale", None)

    def _parts(self, group: dict[str, Any], params: list[Tensor]) -> list[list[Tensor]]:
        """Split parameters into runs that torch's fused form can take in one call, in order.

        That form assumes that it is the first step for all of its tensors or for none of them.
        """
        if not group["fused"] or group["momentum"] == 0:
            return [params]
        runs = itertools.groupby(params, lambda p: _buffer(self.state[p]) is None)
        return [list(run) for _, run in runs]


def _buffer(state: dict[str, Any]) -> Tensor | None:
    """The momentum buffer to continue from; None if momentum starts from zero."""
    buffer: Tensor | None = state.get("momentum_buffer")
    return None if state.get("momentum_stale") else buffer
