"""When gradients are applied: in `step`, or while backward runs; an optimizer does either."""

from __future__ import annotations

import math
import weakref
from typing import Any

from torch_freeze._build import load_extension

_C = load_extension()

_Groups = list[dict[str, Any]]


class InStep:
    """Everything happens in `step`, as in stock."""

    bucket_bytes = 0

    def attach(self, groups: _Groups) -> None:
        """Check that no other optimizer steps the last group's parameters in backward."""
        _C.BackwardStep.check_free(groups[-1:], len(groups) - 1)

    def begin_step(self, groups: _Groups, scaling: dict[str, Any]) -> None:
        """Nothing has to be checked."""

    def end_step(self, groups: _Groups) -> None:
        """Nothing is left of backward."""

    def check_between_steps(self, function: str) -> None:
        """There is always only a whole step."""

    def check_zero_grad(self, set_to_none: bool) -> None:
        """Gradients may be reset at any time."""

    def close(self) -> None:
        """There are no hooks to take off."""


class InBackward:
    """Gradients are collected in buckets while backward runs, applied, and freed at once."""

    def __init__(self, optimizer: Any, bucket_mb: float | None, clip_value: float | None) -> None:
        bucket_bytes = None if bucket_mb is None else int(bucket_mb * 2**20)
        self._steps = _C.BackwardStep(
            weakref.ref(optimizer), optimizer._partial_steps, bucket_bytes, clip_value
        )
        self._steps.attach(optimizer.param_groups)
        weakref.finalize(optimizer, self._steps.close).atexit = False

    @property
    def bucket_bytes(self) -> int:
        """Bytes of gradients that are collected before they are applied."""
        return int(self._steps.bucket_bytes)

    def attach(self, groups: _Groups) -> None:
        """Take the parameters of new groups too."""
        self._steps.attach(groups)

    def begin_step(self, groups: _Groups, scaling: dict[str, Any]) -> None:
        """Raise unless backward and what is left of it are one step; take GradScaler's tensors."""
        # GradScaler would leave these behind when this raises, as with them it does.
        given = scaling.pop("grad_scale", None), scaling.pop("found_inf", None)
        self._steps.check_step(groups, *given)

    def end_step(self, groups: _Groups) -> None:
        """Begin the next step with the next backward."""
        self._steps.end_step(groups)

    def check_between_steps(self, function: str) -> None:
        """Raise where backward has applied a part of the gradients."""
        self._steps.check_between_steps(function)

    def check_zero_grad(self, set_to_none: bool) -> None:
        """Raise where backward has applied a part of the gradients."""
        self._steps.check_zero_grad(set_to_none)

    def close(self) -> None:
        """Take the hooks off; what has not been applied stays in ``.grad``."""
        self._steps.close()


IN_STEP = InStep()


def check_options(
    step_in_backward: bool,
    bucket_mb: float | None,
    clip_value: float | None,
    differentiable: bool,
) -> tuple[float | None, float | None] | None:
    """Check the constructor's options.

    Returns:
        (bucket_mb, clip_value) to step in backward with; None to step in `step`.

    Raises:
        ValueError: they contradict each other or make no sense.
    """
    options = {"bucket_mb": bucket_mb, "clip_value": clip_value}
    if not step_in_backward:
        for name, value in options.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value} needs step_in_backward=True; an ordinary step has no "
                    "buckets, and torch.nn.utils.clip_grad_value_ clips for it"
                )
        return None
    if differentiable:
        raise ValueError(
            "step_in_backward=True cannot be differentiable: it lets go of the graph's "
            "gradients while backward runs"
        )
    for name, value in options.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"Invalid {name} value: {value}; it has to be finite and not < 0")
    return bucket_mb, clip_value
