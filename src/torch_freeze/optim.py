"""FrozenAwareSGD: stock SGD that takes all parameters once and pays nothing for frozen ones."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as _stock
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from torch_freeze._build import build_info, load_extension, without_extension

_C = load_extension()
_BUILT = build_info()

# The same dicts for as long as torch is loaded; a hook common to all optimizers is entered here.
_global_pre_hooks = _stock._global_optimizer_pre_hooks
_global_post_hooks = _stock._global_optimizer_post_hooks

_FrozenMomentum = Literal["keep", "reset", "drop"]
_Closure = Callable[[], Any]
_Rest = list[tuple[int, list[Tensor]]]


class FrozenAwareSGD(torch.optim.SGD):
    r"""`torch.optim.SGD` that takes all parameters once and skips those that are frozen.

    A parameter is frozen while its ``requires_grad`` is False. That is read at every step, so
    anything may be frozen or unfrozen between any two steps, and the optimizer need not be told. A
    frozen parameter never moves, whatever its gradient, its momentum or the weight decay; its
    ``.grad`` is set to None; its momentum is kept. Everything else is stock's: arguments, defaults,
    errors, ``param_groups``, state and results.

    One call updates all tensors of all param groups: one kernel launch per device and dtype on
    CUDA, one parallel region on the CPU. ``foreach=True``, ``foreach=False`` or ``fused=False`` ask
    for that implementation of stock's instead, equally frozen-aware; sparse and complex tensors,
    tensor subclasses, devices other than CPU and CUDA, and ``differentiable=True`` use stock's own
    operators.

    Results are bit-identical to ``torch.optim.SGD(foreach=False)`` on the CPU for float32 and
    float64. bfloat16 and float16 are computed in float32 and rounded once, when stored.

    Args:
        params: the parameters, all of them, or param groups, or (name, parameter) pairs, as
            `torch.optim.SGD` takes them.
        lr: learning rate; a float or a tensor of one element.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: L2 penalty.
        nesterov: use Nesterov momentum; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        foreach: None for the fused kernels; True or False for stock's multi-tensor or single-tensor
            form.
        differentiable: let autograd differentiate through the step (stock's form).
        fused: None or True for the fused kernels; False for stock's forms.
        step_in_backward: apply gradients while backward runs, and free them at once. One
            ``backward()`` then makes one step; what needs more than that raises an error (the
            documentation's page on memory lists it).
        bucket_mb: with ``step_in_backward``, MiB of gradients that are collected before they are
            applied together; None for a tenth of the trainable ones, at most 4 MiB on the CPU and
            32 MiB elsewhere. Peak gradient memory is a bucket and the largest gradient.
        clip_value: with ``step_in_backward``, bounds every element of a gradient to
            [-clip_value, clip_value], as `torch.nn.utils.clip_grad_value_` does.
        frozen_momentum: what becomes of a frozen parameter's momentum: ``"keep"``, as stock does;
            ``"reset"``, it begins anew once unfrozen; ``"drop"``, the same, and its memory is freed
            at the next `zero_grad` or `step` after freezing. Also per param group.
        momentum_dtype: None for each parameter's own dtype, or `torch.bfloat16`, stored with
            stochastic rounding: off by less than `2**-7` of the value at each store, right on
            average. For float32 and bfloat16 parameters. Also per param group.
        momentum_seed: of that rounding; grows by one at each step, in the param group.

    Raises:
        ValueError: a negative or otherwise invalid hyper-parameter, with stock's message; at a
            step, a gradient or momentum buffer of another shape or on another device than its
            parameter.
        TypeError: parameters that are not tensors; at a step, a momentum buffer of a type that
            cannot hold it.
        RuntimeError: contradicting options, with stock's message; with ``step_in_backward``, what
            cannot be one step.

    An error raised by a step leaves parameters, gradients and state as they were.

    Source: `torch.optim.SGD <https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html>`_
    and the papers it names, Sutskever et al. 2013 for momentum.

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
        >>> _ = model[0].requires_grad_(True)  # trains again, from the next backward on
    """

    # Of optimizers that step in backward: what makes the steps; and, which survives a copy,
    # (bucket_mb, clip_value).
    _in_backward: Any = None
    _backward_options: tuple[float | None, float | None] | None = None
    # What the constructor was asked for beyond stock's options, a default of the param groups.
    _own_defaults: dict[str, Any] = {}  # noqa: RUF012  # replaced, never changed

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
        frozen_momentum: _FrozenMomentum = "keep",
        momentum_dtype: torch.dtype | None = None,
        momentum_seed: int = 0,
    ) -> None:
        self._configure_backward(step_in_backward, bucket_mb, clip_value, differentiable)
        # Only what is asked for goes into the param groups: they stay stock's otherwise.
        own: dict[str, Any] = {}
        if frozen_momentum != "keep":
            own["frozen_momentum"] = frozen_momentum
        if momentum_dtype is not None:
            own["momentum_dtype"] = momentum_dtype
        if momentum_seed != 0:
            own["momentum_seed"] = momentum_seed
        _check_momentum_options(own)
        self._own_defaults = own
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

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.SGD.state_dict` does.

        Raises:
            RuntimeError: with ``step_in_backward``, where backward has applied a part of the
                gradients and `step` has not been called.
        """
        if self._in_backward is not None:
            self._in_backward.check_between_steps("state_dict")
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        if self._in_backward is not None:
            self._in_backward.check_between_steps("__getstate__")
        state: dict[str, Any] = super().__getstate__()
        if self._in_backward is not None:
            state["_backward_options"] = self._backward_options
        if self._own_defaults:
            state["_own_defaults"] = self._own_defaults
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self._in_backward is not None:
            self._in_backward.check_between_steps("load_state_dict")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A checkpoint of stock's has no options of ours, and momentum as wide as its parameter.
        for group in self.param_groups:
            for name, value in self._own_defaults.items():
                group.setdefault(name, value)
            _narrow_momentum(group, self.state)
        self._prepare()

    def _prepare(self) -> None:
        _keep_compiler_out()
        if not _BUILT.compiled:
            _warn_not_compiled()
        # Asks GradScaler for grad_scale and found_inf, instead of a step withheld by the host.
        self._step_supports_amp_scaling = not self.defaults.get("differentiable", False)
        if self._backward_options is not None and self._in_backward is None:
            bucket_mb, clip_value = self._backward_options
            bucket_bytes = None if bucket_mb is None else int(bucket_mb * 2**20)
            in_backward = _C.BackwardStep(weakref.ref(self), bucket_bytes, clip_value)
            in_backward.attach(self.param_groups)
            self._in_backward = in_backward
            weakref.finalize(self, in_backward.close).atexit = False

    def _configure_backward(
        self,
        step_in_backward: bool,
        bucket_mb: float | None,
        clip_value: float | None,
        differentiable: bool,
    ) -> None:
        if not step_in_backward:
            for name, value in (("bucket_mb", bucket_mb), ("clip_value", clip_value)):
                if value is not None:
                    raise ValueError(
                        f"{name}={value} needs step_in_backward=True; an ordinary step has no "
                        "buckets, and torch.nn.utils.clip_grad_value_ clips for it"
                    )
            return
        if differentiable:
            raise ValueError(
                "step_in_backward=True cannot be differentiable: it lets go of the graph's "
                "gradients while backward runs"
            )
        for name, value in (("bucket_mb", bucket_mb), ("clip_value", clip_value)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"Invalid {name} value: {value}; it has to be finite and not < 0")
        self._backward_options = (bucket_mb, clip_value)

    @property
    def step_in_backward(self) -> bool:
        """Whether gradients are applied while backward runs; False after `close`."""
        return self._in_backward is not None

    @property
    def bucket_bytes(self) -> int:
        """Bytes of gradients that are collected before they are applied in backward.

        The size that ``bucket_mb`` gave, or else the automatic one of the last backward, 0 before
        any; and 0 where nothing is stepped in backward.
        """
        return 0 if self._in_backward is None else int(self._in_backward.bucket_bytes)

    def close(self) -> None:
        """Stop stepping in backward and take the hooks off the parameters.

        What backward has not applied stays in ``.grad``; from here on the optimizer steps in
        `step` alone. Does nothing to an optimizer made without ``step_in_backward``. An optimizer
        that is garbage-collected closes itself. Not to be called while another thread runs
        backward through these parameters.
        """
        if self._in_backward is not None:
            self._in_backward.close()
        self._in_backward = self._backward_options = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as `torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: its parameters under ``"params"``, and options that differ from the
                optimizer's.
        """
        if isinstance(param_group, dict):
            for name, value in self._own_defaults.items():
                param_group.setdefault(name, value)
            _check_momentum_options(param_group)
        super().add_param_group(param_group)
        try:
            if self._in_backward is not None:
                self._in_backward.attach(self.param_groups)
            else:
                _C.BackwardStep.check_free(self.param_groups[-1:], len(self.param_groups) - 1)
        except RuntimeError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: _Closure) -> Any: ...

    def step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D417  # takes what _step takes
        """Update every trainable parameter that has a gradient; drop the frozen ones' gradients.

        Args:
            closure: evaluates the model anew, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError, TypeError: a gradient or momentum buffer does not fit; nothing was written.
        """
        has_hooks = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_pre_hooks
            or _global_post_hooks
        )
        if not (has_hooks or args or kwargs or self._in_backward is not None):
            own = self.__dict__
            scaling = own.get("grad_scale"), own.get("found_inf")
            rest = _C.sgd_step(self.param_groups, self.state, *scaling, None, True)
            if rest is None:
                return None
            if rest is not NotImplemented:
                return self._finish(rest, *scaling)
        # Stock's wrapper for hooks and profiler costs more than a small step: only where someone
        # listens. It shows hooks the arguments as they were given. A subclass with a step of its
        # own is inside it already.
        if (has_hooks or _C.is_observed()) and type(self).step is FrozenAwareSGD.step:
            return self._step_observed(*args, **kwargs)
        return self._step(*args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # keeps Optimizer.__init__ from wrapping it

    # Goes by the name of `step`, which is what its errors are to say.
    def _step(self, closure: _Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = self.__dict__
        scaling = own.get("grad_scale"), own.get("found_inf")
        in_backward = self._in_backward
        if in_backward is not None:
            # GradScaler would leave these behind when this raises, as with them it does.
            own.pop("grad_scale", None), own.pop("found_inf", None)
            in_backward.check_step(self.param_groups, *scaling)
        rest = _C.sgd_step(self.param_groups, self.state, *scaling)
        if rest is not None:
            self._finish(rest, *scaling)
        if in_backward is not None:
            in_backward.end_step(self.param_groups)
        return loss

    _step.__name__, _step.__qualname__ = step.__name__, step.__qualname__

    @functools.wraps(_step)
    def _step_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    # Stock's step lies within two wrappers, and who compiles it takes off both.
    step.__wrapped__ = _step_wrapped  # type: ignore[attr-defined]
    _step_observed = _disable_dynamo(_stock.Optimizer.profile_hook_step(_step))

    def _finish(self, rest: _Rest, grad_scale: Any, found_inf: Any) -> None:
        """Take the step that the kernels alone could not: stock's form for `rest`, then theirs."""
        self._step_rest(rest, grad_scale, found_inf)
        _C.sgd_step(self.param_groups, self.state, grad_scale, found_inf, rest)

    @_disable_dynamo
    def _step_rest(self, rest: _Rest, grad_scale: Any, found_inf: Any) -> None:
        """Update what the kernels do not cover through `torch.optim.sgd.sgd`."""
        for index, params in rest:
            self._check_rest(index, params)
        if found_inf is not None and float(found_inf) != 0:
            return
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for index, params in rest:
                if grad_scale is not None:
                    for p in params:
                        _unscale(p, grad_scale)
                group = self.param_groups[index]
                for part in _parts(group, params, self.state):
                    self._step_stock(group, part)

    def _check_rest(self, index: int, params: list[Tensor]) -> None:
        """Raise what stock's form would raise, before anything is written."""
        group = self.param_groups[index]
        for p in params:
            sparse = p.grad is not None and p.grad.is_sparse
            if sparse and group["fused"]:
                raise RuntimeError("`_fused_sgd` does not support sparse gradients")
            if sparse and group["weight_decay"] != 0:
                raise RuntimeError(
                    f"FrozenAwareSGD.step: param_groups[{index}] has "
                    f"weight_decay={group['weight_decay']} and a parameter with a sparse gradient, "
                    "and SGD cannot decay those; put such parameters in a group with weight_decay=0"
                )
            if group["fused"]:
                _stock._device_dtype_check_for_fused(p)

    def _step_stock(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        foreach, fused = group["foreach"], group["fused"]
        if _kernels_wanted(group) and not _has_kernels(params[0].device):
            foreach, fused = params[0].is_cuda, False
        on_cpu = params[0].device.type == "cpu"
        multi_tensor = foreach or (foreach is None and fused is None and not on_cpu)
        plain = not group["weight_decay"] and not group["maximize"]
        if multi_tensor and group["nesterov"] and plain:
            # Stock's multi-tensor form would add the momentum into .grad itself.
            grads = [g.clone() for g in grads]
        has_momentum = group["momentum"] != 0
        buffers: list[Tensor | None] = []
        if has_momentum:
            buffers = [_buffer(self.state[p]) for p in params]
        sgd(
            params,
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
        for p, buffer in zip(params, buffers, strict=has_momentum):
            self.state[p]["momentum_buffer"] = buffer
            self.state[p].pop("momentum_stale", None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, the frozen ones' included.

        With ``frozen_momentum="drop"`` the momentum of what is frozen is let go of, too.

        Args:
            set_to_none: set each ``.grad`` to None, which frees its memory; False fills it with
                zeros instead.

        Raises:
            RuntimeError: with ``step_in_backward``, where backward has applied a part of the
                gradients and `step` has not been called.
        """
        if self._in_backward is not None:
            self._in_backward.check_zero_grad(set_to_none)
        if _C.is_observed():
            with torch.autograd.profiler.record_function(
                f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"
            ):
                _C.zero_grad(self.param_groups, self.state, set_to_none)
        else:
            _C.zero_grad(self.param_groups, self.state, set_to_none)


@functools.cache
def _keep_compiler_out() -> None:
    """Have torch.compile run the step as it is.

    A freeze check in traced code would go stale, since nothing guards on requires_grad. Marking the
    functions costs nothing at a step, where a wrapper around them would.
    """
    from torch._dynamo.decorators import skip

    own = FrozenAwareSGD
    for function in (own.step, own._step_wrapped, own._step, own._finish, own.zero_grad):
        skip(function)


def _kernels_wanted(group: dict[str, Any]) -> bool:
    return bool(group["fused"]) or (group["foreach"] is None and group["fused"] is None)


def _parts(
    group: dict[str, Any], params: list[Tensor], state: dict[Tensor, Any]
) -> list[list[Tensor]]:
    """Split what stock's fused form cannot take in one call.

    It holds "first step" to be true of all tensors or of none, and of one device at a time.
    """
    if not group["fused"] or group["momentum"] == 0:
        return [params]
    fresh = [p for p in params if _buffer(state[p]) is None]
    kept = [p for p in params if _buffer(state[p]) is not None]
    return [part for part in (fresh, kept) if part]


def _buffer(state: dict[str, Any]) -> Tensor | None:
    """The momentum buffer to go on from; None where momentum begins anew."""
    buffer: Tensor | None = state.get("momentum_buffer")
    return None if state.get("momentum_stale") else buffer


def _check_momentum_options(options: dict[str, Any]) -> None:
    policy = options.get("frozen_momentum", "keep")
    if policy not in get_args(_FrozenMomentum):
        raise ValueError(
            f"Invalid frozen_momentum value: {policy!r}; it has to be 'keep', 'reset' or 'drop'"
        )
    dtype = options.get("momentum_dtype")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"Invalid momentum_dtype value: {dtype!r}; it has to be torch.bfloat16, or None for "
            "each parameter's own"
        )
    if dtype is not None and not _BUILT.compiled:
        raise RuntimeError(
            f"momentum_dtype={dtype} needs the compiled module. {without_extension()}"
        )
    seed = options.get("momentum_seed", 0)
    if type(seed) is not int or seed < 0:
        raise ValueError(f"Invalid momentum_seed value: {seed!r}; it has to be an int and not < 0")


def _narrow_momentum(group: dict[str, Any], state: dict[Tensor, Any]) -> None:
    """Bring buffers that loading has widened back into the group's dtype; what it wrote fits."""
    dtype = group.get("momentum_dtype")
    for p in group["params"] if dtype is not None else ():
        buffer = state[p].get("momentum_buffer") if p in state else None
        if isinstance(buffer, Tensor) and buffer.dtype is not dtype:
            state[p]["momentum_buffer"] = buffer.to(dtype)


def _unscale(param: Tensor, grad_scale: Any) -> None:
    """Divide the gradient in place; an expanded one, which cannot be written to, is replaced."""
    grad = param.grad
    if grad is None:
        return
    scale = torch.as_tensor(grad_scale, device=grad.device)
    if grad.layout is torch.strided and torch._debug_has_internal_overlap(grad) == 1:
        param.grad = grad / scale
    else:
        grad.div_(scale)


def _has_kernels(device: torch.device) -> bool:
    if device.type == "cuda" and _BUILT.compiled and not _BUILT.cuda:
        _warn_cpu_only()
        return False
    return _BUILT.compiled


@functools.cache
def _warn_cpu_only() -> None:
    warnings.warn(
        "this torch_freeze was built without CUDA code, so CUDA tensors take torch's own foreach "
        "SGD. Rebuild it where an nvcc of torch's CUDA version is found: USE_CUDA=1 pip install "
        "--force-reinstall --no-deps --no-build-isolation <folder of torch_freeze's source>",
        RuntimeWarning,
        stacklevel=5,
    )


@functools.cache
def _warn_not_compiled() -> None:
    warnings.warn(
        "FrozenAwareSGD takes torch's own SGD operators: the results are the same, the speed is "
        f"theirs. {without_extension()}",
        RuntimeWarning,
        stacklevel=4,
    )
