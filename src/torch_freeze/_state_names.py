"""What each optimizer keeps for a parameter, by the names in its state and its param groups."""

from __future__ import annotations

from typing import NamedTuple


class StateNames(NamedTuple):
    """The keys of a parameter's state, and the options of a param group that concern it."""

    buffers: tuple[str, ...]  # tensors of the parameter's shape
    counter: str | None  # of updates: a tensor of one element
    stale: str  # marks buffers that start from zero at the next step
    policy: str  # option: what becomes of a frozen parameter's state, a FrozenState
    dtype: str  # option: of the buffers
    seed: str  # option: of their stochastic rounding

    @property
    def all(self) -> tuple[str, ...]:
        """The keys of a state that is not stale."""
        return self.buffers if self.counter is None else (self.counter, *self.buffers)


SGD = StateNames(
    buffers=("momentum_buffer",),
    counter=None,
    stale="momentum_stale",
    policy="frozen_momentum",
    dtype="momentum_dtype",
    seed="momentum_seed",
)
ADAM = StateNames(
    buffers=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    counter="step",
    stale="state_stale",
    policy="frozen_state",
    dtype="moment_dtype",
    seed="moment_seed",
)
