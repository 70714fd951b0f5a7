"""The two strategies of an optimizer: apply gradients in `step`, or while backward runs.

An optimizer has one of them and calls it at the same points whichever it is, so nothing else has
to ask which.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

from torch_freeze._build import load_extension

_C = load_extension()

_Groups = list[dict[str, Any]]


class InStep:
    """Apply all gradients in `step`, as torch does. There is nothing to check or to clean up."""

    bucket_bytes = 0

    def attach(self, groups: _Groups) -> None:
        """Check that no other optimizer steps the last group's parameters in backward."""
        _C.BackwardStep.check_free(groups[-1:], len(groups) - 1)

    def begin_step(self, groups: _Groups, scaling: dict[str, Any]) -> None:
        """Do nothing."""

    def end_step(self, groups: _Groups) -> None:
        """Do nothing."""

    def check_between_steps(self, function: str) -> None:
        """Do nothing: no step is ever half done."""

    def check_zero_grad(self, set_to_none: bool) -> None:
        """Do nothing: gradients may be reset at any time."""

    def close(self) -> None:
        """Do nothing: there are no hooks to remove."""


class InBackward:
    """Collect gradients in buckets while backward runs, apply each bucket, and free it at once."""

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
        """Hook the parameters of new groups too."""
        self._steps.attach(groups)

    def begin_step(self, groups: _Groups, scaling: dict[str, Any]) -> None:
        """Raise unless the gradients applied in backward and those left make one whole step."""
        # With these check_step raises, and GradScaler would then leave them on the optimizer.
        given = scaling.pop("grad_scale", None), scaling.pop("found_inf", None)
        self._steps.check_step(groups, *given)

    def end_step(self, groups: _Groups) -> None:
        """Let the next backward begin the next step."""
        self._steps.end_step(groups)

    def check_between_steps(self, function: str) -> None:
        """Raise if backward has applied some of the gradients and `step` has not been called."""
        self._steps.check_between_steps(function)

    def check_zero_grad(self, set_to_none: bool) -> None:
        """Raise if backward has applied some of the gradients and `step` has not been called."""
        self._steps.check_zero_grad(set_to_none)

    def close(self) -> None:
        """Remove the hooks; gradients that were not applied stay in ``.grad``."""
        self._steps.close()


IN_STEP = InStep()


def check_options(
    step_in_backward: bool,
    bucket_mb: float | None,
    clip_value: float | None,
    differentiable: bool,
) -> tuple[float | None, float | None] | None:
    """Check the constructor's options for stepping in backward.

    Returns:
        (bucket_mb, clip_value) for `InBackward`; None for `InStep`.

    Raises:
        ValueError: the options contradict each other or are out of range.
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
            "step_in_backward=True cannot be differentiable: it frees the graph's gradients "
            "while backward runs"
        )
    for name, value in options.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"Invalid {name} value: {value}; it must be finite and at least 0")
    return bucket_mb, clip_value
