"""What every optimizer here does: skip what is frozen, step in the kernels, or else as stock."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as _torch

from torch_freeze._build import load_extension
from torch_freeze.optim import _stock
from torch_freeze.optim._when import IN_STEP, InBackward, InStep

_C = load_extension()

# The same dicts for as long as torch is loaded; a hook common to all optimizers is entered here.
_global_pre_hooks = _torch._global_optimizer_pre_hooks
_global_post_hooks = _torch._global_optimizer_post_hooks

_Closure = Callable[[], Any]
_Rest = list[tuple[int, list[Tensor]]]


class FrozenAware(torch.optim.Optimizer):
    """Comes before an optimizer of torch's among the bases of one that skips what is frozen.

    Such a class names its kernels in ``_step_kernels``, ``_zero_grad_kernels`` and
    ``_partial_steps``, and has stock's form of its step in ``_step_stock``. Its constructor begins
    with ``_configure`` and ends with ``_prepare``.
    """

    _when: InStep | InBackward = IN_STEP
    # (bucket_mb, clip_value) of optimizers that step in backward; survives a copy.
    _backward_options: tuple[float | None, float | None] | None = None
    # What the constructor was asked for beyond stock's options, a default of the param groups.
    _own_defaults: dict[str, Any] = {}  # noqa: RUF012  # replaced, never changed

    # GradScaler reads it: see _prepare.
    _step_supports_amp_scaling: bool

    # Takes (param_groups, state, grad_scale, found_inf, done, unless_observed).
    _step_kernels: Callable[..., Any]
    # Takes (param_groups, state, set_to_none).
    _zero_grad_kernels: Callable[..., None]
    # Makes parts of a step, for steps in backward.
    _partial_steps: Any

    def _configure(
        self, own_defaults: dict[str, Any], backward: tuple[float | None, float | None] | None
    ) -> None:
        self._check_own_options(own_defaults)
        self._own_defaults = own_defaults
        self._backward_options = backward

    def _prepare(self) -> None:
        _keep_compiler_out()
        if not _stock.BUILT.compiled:
            _stock.warn_not_compiled(type(self).__name__)
        # Asks GradScaler for grad_scale and found_inf, instead of a step withheld by the host.
        self._step_supports_amp_scaling = not self.defaults.get("differentiable", False)
        if self._backward_options is not None and self._when is IN_STEP:
            self._when = InBackward(self, *self._backward_options)

    def _check_own_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError or RuntimeError for options beyond stock's that make no sense."""
        raise NotImplementedError

    def _check_stock(self, group: dict[str, Any], index: int, params: list[Tensor]) -> None:
        """Raise what stock's form would raise, before anything is written."""
        raise NotImplementedError

    def _step_stock(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update some parameters of a group by stock's functional form."""
        raise NotImplementedError

    def _loaded(self, group: dict[str, Any]) -> None:
        """Bring the state of a group into the form that its options ask for."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizer does.

        Raises:
            RuntimeError: with ``step_in_backward``, where backward has applied a part of the
                gradients and `step` has not been called.
        """
        self._when.check_between_steps("state_dict")
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._when.check_between_steps("__getstate__")
        state: dict[str, Any] = super().__getstate__()
        if self._when is not IN_STEP:
            state["_backward_options"] = self._backward_options
        if self._own_defaults:
            state["_own_defaults"] = self._own_defaults
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._when.check_between_steps("load_state_dict")
        super().__setstate__(state)
        # A checkpoint of stock's has none of these options, and state as wide as its parameter.
        for group in self.param_groups:
            for name, value in self._own_defaults.items():
                group.setdefault(name, value)
            self._loaded(group)
        self._prepare()

    @property
    def step_in_backward(self) -> bool:
        """Whether gradients are applied while backward runs; False after `close`."""
        return self._when is not IN_STEP

    @property
    def bucket_bytes(self) -> int:
        """Bytes of gradients that are collected before they are applied in backward.

        The size that ``bucket_mb`` gave, or else the automatic one of the last backward, 0 before
        any; and 0 where nothing is stepped in backward.
        """
        return self._when.bucket_bytes

    def close(self) -> None:
        """Stop stepping in backward and take the hooks off the parameters.

        What backward has not applied stays in ``.grad``; from here on the optimizer steps in
        `step` alone. Does nothing to an optimizer made without ``step_in_backward``. An optimizer
        that is garbage-collected closes itself. Not to be called while another thread runs
        backward through these parameters.
        """
        self._when.close()
        self._when, self._backward_options = IN_STEP, None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as `torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: its parameters under ``"params"``, and options that differ from the
                optimizer's.
        """
        if isinstance(param_group, dict):
            for name, value in self._own_defaults.items():
                param_group.setdefault(name, value)
            self._check_own_options(param_group)
        super().add_param_group(param_group)
        try:
            self._when.attach(self.param_groups)
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
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError, TypeError: a gradient or a tensor of the state does not fit; nothing was
                written.
        """
        has_hooks = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_pre_hooks
            or _global_post_hooks
        )
        if not (has_hooks or args or kwargs or self._when is not IN_STEP):
            own = self.__dict__
            scaling = own.get("grad_scale"), own.get("found_inf")
            rest = self._step_kernels(self.param_groups, self.state, *scaling, None, True)
            if rest is None:
                return None
            if rest is not NotImplemented:
                return self._finish(rest, *scaling)
        # Stock's wrapper for hooks and profiler costs more than a small step: only where someone
        # listens. It shows hooks the arguments as they were given. A subclass with a step of its
        # own is inside it already.
        if (has_hooks or _C.is_observed()) and type(self).step is FrozenAware.step:
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
        self._when.begin_step(self.param_groups, own)
        rest = self._step_kernels(self.param_groups, self.state, *scaling)
        if rest is not None:
            self._finish(rest, *scaling)
        self._when.end_step(self.param_groups)
        return loss

    _step.__name__ = _step.__qualname__ = step.__name__

    @functools.wraps(_step)
    def _step_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    # Stock's step lies within two wrappers, and who compiles it takes off both.
    step.__wrapped__ = _step_wrapped  # type: ignore[attr-defined]
    _step_observed = _disable_dynamo(_torch.Optimizer.profile_hook_step(_step))

    def _finish(self, rest: _Rest, grad_scale: Any, found_inf: Any) -> None:
        """Take the step that the kernels alone could not: stock's form for `rest`, then theirs."""
        self._step_rest(rest, grad_scale, found_inf)
        self._step_kernels(self.param_groups, self.state, grad_scale, found_inf, rest)

    @_disable_dynamo
    def _step_rest(self, rest: _Rest, grad_scale: Any, found_inf: Any) -> None:
        """Update what the kernels do not cover through stock's functional form."""
        for index, params in rest:
            self._check_stock(self.param_groups[index], index, params)
        if found_inf is not None and float(found_inf) != 0:
            return
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for index, params in rest:
                if grad_scale is not None:
                    for p in params:
                        _stock.unscale(p, grad_scale)
                self._step_stock(self.param_groups[index], params)

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
        self._when.check_zero_grad(set_to_none)
        if _C.is_observed():
            with torch.autograd.profiler.record_function(
                f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"
            ):
                self._zero_grad_kernels(self.param_groups, self.state, set_to_none)
        else:
            self._zero_grad_kernels(self.param_groups, self.state, set_to_none)


@functools.cache
def _keep_compiler_out() -> None:
    """Have torch.compile run the step as it is.

    A freeze check in traced code would go stale, since nothing guards on requires_grad. Marking the
    functions costs nothing at a step, where a wrapper around them would.
    """
    from torch._dynamo.decorators import skip

    own = FrozenAware
    for function in (own.step, own._step_wrapped, own._step, own._finish, own.zero_grad):
        skip(function)
