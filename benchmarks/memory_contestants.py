"""Who is compared for memory: FrozenAwareSGD, stock SGD, torch's recipe, and other packages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from contestants import Hyper
from measure import state_tensors
from models import MissingPackageError, require
from torch import Tensor, nn

from torch_freeze import FrozenAwareSGD

Precision = Literal["exact", "bfloat16", "8 bit"]
After = Literal["keeps", "restarts", "rebuilds"]
"""What becomes of a momentum whose parameter was frozen for a while: it goes on; it starts from
zero; or all momentum starts from zero, since the optimizer is another."""


class UnableError(RuntimeError):
    """A contestant cannot be run on this workload; the message says why."""


class Trainer(Protocol):
    """One contestant at work on one model."""

    def zero_grad(self) -> None:
        """Begin an iteration."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""

    def step(self) -> None:
        """Make the update, or what is left of it."""

    def momentum(self, p: nn.Parameter) -> Tensor | None:
        """A parameter's momentum buffer in full precision; None if it has none."""

    def held(self, p: nn.Parameter) -> list[Tensor]:
        """What is kept for one parameter."""

    def state(self) -> list[Tensor]:
        """All that is kept from one iteration to the next."""

    def bucket(self) -> int:
        """Bytes of gradients that are collected before they are applied in backward."""

    def frozen_set_changed(self) -> None:
        """Do what this contestant's user has to do then."""

    def close(self) -> None:
        """Take the hooks off the parameters, as far as there is a way."""


class Plain:
    """Any torch optimizer, used as its documentation says."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def zero_grad(self) -> None:
        """Let go of the gradients that the optimizer owns."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        torch.autograd.backward(loss)

    def step(self) -> None:
        """Make the update."""
        self.optimizer.step()

    def momentum(self, p: nn.Parameter) -> Tensor | None:
        """The state's buffer."""
        found = self.optimizer.state.get(p, {}).get("momentum_buffer")
        return found if isinstance(found, Tensor) else None

    def held(self, p: nn.Parameter) -> list[Tensor]:
        """Every tensor in the parameter's state."""
        state = self.optimizer.state.get(p, {})
        return [value for value in state.values() if isinstance(value, Tensor)]

    def state(self) -> list[Tensor]:
        """Every tensor in the state."""
        return state_tensors(self.optimizer)

    def bucket(self) -> int:
        """FrozenAwareSGD's; others collect none."""
        return int(getattr(self.optimizer, "bucket_bytes", 0))

    def frozen_set_changed(self) -> None:
        """Nothing: this optimizer need not know."""

    def close(self) -> None:
        """FrozenAwareSGD has a way of its own; others hang nothing on the parameters."""
        if isinstance(self.optimizer, FrozenAwareSGD):
            self.optimizer.close()


class Rebuilt(Plain):
    """Case 4's recipe where the frozen set changes: a new optimizer over what trains then."""

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        clear: bool,
    ) -> None:
        self._model, self._make, self._clear = model, make, clear
        super().__init__(make(_trainable(model.parameters())))

    def frozen_set_changed(self) -> None:
        """Make a new optimizer; a careful user lets go of what the old one leaves behind."""
        if self._clear:
            self._model.zero_grad()
        self.optimizer = self._make(_trainable(self._model.parameters()))


class OnePerParameter:
    """One stock optimizer for each parameter, stepped by a hook as soon as the gradient is there.

    The idea is that of torch's tutorial "How to save memory by fusing the optimizer step into the
    backward pass".
    """

    def __init__(self, parameters: Sequence[nn.Parameter], hyper: Hyper) -> None:
        self._optimizers: dict[Tensor, torch.optim.SGD] = {}
        self._hooks = []
        for p in parameters:
            self._optimizers[p] = torch.optim.SGD(
                [p], hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay, foreach=False
            )
            trained = p.requires_grad
            p.requires_grad_(True)
            self._hooks.append(p.register_post_accumulate_grad_hook(self._arrived))
            p.requires_grad_(trained)

    def _arrived(self, p: Tensor) -> None:
        self._optimizers[p].step()
        self._optimizers[p].zero_grad()

    def zero_grad(self) -> None:
        """Nothing: no gradient outlives its arrival."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients and apply each."""
        torch.autograd.backward(loss)

    def step(self) -> None:
        """Nothing is left to do."""

    def momentum(self, p: nn.Parameter) -> Tensor | None:
        """The buffer in the state of the parameter's optimizer."""
        return next(iter(self.held(p)), None)

    def held(self, p: nn.Parameter) -> list[Tensor]:
        """The state of the parameter's optimizer."""
        return state_tensors(self._optimizers[p]) if p in self._optimizers else []

    def state(self) -> list[Tensor]:
        """The state of all optimizers."""
        return [t for optimizer in self._optimizers.values() for t in state_tensors(optimizer)]

    def bucket(self) -> int:
        """None: each gradient is applied at once."""
        return 0

    def frozen_set_changed(self) -> None:
        """Nothing: a frozen parameter's hook is not called."""

    def close(self) -> None:
        """Take the hooks off; parameter and hook would hold each other for ever."""
        for hook in self._hooks:
            hook.remove()


