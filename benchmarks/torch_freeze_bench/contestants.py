"""Who is compared: this package's optimizers, every form of stock, and other packages."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_freeze import FrozenAwareSGD

from .records import OURS
from .workloads import Groups, Hyper, MissingPackageError, require

Scope = Literal["all", "filter"]
ParamGroups = list[dict[str, Any]]


class UnableError(RuntimeError):
    """A contestant cannot be run here; the message says why."""


@dataclass(frozen=True)
class Package:
    """Another package's implementation of an optimizer."""

    module: str
    name: str
    install: str
    options: Callable[[bool], dict[str, Any]] = lambda on_gpu: {}


@dataclass(frozen=True)
class Family:
    """An optimizer of this package, and the stock one that it has to agree with."""

    key: str
    """The name that ``--optimizer`` takes."""
    ours: type[torch.optim.Optimizer]
    stock: Callable[..., torch.optim.Optimizer]
    arguments: Callable[[Hyper], dict[str, Any]]
    """What both constructors take."""
    buffers: Callable[[Hyper], tuple[str, ...]]
    """The keys of the tensors in a parameter's state that are as large as the parameter."""
    packages: Mapping[str, Package]
    without: Mapping[str, str]
    """Packages that one might expect here, and why they are absent."""

    @property
    def name(self) -> str:
        """The name of this package's optimizer."""
        return self.ours.__name__

    def label(self, key: str) -> str:
        """A contestant's name in tables."""
        short = key.replace("in backward, ", "in bw., ").replace("/", " ", 1)
        return short.replace(OURS, self.name, 1)

    def step_bytes(self, trainable: Iterable[Tensor], hyper: Hyper) -> int:
        """Bytes an update must move: read p and g, write p; read and write each buffer."""
        streams = 3 + 2 * len(self.buffers(hyper))
        return sum(streams * p.nbytes for p in trainable)


SGD = Family(
    key="sgd",
    ours=FrozenAwareSGD,
    stock=torch.optim.SGD,
    arguments=asdict,
    buffers=lambda hyper: ("momentum_buffer",) if hyper.momentum else (),
    packages={
        "flashoptim": Package(
            "flashoptim",
            "FlashSGD",
            "pip install flashoptim",
            # All of its precision kept, so that it computes what the others do.
            lambda on_gpu: {"quantize": False, "fused": on_gpu, "master_weight_bits": None},
        ),
        "apex": Package(
            "apex.optimizers",
            "FusedSGD",
            "needs a CUDA GPU; from source, https://github.com/NVIDIA/apex",
        ),
    },
    without={
        "torchao": "has only Adam; its CPUOffloadOptimizer accepts gradients only in backward"
    },
)
FAMILIES = {family.key: family for family in (SGD,)}


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in one parameter's state, also those that are wrapped, as flashoptim's are."""
    values = {k: v.materialize() if hasattr(v, "materialize") else v for k, v in state.items()}
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


class Trainer:
    """A contestant at work: any torch optimizer, used as its documentation says."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.use(optimizer)

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Train with this optimizer from now on."""
        self.optimizer = optimizer
        self.step: Callable[[], object] = optimizer.step

    def zero_grad(self) -> None:
        """Release the gradients that the optimizer owns."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        torch.autograd.backward(loss)

    def buffers(self, p: Tensor) -> dict[str, Tensor]:
        """The tensors in a parameter's state, by stock's keys and in full precision."""
        return self.held(p)

    def held(self, p: Tensor) -> dict[str, Tensor]:
        """The tensors in a parameter's state, as they are stored."""
        return tensors_of(self.optimizer.state.get(p, {}))

    def state(self) -> list[Tensor]:
        """Everything that is kept from one iteration to the next."""
        return [t for state in self.optimizer.state.values() for t in tensors_of(state).values()]

    @property
    def bucket(self) -> int:
        """Bytes of gradients that are collected before they are applied in backward."""
        return int(getattr(self.optimizer, "bucket_bytes", 0))

    def frozen_set_changed(self) -> None:
        """Do what this contestant's user has to do then: usually nothing."""

    def close(self) -> None:
        """Remove the hooks from the parameters, if there is a way."""
        getattr(self.optimizer, "close", lambda: None)()


