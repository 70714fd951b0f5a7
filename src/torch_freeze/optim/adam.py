"""FrozenAwareAdam and FrozenAwareAdamW: torch's Adam and AdamW that skip frozen parameters."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import (
    ParamsT,
    _device_dtype_check_for_fused,
    _get_capturable_supported_devices,
    _get_scalar_dtype,
)

from torch_freeze._build import load_extension
from torch_freeze._state_names import ADAM
from torch_freeze.optim import _stock
from torch_freeze.optim._base import FrozenAware, FrozenState

_C = load_extension()


class _Adam(FrozenAware):
    """What Adam and AdamW share here."""

    _state_names = ADAM

    def _check_stock(self, group: dict[str, Any], index: int, params: list[Tensor]) -> None:
        self._check_numbers(group, index)
        for p in params:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    "Adam does not support sparse gradients, please consider SparseAdam instead"
                )
            if group["fused"]:
                _device_dtype_check_for_fused(p)
            self._check_state(group, index, p)

    def _check_numbers(self, group: dict[str, Any], index: int) -> None:
        """Raise for numbers that torch's form finds wrong when it has written something."""
        where = f"{type(self).__name__}.step: param_groups[{index}]"
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"{where} has betas={betas!r}; they must be two numbers")
        numbers = {"betas[0]": betas[0], "betas[1]": betas[1]}
        numbers |= {key: group[key] for key in ("lr", "eps", "weight_decay")}
        for name, value in numbers.items():
            tensor = isinstance(value, Tensor)
            if not (tensor or isinstance(value, Real)) or (tensor and value.is_complex()):
                raise TypeError(f"{where} has {name}={value!r}; it must be a real number")
            if tensor and (value.numel() != 1 or value.is_meta):
                raise ValueError(
                    f"{where} has a tensor of {value.numel()} elements on {value.device} for "
                    f"{name}; it must have one, and a value"
                )
            if name[0] == "b" and not tensor and (value < 0 or value >= 1):
                raise ValueError(f"{where} has {name}={value!r}; it must be at least 0 and below 1")
            in_python = tensor and name[0] in "bl" and not group["capturable"]
            if group["foreach"] and in_python:
                raise RuntimeError(
                    f"{where}: {name} as a Tensor is not supported for capturable=False and "
                    "foreach=True"
                )

    def _check_state(self, group: dict[str, Any], index: int, param: Tensor) -> None:
        """Raise for a state that torch's form finds wrong when it has written something."""
        position = next(i for i, p in enumerate(group["params"]) if p is param)
        place = f"param_groups[{index}]['params'][{position}]"
        where, delete = f"{type(self).__name__}.step", "delete the parameter's entry from the state"
        state = self.state.get(param, {})
        missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if state.get(key) is None]
        if missing and any(state.get(key) is not None for key in ADAM.all):
            raise ValueError(
                f"{where}: the state of {place} has no {' and no '.join(missing)}; {delete}, or "
                "load a complete one"
            )
        count, average, grad = state.get("step"), state.get("exp_avg"), param.grad
        if _is_plain(count) and not _is_count(count):
            raise ValueError(
                f"{where}: step of {place} is a {count.dtype} tensor of shape {list(count.shape)} "
                f"on {count.device}; it must be one real number that can be written to. Replace "
                f"it, or {delete}."
            )
        plain = _is_plain(param) and (average is None or _is_plain(average))
        if not plain or grad is None or not _is_plain(grad):
            return
        added = grad.dtype
        if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
            added = torch.promote_types(added, param.dtype)
        kept = param.dtype if average is None else average.dtype
        if added != kept:
            raise TypeError(
                f"{where}: exp_avg of {place} is {kept}, and its gradient is {grad.dtype}; torch's "
                f"Adam needs one dtype for both. Cast the moments, or {delete}."
            )

    def _step_stock(self, group: dict[str, Any], params: list[Tensor]) -> None:
        ready: dict[int, dict[str, Any]] = {}
        for p in params:
            if id(p) not in ready:  # else it is listed twice
                ready[id(p)] = self._ready(group, p)
        states = [ready[id(p)] for p in params]
        # torch's form cannot take apart a complex number whose conjugation is pending.
        grads = [p.grad.resolve_conj() for p in params if p.grad is not None]
        counts, averages, squares = (
            [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        maxima = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
        foreach, fused = _stock.form(group, params, [*grads, *averages, *squares, *maxima])
        if any(
            count.dtype != torch.float32 or count.device != p.device
            for count, p in zip(counts, params, strict=True)
        ):
            fused = fused if fused is None else False
        supported = params[0].device.type in _get_capturable_supported_devices()
        capturable = group["capturable"] and supported
        beta1, beta2 = group["betas"]
        tensors = isinstance(beta1, Tensor) or isinstance(beta2, Tensor)
        odd = any(not c.is_floating_point() or c.itemsize < 4 or c.is_neg() for c in counts)
        if not group["foreach"] and not fused and (odd or (tensors and not capturable)):
            foreach = False  # the multi-tensor form, torch's choice on CUDA, refuses these
        adam(
            params,
            grads,
            averages,
            squares,
            maxima,
            counts,
            foreach=foreach,
            capturable=capturable,
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
        for p, state in zip(params, states, strict=True):
            if self.state[p].pop(ADAM.stale, False):  # also of a maximum that is not in use
                for name in ADAM.buffers:
                    self.state[p].pop(name, None)
            self.state[p].update(state)

    def _ready(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """What the state of a parameter is to hold, from zero on where it is missing or stale."""
        state = self.state.get(param, {})
        stale = state.get(ADAM.stale, False)
        names = ADAM.buffers[: 3 if group["amsgrad"] else 2]
        ready = {name: None if stale else state.get(name) for name in ("step", *names)}
        if ready["step"] is None:
            on_device = bool(group["capturable"] or group["fused"])
            ready["step"] = torch.zeros(
                (),
                dtype=_get_scalar_dtype(is_fused=group["fused"]),
                device=param.device if on_device else "cpu",
            )
        for name in names:
            if ready[name] is None:
                ready[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return ready


def _is_plain(tensor: Any) -> bool:
    """Whether nothing but torch itself decides what an operator does with it."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _is_count(tensor: Tensor) -> bool:
    """Whether torch can add 1 to it and read it."""
    return (
        tensor.numel() == 1
        and (tensor.is_floating_point() or tensor.dtype in (torch.int32, torch.int64))
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor._is_zerotensor()
        and (not tensor.is_inference() or torch.is_inference_mode_enabled())
    )


class FrozenAwareAdamW(_Adam, torch.optim.AdamW):
    r"""`torch.optim.AdamW` that takes all parameters once and skips those that are frozen.

    A parameter is frozen while its ``requires_grad`` is False. The optimizer reads that at every
    step, so you may freeze or unfreeze anything between any two steps; the optimizer needs no
    call. A frozen parameter never moves, whatever its gradient, its moments or the weight decay.
    Its ``.grad`` is set to None and its moments are kept; one that has never trained has none.
    Each parameter counts its own updates, so one that is unfrozen late gets the bias correction
    of a first update. Everything else is as in `torch.optim.AdamW`: arguments, defaults, errors,
    ``param_groups``, state and results.

    One call updates all tensors of all param groups: in one parallel region on the CPU; on CUDA
    with one kernel launch per device and dtype, and one more if the counts lie on the device
    (``fused`` or ``capturable``). ``foreach=True``, ``foreach=False`` or ``fused=False`` select
    that implementation of torch's instead, which then skips frozen parameters too. Complex
    tensors, tensor subclasses, devices other than CPU and CUDA, betas that are tensors, and
    ``differentiable=True`` always use torch's own operators.

    Results are bit-identical to ``torch.optim.AdamW(foreach=False)`` on the CPU for float32 and
    float64. bfloat16 and float16 are computed in float32 and rounded once, when stored. With
    ``fused=True``, as in torch, square roots on the CPU may differ in the last bit.

    Args:
        params: all parameters, frozen or not; also param groups or (name, parameter) pairs, as
            for `torch.optim.AdamW`.
        lr: learning rate; a float or a tensor of one element.
        betas: decay of the moments: of the mean of gradients, and of their squares.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: divide by the largest second moment so far.
        maximize: maximize the objective instead of minimizing it.
        foreach: None for the fused kernels; True or False for torch's multi-tensor or
            single-tensor implementation.
        capturable: keep the counts of updates on the parameters' device, so that a step can be
            captured in a CUDA graph.
        differentiable: let autograd differentiate through the step (torch's implementation).
        fused: None or True for the fused kernels; False for torch's other implementations. On
            the CPU, True takes the processor's square roots, which is faster. On CUDA it keeps the
            counts of updates on the device: a GradScaler's step then needs no synchronization.
        step_in_backward: apply gradients while backward runs, and free them at once. One
            ``backward()`` then makes one step. Whatever needs more than that raises an error; the
            documentation's page on memory lists it.
        bucket_mb: with ``step_in_backward``, MiB of gradients to collect before they are applied
            together. None means a tenth of the trainable parameters' gradients, but at most 4 MiB
            on the CPU and 32 MiB elsewhere. At its peak, gradient memory is one bucket and the
            largest gradient.
        clip_value: with ``step_in_backward``, clamp every element of a gradient to
            [-clip_value, clip_value], as `torch.nn.utils.clip_grad_value_` does.
        frozen_state: what becomes of a frozen parameter's moments and count. ``"keep"`` keeps
            them, as torch does; ``"reset"`` lets them start from zero after unfreezing;
            ``"drop"`` does the same and frees their memory at the next `zero_grad` or `step`
            after freezing. It can also be set per param group.
        moment_dtype: None for each parameter's own dtype, or `torch.bfloat16`. The latter is
            stored with stochastic rounding, which is off by less than `2**-7` of the value at
            each store and exact on average. For float32 and bfloat16 parameters. It can also be
            set per param group.
        moment_seed: seed of that rounding. The one in the param group grows by one at each step.

    Raises:
        ValueError: a hyper-parameter is negative or otherwise invalid, with torch's message; at a
            step, a gradient or a moment has another shape or device than its parameter.
        TypeError: a parameter is not a tensor; at a step, a moment has a type that cannot hold it.
        RuntimeError: options contradict each other, with torch's message; a gradient is sparse;
            with ``step_in_backward``, gradients that cannot be applied in one step.

    An error raised by a step leaves parameters, gradients and state as they were.

    Results are those of `torch.optim.AdamW
    <https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html>`_; see Loshchilov and
    Hutter, "Decoupled Weight Decay Regularization", 2019.

    Example:
        >>> import torch, torch_freeze
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> optimizer = torch_freeze.FrozenAwareAdamW(model.parameters(), lr=1e-3)
        >>> _ = model[0].requires_grad_(False)  # frozen from here on
        >>> before = model[0].weight.clone()
        >>> model(torch.ones(3, 8)).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(model[0].weight, before), model[0].weight in optimizer.state
        (True, False)
        >>> _ = model[0].requires_grad_(True)  # it trains from the next backward on
    """

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
        moment_dtype: torch.dtype | None = None,
        moment_seed: int = 0,
    ) -> None:
        self._configure(
            step_in_backward=step_in_backward,
            bucket_mb=bucket_mb,
            clip_value=clip_value,
            differentiable=differentiable,
            frozen_state=frozen_state,
            moment_dtype=moment_dtype,
            moment_seed=moment_seed,
        )
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
    r"""`torch.optim.Adam` that takes all parameters once and skips those that are frozen.

    It differs from `FrozenAwareAdamW` as `torch.optim.Adam` does from `torch.optim.AdamW`: the
    weight decay is an L2 penalty, added to the gradient, and 0 by default. Results are
    bit-identical to ``torch.optim.Adam(foreach=False)`` on the CPU for float32 and float64.

    Args:
        params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused: as
            for `FrozenAwareAdamW`.
        weight_decay: L2 penalty.
        decoupled_weight_decay: make it AdamW's weight decay.
        step_in_backward, bucket_mb, clip_value, frozen_state, moment_dtype, moment_seed: as for
            `FrozenAwareAdamW`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FrozenAwareAdamW` does.

    Results are those of `torch.optim.Adam
    <https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html>`_; see Kingma and Ba,
    "Adam: A Method for Stochastic Optimization", 2015, and for ``amsgrad`` Reddi et al., "On the
    Convergence of Adam and Beyond", 2018.

    Example:
        >>> import torch, torch_freeze
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch_freeze.FrozenAwareAdam(model.parameters(), lr=1e-3)
        >>> _ = model.bias.requires_grad_(False)  # frozen
        >>> model(torch.ones(3, 8)).sum().backward()
        >>> optimizer.step()
        >>> model.bias in optimizer.state, int(optimizer.state[model.weight]["step"])
        (False, 1)
    """

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
        moment_dtype: torch.dtype | None = None,
        moment_seed: int = 0,
    ) -> None:
        self._configure(
            step_in_backward=step_in_backward,
            bucket_mb=bucket_mb,
            clip_value=clip_value,
            differentiable=differentiable,
            frozen_state=frozen_state,
            moment_dtype=moment_dtype,
            moment_seed=moment_seed,
        )
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
