"""The base of every optimizer here: skip frozen parameters, run the kernels or torch's own form.

It knows no optimizer in particular. What is left to a subclass is listed in `FrozenAware`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as _torch

from torch_freeze._build import load_extension, without_extension
from torch_freeze._state_names import StateNames
from torch_freeze.optim import _stock, _strategy
from torch_freeze.optim._strategy import IN_STEP, InBackward, InStep

_C = load_extension()

# torch keeps these two dicts for good and enters hooks for all optimizers into them.
_global_pre_hooks = _torch._global_optimizer_pre_hooks
_global_post_hooks = _torch._global_optimizer_post_hooks

#: What becomes of the state of a parameter while it is frozen.
FrozenState = Literal["keep", "reset", "drop"]

_Closure = Callable[[], Any]
_Rest = list[tuple[int, list[Tensor]]]


class FrozenAware(torch.optim.Optimizer):
    """Makes an optimizer of torch's skip frozen parameters.

    A subclass is declared as ``class FrozenAwareX(FrozenAware, torch.optim.X)``. It sets
    ``_step_kernels``, ``_zero_grad_kernels``, ``_partial_steps`` and ``_state_names``, and defines
    ``_check_stock`` and ``_step_stock``. Its constructor calls ``_configure`` before torch's
    constructor and ``_prepare`` after it.
    """

    # Takes (param_groups, state, grad_scale, found_inf, done, unless_observed).
    _step_kernels: Callable[..., Any]
    # Takes (param_groups, state, set_to_none).
    _zero_grad_kernels: Callable[..., None]
    # Makes parts of a step, for steps in backward.
    _partial_steps: Any
    _state_names: StateNames

    _strategy: InStep | InBackward = IN_STEP
    # (bucket_mb, clip_value) of an optimizer that steps in backward; copies and pickles keep it.
    _backward_options: tuple[float | None, float | None] | None = None
    # The options that torch's optimizer does not have, where they differ from their defaults.
    _own_defaults: dict[str, Any] = {}  # noqa: RUF012  # replaced, never changed

    # GradScaler reads it: see _prepare.
    _step_supports_amp_scaling: bool

    def _configure(
        self,
        *,
        step_in_backward: bool = False,
        bucket_mb: float | None = None,
        clip_value: float | None = None,
        differentiable: bool = False,
        **own: Any,
    ) -> None:
        """Keep the options that torch's optimizer does not have, once they are checked.

        Those in `own` are named as in ``_state_names`` and may be set per param group.
        """
        backward = _strategy.check_options(step_in_backward, bucket_mb, clip_value, differentiable)
        names = self._state_names
        defaults = {names.policy: "keep", names.dtype: None, names.seed: 0}
        for name in own:
            if name not in defaults:
                raise TypeError(f"{type(self).__name__} has no argument {name!r}")
        # Options left at their defaults stay out of the param groups, which are then torch's.
        self._own_defaults = {k: v for k, v in own.items() if v != defaults[k]}
        self._check_own_options(self._own_defaults)
        self._backward_options = backward

    def _prepare(self) -> None:
        _keep_compiler_out()
        if not _stock.BUILT.compiled:
            _stock.warn_not_compiled(type(self).__name__)
        # GradScaler then hands over grad_scale and found_inf; else it syncs and withholds steps.
        self._step_supports_amp_scaling = not self.defaults.get("differentiable", False)
        if self._backward_options is not None and self._strategy is IN_STEP:
            self._strategy = InBackward(self, *self._backward_options)

    def _check_own_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError or RuntimeError for invalid options that torch does not know."""
        names = self._state_names
        policy = options.get(names.policy, "keep")
        if policy not in get_args(FrozenState):
            raise ValueError(
                f"Invalid {names.policy} value: {policy!r}; it must be 'keep', 'reset' or 'drop'"
            )
        dtype = options.get(names.dtype)
        if dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"Invalid {names.dtype} value: {dtype!r}; it must be torch.bfloat16, or None for "
                "each parameter's own"
            )
        if dtype is not None and not _stock.BUILT.compiled:
            raise RuntimeError(
                f"{names.dtype}={dtype} needs the compiled module. {without_extension()}"
            )
        seed = options.get(names.seed, 0)
        if type(seed) is not int or seed < 0:
            raise ValueError(
                f"Invalid {names.seed} value: {seed!r}; it must be an int and at least 0"
            )

    def _check_stock(self, group: dict[str, Any], index: int, params: list[Tensor]) -> None:
        """Raise what torch's form would raise, before anything is written."""
        raise NotImplementedError

    def _step_stock(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update some parameters of a group with torch's functional form."""
        raise NotImplementedError

    def _restore_dtype(self, group: dict[str, Any]) -> None:
        # torch's load_state_dict casts buffers to the parameter's dtype. Casting them back loses
        # nothing, because they were saved in this dtype.
        dtype = group.get(self._state_names.dtype)
        for p in group["params"] if dtype is not None else ():
            entry = self.state.get(p, {})
            for name in self._state_names.buffers:
                buffer = entry.get(name)
                if isinstance(buffer, Tensor) and buffer.dtype is not dtype:
                    entry[name] = buffer.to(dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the format of torch's optimizer.

        Raises:
            RuntimeError: with ``step_in_backward``, if backward has applied some of the gradients
                and `step` has not been called.
        """
        self._strategy.check_between_steps("state_dict")
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._strategy.check_between_steps("__getstate__")
        state: dict[str, Any] = super().__getstate__()
        if self._strategy is not IN_STEP:
            state["_backward_options"] = self._backward_options
        if self._own_defaults:
            state["_own_defaults"] = self._own_defaults
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._strategy.check_between_steps("load_state_dict")
        super().__setstate__(state)
        # A checkpoint of torch's optimizer has none of these options.
        for group in self.param_groups:
            for name, value in self._own_defaults.items():
                group.setdefault(name, value)
            self._restore_dtype(group)
        self._prepare()

    @property
    def step_in_backward(self) -> bool:
        """Whether gradients are applied while backward runs; False after `close`."""
        return self._strategy is not IN_STEP

    @property
    def bucket_bytes(self) -> int:
        """Bytes of gradients that are collected before they are applied in backward.

        This is ``bucket_mb`` if it was given, else the size chosen in the last backward (0 before
        the first one). It is 0 for an optimizer that does not step in backward.
        """
        return self._strategy.bucket_bytes

    def close(self) -> None:
        """Stop stepping in backward and remove the hooks from the parameters.

        Gradients that backward has not applied stay in ``.grad``, and from now on `step` applies
        all of them. An optimizer made without ``step_in_backward`` is not affected. An optimizer
        that is garbage-collected closes itself. Do not call this while another thread runs
        backward through these parameters.
        """
        self._strategy.close()
        self._strategy, self._backward_options = IN_STEP, None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as `torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: a dict with the parameters under ``"params"`` and every option that
                differs from the optimizer's.
        """
        if isinstance(param_group, dict):
            for name, value in self._own_defaults.items():
                param_group.setdefault(name, value)
            self._check_own_options(param_group)
        super().add_param_group(param_group)
        try:
            self._strategy.attach(self.param_groups)
        except RuntimeError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: _Closure) -> Any: ...

    def step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D417  # takes what _step takes
        """Update every trainable parameter that has a gradient; free the frozen ones' gradients.

        Args:
            closure: a function that evaluates the model again and returns the loss. It is called
                with gradients enabled.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError, TypeError: a gradient or a tensor of the state does not fit its parameter.
                Nothing is written then.
        """
        has_hooks = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_pre_hooks
            or _global_post_hooks
        )
        if not (has_hooks or args or kwargs or self._strategy is not IN_STEP):
            own = self.__dict__
            scaling = own.get("grad_scale"), own.get("found_inf")
            rest = self._step_kernels(self.param_groups, self.state, *scaling, None, True)
            if rest is None:
                return None
            if rest is not NotImplemented:
                return self._finish(rest, *scaling)
        # torch's wrapper for hooks and the profiler costs more than a small step, so it is used
        # only if there is a hook or a profiler. It passes hooks the arguments as they were given.
        # A subclass that overrides `step` is inside torch's wrapper already.
        if (has_hooks or _C.is_observed()) and type(self).step is FrozenAware.step:
            return self._step_observed(*args, **kwargs)
        return self._step(*args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # keeps Optimizer.__init__ from wrapping it

    # It is renamed to `step` below, so that errors about its arguments name `step`.
    def _step(self, closure: _Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = self.__dict__
        scaling = own.get("grad_scale"), own.get("found_inf")
        self._strategy.begin_step(self.param_groups, own)
        rest = self._step_kernels(self.param_groups, self.state, *scaling)
        if rest is not None:
            self._finish(rest, *scaling)
        self._strategy.end_step(self.param_groups)
        return loss

    _step.__name__ = _step.__qualname__ = step.__name__

    @functools.wraps(_step)
    def _step_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    # torch's own step has two wrappers, and code that compiles a step removes both.
    step.__wrapped__ = _step_wrapped  # type: ignore[attr-defined]
    _step_observed = _disable_dynamo(_torch.Optimizer.profile_hook_step(_step))

    def _finish(self, rest: _Rest, grad_scale: Any, found_inf: Any) -> None:
        """Finish a step that needs torch's form for `rest` and the kernels for the others."""
        self._step_rest(rest, grad_scale, found_inf)
        self._step_kernels(self.param_groups, self.state, grad_scale, found_inf, rest)

    @_disable_dynamo
    def _step_rest(self, rest: _Rest, grad_scale: Any, found_inf: Any) -> None:
        """Update the parameters that no kernel covers with torch's functional form."""
        for index, params in rest:
            self._check_stock(self.param_groups[index], index, params)
        if found_inf is not None and float(found_inf) != 0:
            return
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            for index, params in rest:
                if grad_scale is not None:
                    for p in params:
                        _stock.unscale(p, grad_scale)
                self._step_stock(self.param_groups[index], params)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, including frozen ones.

        This also frees the state of frozen parameters where the optimizer was asked to drop it
        (``frozen_momentum="drop"`` or ``frozen_state="drop"``).

        Args:
            set_to_none: True sets each ``.grad`` to None, which frees its memory; False fills it
                with zeros.

        Raises:
            RuntimeError: with ``step_in_backward``, if backward has applied some of the gradients
                and `step` has not been called.
        """
        self._strategy.check_zero_grad(set_to_none)
        if _C.is_observed():
            with torch.autograd.profiler.record_function(
                f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"
            ):
                self._zero_grad_kernels(self.param_groups, self.state, set_to_none)
        else:
            self._zero_grad_kernels(self.param_groups, self.state, set_to_none)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside a wrapper of Accelerate, of Lightning or a ZeroRedundancyOptimizer.

    Inside the latter it has this process's share of the parameters.
    """
    for attribute in ("optimizer", "optim"):
        inner = getattr(optimizer, attribute, None)
        if isinstance(inner, torch.optim.Optimizer):
            return inner
    return optimizer


def frozen_aware(optimizer: torch.optim.Optimizer) -> FrozenAware | None:
    """The optimizer, without its wrapper, if it skips frozen parameters; else None."""
    inner = unwrapped(optimizer)
    return inner if isinstance(inner, FrozenAware) else None


def state_names(optimizer: FrozenAware) -> StateNames:
    """The names in the optimizer's state, and of the options that concern it."""
    return optimizer._state_names


@functools.cache
def _keep_compiler_out() -> None:
    """Make torch.compile run the step without tracing it.

    A freeze check in traced code would go stale, because torch.compile does not guard on
    requires_grad. Marking the functions costs nothing per step; a wrapper around them would.
    """
    from torch._dynamo.decorators import skip

    own = FrozenAware
    for function in (own.step, own._step_wrapped, own._step, own._finish, own.zero_grad):
        skip(function)