class Compiled(Trainer):
    """A stock optimizer whose step runs through torch.compile."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        # Each optimizer is traced on its own: earlier ones count against dynamo's limit.
        torch._dynamo.reset()

        def step() -> None:
            optimizer.step()

        self.step = torch.compile(step)


class Rebuilt(Trainer):
    """Stock on what trains; when the frozen set changes, a new optimizer replaces it."""

    def __init__(self, make: Callable[[], torch.optim.Optimizer], clear: nn.Module | None) -> None:
        self._make, self._clear = make, clear
        super().__init__(make())

    def frozen_set_changed(self) -> None:
        """Make a new optimizer; a careful user first clears the gradients of the whole model."""
        if self._clear is not None:
            self._clear.zero_grad()
        self.use(self._make())


class OnePerParameter(Trainer):
    """One stock optimizer per parameter, stepped by a hook as soon as the gradient is there.

    The idea is from torch's tutorial "How to save memory by fusing the optimizer step into the
    backward pass".
    """

    bucket = 0

    def __init__(self, optimizers: Mapping[nn.Parameter, torch.optim.Optimizer]) -> None:
        self._optimizers: Mapping[Any, torch.optim.Optimizer] = optimizers
        self._hooks = [hook_on(p, self._arrived) for p in optimizers]
        self.step = lambda: None  # nothing is left to do after backward

    def _arrived(self, p: Tensor) -> None:
        self._optimizers[p].step()
        self._optimizers[p].zero_grad()

    def zero_grad(self) -> None:
        """Nothing to do: every gradient is freed when it has been applied."""

    def held(self, p: Tensor) -> dict[str, Tensor]:
        """The state in the parameter's own optimizer."""
        return tensors_of(self._optimizers[p].state.get(p, {})) if p in self._optimizers else {}

    def state(self) -> list[Tensor]:
        """The state of all optimizers."""
        return [t for p in self._optimizers for t in self.held(p).values()]

    def close(self) -> None:
        """Remove the hooks; parameter and hook would keep each other alive."""
        for hook in self._hooks:
            hook.remove()


class Lomo(Trainer):
    """LOMO: plain SGD in hooks on the gradients, with a backward of its own.

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources", 2023 (arXiv 2306.09782).
    """

    def __init__(self, model: nn.Module, hyper: Hyper) -> None:
        package = _package("lomo_optim", "lomo-optim")
        self._lr = hyper.lr
        super().__init__(package.Lomo(model, lr=hyper.lr, weight_decay=hyper.weight_decay))
        self.step = lambda: None  # nothing is left to do after backward

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients and apply each when the next one arrives."""
        optimizer: Any = self.optimizer
        optimizer.fused_backward(loss, self._lr)


class EightBit(Trainer):
    """bitsandbytes' SGD, whose momentum takes one byte per element."""

    def __init__(self, groups: ParamGroups, hyper: Hyper) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about 4-bit kernels
        package = _package("bitsandbytes", "bitsandbytes")
        self._functional = package.functional
        super().__init__(
            package.optim.SGD8bit(groups, hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay)
        )

    def buffers(self, p: Tensor) -> dict[str, Tensor]:
        """The momentum unpacked; small parameters have it in full precision."""
        state = self.optimizer.state.get(p, {})
        packed = state.get("state1")
        if not isinstance(packed, Tensor):
            return {}
        if packed.dtype == torch.uint8:
            packed = self._functional.dequantize_blockwise(
                packed, absmax=state["absmax1"], code=state["qmap1"], blocksize=256
            )
        return {"momentum_buffer": packed}


def _package(name: str, pip_name: str) -> Any:
    try:
        return require(name, pip_name, "this contestant")
    except MissingPackageError as missing:
        raise UnableError(str(missing)) from None


def hook_on(p: nn.Parameter, hook: Callable[[Tensor], None]) -> Any:
    """Call ``hook`` when the gradient of ``p`` has arrived, also if ``p`` is frozen at first."""
    trained = p.requires_grad
    p.requires_grad_(True)  # a frozen parameter accepts no hook, but keeps one that it has
    handle = p.register_post_accumulate_grad_hook(hook)
    p.requires_grad_(trained)
    return handle