class Lomo(Plain):
    """LOMO: plain SGD in hooks on the gradients, with a backward of its own.

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources", 2023 (arXiv 2306.09782).
    """

    def __init__(self, model: nn.Module, hyper: Hyper) -> None:
        package = _package("lomo_optim", "lomo-optim")
        self._lr = hyper.lr
        super().__init__(package.Lomo(model, lr=hyper.lr, weight_decay=hyper.weight_decay))

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients and apply each when the next one arrives."""
        optimizer: Any = self.optimizer
        optimizer.fused_backward(loss, self._lr)

    def step(self) -> None:
        """Nothing is left to do."""


class EightBit(Plain):
    """bitsandbytes' SGD, whose momentum has one byte per element."""

    def __init__(self, parameters: Sequence[nn.Parameter], hyper: Hyper) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels for 4 bits
        package = _package("bitsandbytes", "bitsandbytes")
        self._functional = package.functional
        super().__init__(
            package.optim.SGD8bit(
                parameters, hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay
            )
        )

    def momentum(self, p: nn.Parameter) -> Tensor | None:
        """The momentum unpacked; small parameters have it in full precision."""
        state = self.optimizer.state.get(p, {})
        packed = state.get("state1")
        if not isinstance(packed, Tensor):
            return None
        if packed.dtype != torch.uint8:
            return packed
        found: Tensor = self._functional.dequantize_blockwise(
            packed, absmax=state["absmax1"], code=state["qmap1"], blocksize=256
        )
        return found


def _package(name: str, pip_name: str) -> Any:
    try:
        return require(name, pip_name, "this contestant")
    except MissingPackageError as missing:
        raise UnableError(str(missing)) from None


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


Make = Callable[[nn.Module, Sequence[nn.Parameter], Hyper], Trainer]


@dataclass(frozen=True)
class MemoryContestant:
    """One way to train; ``make`` takes the model, the parameters handed over, and their hypers."""

    key: str
    label: str
    make: Make
    ours: bool = False
    in_backward: bool = False
    precision: Precision = "exact"
    """Of the momentum."""
    after: After = "keeps"
    drops: bool = False
    """Whether it frees the momentum of what is frozen."""
    cyclic: bool = False
    """Whether its hooks stay and hold the model: only Python's collector frees the two."""


def _ours(**options: Any) -> Make:
    def make(model: nn.Module, parameters: Sequence[nn.Parameter], hyper: Hyper) -> Trainer:
        return Plain(
            FrozenAwareSGD(
                parameters, hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay, **options
            )
        )

    return make


def _stock(**options: bool) -> Make:
    def make(model: nn.Module, parameters: Sequence[nn.Parameter], hyper: Hyper) -> Trainer:
        return Plain(_sgd(parameters, hyper, **options))

    return make


def _sgd(parameters: Sequence[nn.Parameter], hyper: Hyper, **options: bool) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters, hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay, **options
    )


def _rebuilt(*, clear: bool, **options: bool) -> Make:
    def make(model: nn.Module, parameters: Sequence[nn.Parameter], hyper: Hyper) -> Trainer:
        return Rebuilt(model, lambda kept: _sgd(kept, hyper, **options), clear=clear)

    return make