Make = Callable[[Family, ParamGroups, Hyper, nn.Module], Trainer]
"""Takes the param groups, and the model that they come from."""


def _ours(**options: Any) -> Make:
    return lambda family, groups, hyper, _: Trainer(
        family.ours(groups, **family.arguments(hyper), **options)
    )


def _stock(trainer: type[Trainer] = Trainer, **options: bool) -> Make:
    return lambda family, groups, hyper, _: trainer(
        family.stock(groups, **family.arguments(hyper), **options)
    )


def _other(name: str) -> Make:
    def make(family: Family, groups: ParamGroups, hyper: Hyper, _: nn.Module) -> Trainer:
        package = family.packages[name]
        kind = getattr(importlib.import_module(package.module), package.name)
        options = package.options(groups[0]["params"][0].is_cuda)
        return Trainer(kind(groups, **family.arguments(hyper), **options))

    return make


def _one_per_parameter(family: Family, groups: ParamGroups, hyper: Hyper, _: nn.Module) -> Trainer:
    given = family.arguments(hyper) | {"foreach": False}
    parameters = [p for group in groups for p in group["params"]]
    return OnePerParameter({p: family.stock([p], **given) for p in parameters})


def _rebuilt(*, clear: bool) -> Make:
    def build(family: Family, groups: ParamGroups, hyper: Hyper, model: nn.Module) -> Trainer:
        def make() -> torch.optim.Optimizer:
            kept = [p for group in groups for p in group["params"] if p.requires_grad]
            return family.stock(kept, **family.arguments(hyper), fused=True)

        return Rebuilt(make, model if clear else None)

    return build


@dataclass(frozen=True)
class Contestant:
    """One way to train a model that may be frozen in part."""

    key: str
    """The name in the records: ``"ours"``, ``"filter/fused"``."""
    make: Make
    scope: Scope = "all"
    """Which parameters the optimizer gets: all, or only those that require a gradient."""
    family: Family = SGD
    precision: torch.dtype = torch.float32
    """Of the state, at most."""
    after: Literal["keeps", "restarts", "rebuilds"] = "keeps"
    """What happens to the state of a parameter that is frozen for a while: it stays; it starts from
    zero; or all state starts from zero, because the optimizer is a new one."""
    drops: bool = False
    """Whether it frees the state of what is frozen."""
    cyclic: bool = False
    """Whether its hooks stay and hold the model, so that only Python's collector frees them."""

    @property
    def ours(self) -> bool:
        """Whether it is an optimizer of this package."""
        return self.key.startswith(OURS)

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.family.label(self.key)

    def build(self, groups: Groups, hyper: Hyper, model: nn.Module | None = None) -> Trainer:
        """Make the optimizer over ``groups``, which are those of ``model``, if there is one.

        Raises:
            RuntimeError: this contestant cannot be run on these parameters.
        """
        kept = [[p for p in group if self.scope == "all" or p.requires_grad] for group in groups]
        param_groups = [{"params": group} for group in kept if group]
        return self.make(self.family, param_groups, hyper, model or nn.Module())


_FORMS: dict[str, Make] = {
    "default": _stock(),
    "foreach": _stock(foreach=True),
    "fused": _stock(fused=True),
    "compiled": _stock(Compiled, foreach=True),
    "for-loop": _stock(foreach=False),
}
FROZEN_AWARE = Contestant(OURS, _ours())


def stock(form: str, scope: Scope = "all") -> Contestant:
    """One of stock's implementations on all or on the filtered parameters."""
    return Contestant(f"{scope}/{form}", _FORMS[form], scope)


REFERENCE = stock("for-loop", "filter")
"""The result that everyone has to reach: stock, one trainable parameter after the other."""