OURS = MemoryContestant("ours", "FrozenAwareSGD", _ours(), ours=True)
IN_BACKWARD = MemoryContestant(
    "ours/in backward",
    "FrozenAwareSGD in backward",
    _ours(step_in_backward=True),
    ours=True,
    in_backward=True,
)
IN_BACKWARD_AT_ONCE = MemoryContestant(
    "ours/in backward, at once",
    "FrozenAwareSGD in bw., no bucket",
    _ours(step_in_backward=True, bucket_mb=0.0),
    ours=True,
    in_backward=True,
)
IN_BACKWARD_BF16 = MemoryContestant(
    "ours/in backward, bf16",
    "FrozenAwareSGD in bw., bf16 mom.",
    _ours(step_in_backward=True, momentum_dtype=torch.bfloat16),
    ours=True,
    in_backward=True,
    precision="bfloat16",
)
DEFAULT = MemoryContestant("stock/default", "stock default", _stock())
FOREACH = MemoryContestant("stock/foreach", "stock foreach", _stock(foreach=True))
FUSED = MemoryContestant("stock/fused", "stock fused", _stock(fused=True))
HOOKS = MemoryContestant(
    "stock/one per parameter",
    "stock, one per parameter",
    lambda model, parameters, hyper: OnePerParameter(parameters, hyper),
    in_backward=True,
)
EIGHT_BIT = MemoryContestant(
    "bitsandbytes",
    "bitsandbytes SGD8bit",
    lambda model, parameters, hyper: EightBit(parameters, hyper),
    precision="8 bit",
)
LOMO = MemoryContestant(
    "lomo",
    "LOMO",
    lambda model, parameters, hyper: Lomo(model, hyper),
    in_backward=True,
    cyclic=True,
)
REBUILT = MemoryContestant(
    "rebuilt",
    "stock filter, rebuilt",
    _rebuilt(clear=False, fused=True),
    after="rebuilds",
    drops=True,
)
REBUILT_CLEARED = MemoryContestant(
    "rebuilt, cleared",
    "stock filter, rebuilt, cleared",
    _rebuilt(clear=True, fused=True),
    after="rebuilds",
    drops=True,
)
RESET = MemoryContestant(
    "ours/reset",
    "FrozenAwareSGD, reset",
    _ours(frozen_momentum="reset"),
    ours=True,
    after="restarts",
)
DROP = MemoryContestant(
    "ours/drop",
    "FrozenAwareSGD, drop",
    _ours(frozen_momentum="drop"),
    ours=True,
    after="restarts",
    drops=True,
)
IN_BACKWARD_DROP = MemoryContestant(
    "ours/in backward, drop",
    "FrozenAwareSGD in backward, drop",
    _ours(step_in_backward=True, frozen_momentum="drop"),
    ours=True,
    in_backward=True,
    after="restarts",
    drops=True,
)

WITH_MOMENTUM = (
    OURS,
    IN_BACKWARD,
    IN_BACKWARD_AT_ONCE,
    IN_BACKWARD_BF16,
    DEFAULT,
    FOREACH,
    FUSED,
    HOOKS,
    EIGHT_BIT,
)
"""Everyone who can train with a momentum."""
WITHOUT_MOMENTUM = (OURS, IN_BACKWARD, IN_BACKWARD_AT_ONCE, DEFAULT, FOREACH, FUSED, HOOKS, LOMO)
"""Everyone who can do without: LOMO has none to offer, SGD8bit insists on one."""
CHANGING = (
    OURS,
    RESET,
    DROP,
    IN_BACKWARD,
    IN_BACKWARD_DROP,
    DEFAULT,
    FUSED,
    HOOKS,
    EIGHT_BIT,
    REBUILT,
    REBUILT_CLEARED,
)
"""Everyone for whom the frozen set may change while it trains."""
TIMED = (OURS, IN_BACKWARD, IN_BACKWARD_AT_ONCE, DEFAULT, FUSED, HOOKS)
_BUCKETS_ON_GPU = (4, 16, 64, 256)
"""MiB, from well within a GPU's L2 cache to well beyond it."""


def timed(device: str) -> tuple[MemoryContestant, ...]:
    """Whose iterations are timed; on a GPU with several buckets, to choose the usual one by."""
    if device != "cuda":
        return TIMED
    buckets = (
        replace(
            IN_BACKWARD,
            key=f"ours/in backward, {size} MiB",
            label=f"FrozenAwareSGD in bw., {size} MiB",
            make=_ours(step_in_backward=True, bucket_mb=float(size)),
        )
        for size in _BUCKETS_ON_GPU
    )
    return (*TIMED, *buckets)