def other_packages(family: Family, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The other packages that can be compared on a device, and why the rest cannot, by name."""
    found, left_out = [], dict(family.without)
    for name, package in family.packages.items():
        p = nn.Parameter(torch.ones(8, device=device))
        p.grad = torch.ones_like(p)
        try:
            Contestant(name, _other(name), family=family).build([[p]], Hyper()).step()
        except ModuleNotFoundError:
            left_out[name] = f"not installed ({package.install})"
        except Exception as error:  # whatever a package that does not fit may raise
            left_out[name] = f"{type(error).__name__}: {error}"
        else:
            found.append(name)
    return found, left_out


def select(
    family: Family = SGD, *, any_frozen: bool, compiled: bool = False, others: Sequence[str] = ()
) -> list[Contestant]:
    """The contestants for one workload: ours first, then stock, then other packages.

    With nothing frozen ``filter`` keeps every parameter, so only the scope ``all`` is run.
    """
    scope: Scope = "filter" if any_frozen else "all"
    scopes: list[Scope] = ["all", "filter"] if any_frozen else ["all"]
    found = [stock(form, each) for each in scopes for form in ("default", "foreach", "fused")]
    found += [stock("compiled", scope)] if compiled else []
    found += [Contestant(name, _other(name), scope) for name in others]
    return [replace(contestant, family=family) for contestant in (FROZEN_AWARE, *found)]


def _in_backward(name: str = "", **options: Any) -> Contestant:
    key = f"{OURS}/in backward" + (f", {name}" if name else "")
    return Contestant(key, _ours(step_in_backward=True, **options))


IN_BACKWARD = _in_backward()
NO_BUCKET = _in_backward("no bucket", bucket_mb=0.0)
IN_BACKWARD_BF16 = replace(
    _in_backward("bf16", momentum_dtype=torch.bfloat16), precision=torch.bfloat16
)
IN_BACKWARD_DROP = replace(
    _in_backward("drop", frozen_momentum="drop"), after="restarts", drops=True
)
RESET = Contestant("ours/reset", _ours(frozen_momentum="reset"), after="restarts")
DROP = Contestant("ours/drop", _ours(frozen_momentum="drop"), after="restarts", drops=True)
DEFAULT, FOREACH, FUSED = (
    Contestant(f"stock/{form}", _FORMS[form]) for form in ("default", "foreach", "fused")
)
HOOKS = Contestant("stock/one per parameter", _one_per_parameter)
REBUILT = Contestant("stock/rebuilt", _rebuilt(clear=False), after="rebuilds", drops=True)
REBUILT_CLEARED = replace(REBUILT, key="stock/rebuilt, cleared", make=_rebuilt(clear=True))
EIGHT_BIT = Contestant(
    "bitsandbytes SGD8bit",
    lambda _, groups, hyper, __: EightBit(groups, hyper),
    precision=torch.uint8,
)
LOMO = Contestant("LOMO", lambda _, __, hyper, model: Lomo(model, hyper), cyclic=True)

_ORDINARY = (FROZEN_AWARE, IN_BACKWARD, NO_BUCKET)
WITH_STATE = (*_ORDINARY, IN_BACKWARD_BF16, DEFAULT, FOREACH, FUSED, HOOKS, EIGHT_BIT)
"""Everyone who can train with a momentum."""
WITHOUT_STATE = (*_ORDINARY, DEFAULT, FOREACH, FUSED, HOOKS, LOMO)
"""Everyone who can train without one: LOMO has none, SGD8bit requires one."""
CHANGING = (
    *(FROZEN_AWARE, RESET, DROP, IN_BACKWARD, IN_BACKWARD_DROP),
    *(DEFAULT, FUSED, HOOKS, EIGHT_BIT, REBUILT, REBUILT_CLEARED),
)
"""Everyone who allows the frozen set to change during training."""
_TIMED = (*_ORDINARY, DEFAULT, FUSED, HOOKS)
_BUCKETS_ON_GPU = (4, 16, 64, 256)
"""MiB, from well within a GPU's L2 cache to well beyond it: the default is chosen by these."""


def timed(device: str) -> tuple[Contestant, ...]:
    """Whose iterations are timed; on a GPU with several bucket sizes."""
    sizes = _BUCKETS_ON_GPU if device == "cuda" else ()
    return (*_TIMED, *(_in_backward(f"{size} MiB", bucket_mb=float(size)) for size in sizes))
