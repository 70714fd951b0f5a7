"""Who is compared: this package's optimizers, every form of stock, and other packages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_freeze import FrozenAwareAdamW, FrozenAwareSGD

from .checks import MissingPackageError, require
from .records import OURS

Groups = Sequence[Sequence[nn.Parameter]]
ParamGroups = list[dict[str, Any]]
Hyper = Mapping[str, Any]
"""The hyper-parameters that every contestant's constructor gets, by name."""
Scope = Literal["all", "filter"]


@dataclass(frozen=True)
class Family:
    """All that is particular to one optimizer: nothing else in the benchmark knows any."""

    key: str
    """The name that ``--optimizer`` takes."""
    ours: Callable[..., torch.optim.Optimizer]
    stock: Callable[..., torch.optim.Optimizer]
    hyper: Mapping[str, Hyper]
    """By kind of workload. The memory case without state is left out where ``plain`` is absent."""
    buffers: Callable[[Hyper], tuple[str, ...]]
    """The keys of the tensors in a parameter's state that are as large as the parameter."""
    keywords: Mapping[str, str] = field(default_factory=dict)
    """What ours calls ``frozen_state`` and ``state_dtype``, if something else."""
    forms: tuple[str, ...] = ()
    """Forms of stock's whose arithmetic ours has, too; ours is then compared in each of them."""
    packages: Mapping[str, Make] = field(default_factory=dict)
    """Other packages that compute the same; those that are installed join the speed suites."""
    in_memory: tuple[Contestant, ...] = ()
    """Other packages' contestants of the memory suite."""
    without: Mapping[str, str] = field(default_factory=dict)
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

    @property
    def everyone(self) -> tuple[Contestant, ...]:
        """The contestants of the memory suite."""
        return (*IN_MEMORY, *self.in_memory)

    def memory(self, plan: str) -> list[Contestant]:
        """Those of them that take part in a kind of plan."""
        return [c for c in self.everyone if plan in c.plans.split()]


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in one parameter's state, also those that are wrapped, as flashoptim's are."""
    values = {k: v.materialize() if hasattr(v, "materialize") else v for k, v in state.items()}
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def hook_on(p: nn.Parameter, hook: Callable[[Tensor], None]) -> Any:
    """Call ``hook`` when the gradient of ``p`` has arrived, also if ``p`` is frozen at first."""
    trained = p.requires_grad
    p.requires_grad_(True)  # a frozen parameter accepts no hook, but keeps one that it has
    handle = p.register_post_accumulate_grad_hook(hook)
    p.requires_grad_(trained)
    return handle


class Trainer:
    """A contestant at work: any torch optimizer, used as its documentation says."""

    names: Mapping[str, str] = {}
    """Stock's keys of the state, by this optimizer's, where they differ."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.step: Callable[[], object] = optimizer.step

    def zero_grad(self) -> None:
        """Release the gradients that the optimizer owns."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        torch.autograd.backward(loss)

    @property
    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        """Those that hold the state."""
        return (self.optimizer,)

    def held(self, p: Tensor) -> dict[str, Tensor]:
        """The tensors in a parameter's state, as they are stored."""
        return next((tensors_of(o.state[p]) for o in self.optimizers if p in o.state), {})

    def buffers(self, p: Tensor) -> dict[str, Tensor]:
        """The tensors in a parameter's state, by stock's keys and in full precision."""
        return {self.names.get(key, key): tensor for key, tensor in self.held(p).items()}

    def state(self) -> list[Tensor]:
        """Everything that is kept from one iteration to the next."""
        states = (state for o in self.optimizers for state in o.state.values())
        return [tensor for state in states for tensor in tensors_of(state).values()]

    def frozen_set_changed(self) -> None:
        """Do what this contestant's user has to do then: usually nothing."""

    def close(self) -> None:
        """Remove the hooks from the parameters, if there is a way."""
        getattr(self.optimizer, "close", lambda: None)()


Make = Callable[[Family, ParamGroups, Hyper, nn.Module], Trainer]
"""Takes the param groups, and the model that they come from."""


class Rebuilt(Trainer):
    """Stock on what trains; when the frozen set changes, a new optimizer replaces it."""

    def __init__(self, make: Callable[[], torch.optim.Optimizer], clear: nn.Module | None) -> None:
        self._make, self._clear = make, clear
        super().__init__(make())

    def frozen_set_changed(self) -> None:
        """Make a new optimizer; a careful user first clears the gradients of the whole model."""
        if self._clear is not None:
            self._clear.zero_grad()
        super().__init__(self._make())


class OnePerParameter(Trainer):
    """One stock optimizer per parameter, stepped by a hook as soon as the gradient is there.

    The idea is from torch's tutorial "How to save memory by fusing the optimizer step into the
    backward pass".
    """

    def __init__(self, family: Family, groups: ParamGroups, hyper: Hyper, _: nn.Module) -> None:
        parameters = [p for group in groups for p in group["params"]]
        self._own: Mapping[Any, torch.optim.Optimizer] = {
            p: family.stock([p], **hyper, foreach=False) for p in parameters
        }
        self.optimizer = self._own[parameters[0]]
        self._hooks = [hook_on(p, self._arrived) for p in parameters]
        self.step = lambda: None  # nothing is left to do after backward

    @property
    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        """All of them."""
        return self._own.values()

    def _arrived(self, p: Tensor) -> None:
        self._own[p].step()
        self._own[p].zero_grad()

    def zero_grad(self) -> None:
        """Nothing to do: every gradient is freed when it has been applied."""

    def close(self) -> None:
        """Remove the hooks; parameter and hook would keep each other alive."""
        for hook in self._hooks:
            hook.remove()


class Optimi(Trainer):
    """optimi's AdamW, which keeps the moments corrected for their bias."""

    _betas: Mapping[str, float] = {"exp_avg": 0.9, "exp_avg_sq": 0.999}

    def __init__(self, family: Family, groups: ParamGroups, hyper: Hyper, *_: nn.Module) -> None:
        made = require("optimi", "torch-optimi").AdamW
        given = {"betas": tuple(self._betas.values()), "eps": 1e-8, **hyper}
        super().__init__(made(groups, **given, gradient_release=isinstance(self, Released)))

    def buffers(self, p: Tensor) -> dict[str, Tensor]:
        """The moments without the correction."""
        state = self.optimizer.state.get(p, {})
        count = state.get("step", self.optimizer.param_groups[0].get("step"))
        return {
            key: state[key] * (1 - beta ** count.item())
            for key, beta in self._betas.items()
            if key in state
        }


class Released(Trainer):
    """An optimizer whose hooks apply each gradient and free it at once."""

    _remove: Callable[[], object]

    def _release(self, remove: Callable[[], object]) -> None:
        self.step = lambda: None  # nothing is left to do after backward
        self._remove = remove

    def zero_grad(self) -> None:
        """Nothing to do: every gradient is freed when it has been applied."""

    def close(self) -> None:
        """Remove the hooks."""
        self._remove()


class OptimiReleased(Released, Optimi):
    """The same with gradient release."""

    def __init__(self, family: Family, groups: ParamGroups, hyper: Hyper, _: nn.Module) -> None:
        super().__init__(family, groups, hyper)
        package, owned = require("optimi", "torch-optimi"), _owned(groups)
        # The hooks that are there are those that measure.
        package.prepare_for_gradient_release(owned, self.optimizer, ignore_existing_hooks=True)
        self._release(partial(package.remove_gradient_release, owned))


class FlashReleased(Released):
    """flashoptim's AdamW with gradient release; its state in 8 bits is for GPUs alone."""

    def __init__(self, family: Family, groups: ParamGroups, hyper: Hyper, _: nn.Module) -> None:
        package = require("flashoptim", "flashoptim")
        options = flashoptim_options(groups[0]["params"][0].is_cuda)
        super().__init__(package.FlashAdamW(groups, **hyper, **options))
        self._release(package.enable_gradient_release(_owned(groups), self.optimizer).remove)


def _owned(groups: ParamGroups) -> nn.Module:
    return nn.ParameterList(p for group in groups for p in group["params"])


def flashoptim_options(on_gpu: bool) -> dict[str, Any]:
    """All of its precision kept, so that it computes what the others do."""
    return {"quantize": False, "fused": on_gpu, "master_weight_bits": None}


class Lomo(Trainer):
    """LOMO: plain SGD in hooks on the gradients, with a backward of its own.

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources", 2023 (arXiv 2306.09782).
    """

    def __init__(self, family: Family, groups: ParamGroups, hyper: Hyper, model: nn.Module) -> None:
        made = require("lomo_optim", "lomo-optim").Lomo
        super().__init__(made(model, lr=hyper["lr"], weight_decay=hyper["weight_decay"]))
        self.step = lambda: None  # nothing is left to do after backward
        fused: Any = self.optimizer
        self._fused_backward = partial(fused.fused_backward, lr=hyper["lr"])

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients and apply each when the next one arrives."""
        self._fused_backward(loss)


class EightBit(Trainer):
    """One of bitsandbytes' optimizers with a state of one byte per element."""

    def __init__(self, name: str, family: Family, groups: ParamGroups, hyper: Hyper) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about 4-bit kernels
        package = require("bitsandbytes", "bitsandbytes")
        self._unpack, self._keys = package.functional.dequantize_blockwise, family.buffers(hyper)
        super().__init__(getattr(package.optim, name)(groups, **hyper))

    def buffers(self, p: Tensor) -> dict[str, Tensor]:
        """The state unpacked; small parameters have it in full precision."""
        state, found = self.optimizer.state.get(p, {}), {}
        for number, key in enumerate(self._keys, start=1):
            packed = state.get(f"state{number}")
            if isinstance(packed, Tensor) and packed.dtype == torch.uint8:
                scale, code = state[f"absmax{number}"], state[f"qmap{number}"]
                packed = self._unpack(packed, absmax=scale, code=code, blocksize=256)
            if isinstance(packed, Tensor):
                found[key] = packed
        return found


def ours(**options: Any) -> Make:
    """This package's optimizer, its options by the names that ``Family.keywords`` translates."""

    def make(family: Family, groups: ParamGroups, hyper: Hyper, _: nn.Module) -> Trainer:
        given = {family.keywords.get(name, name): value for name, value in options.items()}
        return Trainer(family.ours(groups, **hyper, **given))

    return make


def stock(**options: bool) -> Make:
    """Stock with one of its implementations."""
    return lambda family, groups, hyper, _: Trainer(family.stock(groups, **hyper, **options))


def package(
    module: str,
    name: str,
    pip_name: str,
    options: Callable[[bool], Mapping[str, Any]] = lambda on_gpu: {},
    names: Mapping[str, str] = MappingProxyType({}),
) -> Make:
    """Another package's optimizer, with options that make it compute what stock does."""

    def make(family: Family, groups: ParamGroups, hyper: Hyper, _: nn.Module) -> Trainer:
        kind = attrgetter(name)(require(module, pip_name))
        made = Trainer(kind(groups, **hyper, **options(groups[0]["params"][0].is_cuda)))
        made.names = names
        return made

    return make


def eight_bit(name: str) -> Make:
    """An optimizer of bitsandbytes by its name."""
    return lambda family, groups, hyper, _: EightBit(name, family, groups, hyper)


def _rebuilt(*, clear: bool) -> Make:
    def build(family: Family, groups: ParamGroups, hyper: Hyper, model: nn.Module) -> Trainer:
        def make() -> torch.optim.Optimizer:
            kept = [p for group in groups for p in group["params"] if p.requires_grad]
            return family.stock(kept, **hyper, fused=True)

        return Rebuilt(make, model if clear else None)

    return build


@dataclass(frozen=True)
class Contestant:
    """One way to train a model that may be frozen in part."""

    key: str
    """The name in the records: ``"ours"``, ``"filter/fused"``."""
    make: Make
    plans: str = ""
    """What it takes part in of the memory suite: runs with ``state``, ``plain`` ones without,
    ``changes`` of the frozen set, and ``time``."""
    precision: torch.dtype = torch.float32
    """Of the state, at most."""
    after: Literal["keeps", "restarts", "rebuilds"] = "keeps"
    """What happens to the state of a parameter that is frozen for a while: it stays; it starts from
    zero; or all state starts from zero, because the optimizer is a new one."""
    drops: bool = False
    """Whether it frees the state of what is frozen."""
    scope: Scope = "all"
    """Which parameters the optimizer gets: all, or only those that require a gradient."""

    @property
    def ours(self) -> bool:
        """Whether it is an optimizer of this package."""
        return self.key.startswith(OURS)

    def build(
        self, family: Family, groups: Groups, hyper: Hyper, model: nn.Module | None = None
    ) -> Trainer:
        """Make the optimizer over ``groups``, which are those of ``model``, if there is one."""
        kept = [[p for p in group if self.scope == "all" or p.requires_grad] for group in groups]
        param_groups = [{"params": group} for group in kept if group]
        return self.make(family, param_groups, hyper, model or nn.Module())


FORMS = {"default": stock(), "foreach": stock(foreach=True), "fused": stock(fused=True)}
FROZEN_AWARE = Contestant(OURS, ours(), "state plain changes time")
REFERENCE = Contestant("filter/for-loop", stock(foreach=False), scope="filter")
"""The result that everyone has to reach: stock, one trainable parameter after the other."""


def select(
    any_frozen: bool = False,
    packages: Mapping[str, Make] | None = None,
    forms: Sequence[str] = (),
) -> list[Contestant]:
    """The contestants for one workload: ours first, then stock, then other packages.

    With nothing frozen ``filter`` keeps every parameter, so only the scope ``all`` is run.
    """
    scopes: list[Scope] = ["all", "filter"] if any_frozen else ["all"]
    found = [Contestant(f"{s}/{f}", FORMS[f], scope=s) for s in scopes for f in FORMS]
    others = [Contestant(k, make, scope=scopes[-1]) for k, make in (packages or {}).items()]
    mine = [Contestant(f"{OURS}/{form}", ours(**{form: True})) for form in forms]
    return [FROZEN_AWARE, *mine, *found, *others]


def installed(family: Family, device: torch.device) -> tuple[dict[str, Make], dict[str, str]]:
    """The other packages that can be compared on a device, and why the rest cannot, by name."""
    found, left_out = {}, dict(family.without)
    for name, make in family.packages.items():
        p = nn.Parameter(torch.ones(8, device=device))
        p.grad = torch.ones_like(p)
        try:
            make(family, [{"params": [p]}], family.hyper["steps"], nn.Module()).step()
        except MissingPackageError as missing:
            left_out[name] = str(missing)
        except Exception as error:  # whatever a package that does not fit may raise
            left_out[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = make
    return found, left_out


def _in_backward(name: str, plans: str, **options: Any) -> Contestant:
    key = f"{OURS}/in backward{name and ', '}{name}"
    return Contestant(key, ours(step_in_backward=True, **options), plans)


def _stock(form: str, plans: str) -> Contestant:
    return Contestant(f"stock/{form}", FORMS[form], plans)


IN_BACKWARD = _in_backward("", "state plain changes time")
NO_BUCKET = _in_backward("no bucket", "state plain time", bucket_mb=0.0)
_BF16 = _in_backward("bf16", "state", state_dtype=torch.bfloat16)
IN_BACKWARD_BF16 = replace(_BF16, precision=torch.bfloat16)
_DROP = _in_backward("drop", "changes", frozen_state="drop")
IN_BACKWARD_DROP = replace(_DROP, after="restarts", drops=True)
RESET = Contestant("ours/reset", ours(frozen_state="reset"), "changes", after="restarts")
DROP = replace(RESET, key="ours/drop", make=ours(frozen_state="drop"), drops=True)
DEFAULT = _stock("default", "state plain changes time")
FOREACH = _stock("foreach", "state plain")
FUSED = _stock("fused", "state plain changes time")
HOOKS = Contestant("stock/one per parameter", OnePerParameter, "state plain changes time")
REBUILT = Contestant(
    "stock/rebuilt", _rebuilt(clear=False), "changes", after="rebuilds", drops=True
)
REBUILT_CLEARED = replace(REBUILT, key="stock/rebuilt, cleared", make=_rebuilt(clear=True))
IN_MEMORY = (
    *(FROZEN_AWARE, RESET, DROP, IN_BACKWARD, NO_BUCKET, IN_BACKWARD_BF16, IN_BACKWARD_DROP),
    *(DEFAULT, FOREACH, FUSED, HOOKS, REBUILT, REBUILT_CLEARED),
)
"""The memory suite's contestants from this package and from torch."""

_USUAL = {"momentum": 0.9, "weight_decay": 1e-4}
SGD = Family(
    key="sgd",
    ours=FrozenAwareSGD,
    stock=torch.optim.SGD,
    hyper={
        "steps": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0},
        "model": {"lr": 1e-3, **_USUAL},
        "flat": {"lr": 0.1, **_USUAL},  # a rate at which bfloat16 moves
        "memory": {"lr": 0.05, **_USUAL},  # two steps move the weights visibly
        "plain": {"lr": 0.05, "momentum": 0.0, "weight_decay": 1e-4},
        "digits": {"lr": 0.05, **_USUAL},
    },
    buffers=lambda hyper: ("momentum_buffer",) if hyper["momentum"] else (),
    keywords={"frozen_state": "frozen_momentum", "state_dtype": "momentum_dtype"},
    packages={
        "flashoptim": package(
            "flashoptim",
            "FlashSGD",
            "flashoptim",
            flashoptim_options,
        ),
        "optimi": package("optimi", "SGD", "torch-optimi", names={"exp_avg": "momentum_buffer"}),
        "apex": package("apex.optimizers", "FusedSGD", "git+https://github.com/NVIDIA/apex"),
    },
    in_memory=(
        # Without a momentum it refuses to run.
        Contestant("bitsandbytes SGD8bit", eight_bit("SGD8bit"), "state changes", torch.uint8),
        Contestant("LOMO", Lomo, "plain"),
    ),
    without={
        "torchao": "has only Adam; its CPUOffloadOptimizer accepts gradients only in backward"
    },
)
_DECAY = {"lr": 1e-3, "weight_decay": 1e-2}
ADAMW = Family(
    key="adamw",
    ours=FrozenAwareAdamW,
    stock=torch.optim.AdamW,
    hyper={
        "steps": _DECAY,
        "model": _DECAY,
        "flat": {"lr": 0.1, "weight_decay": 1e-2},  # a rate at which bfloat16 moves
        "memory": {"lr": 0.01, "weight_decay": 1e-2},  # two steps move the weights visibly
        "digits": {"lr": 2e-3, "weight_decay": 1e-2},
    },
    buffers=lambda hyper: ("exp_avg", "exp_avg_sq"),
    keywords={"state_dtype": "moment_dtype"},
    forms=("fused",),
    packages={
        "flashoptim": package(
            "flashoptim",
            "FlashAdamW",
            "flashoptim",
            flashoptim_options,
        ),
        "optimi": Optimi,
        "bitsandbytes": package(
            "bitsandbytes",
            "optim.AdamW32bit",
            "bitsandbytes",
            names={"state1": "exp_avg", "state2": "exp_avg_sq"},
        ),
        "apex": package("apex.optimizers", "FusedAdam", "git+https://github.com/NVIDIA/apex"),
    },
    in_memory=(
        # Their hooks are on what trains when they are made: the frozen set may not change later.
        Contestant("optimi in backward", OptimiReleased, "state"),
        Contestant("flashoptim in backward", FlashReleased, "state"),
        Contestant("bitsandbytes AdamW8bit", eight_bit("AdamW8bit"), "state changes", torch.uint8),
    ),
    without={
        "torchao": "its AdamW forms for training keep the state in 8 or 4 bits, and compile their "
        "step for each shape of a parameter, which takes minutes for these models"
    },
)
FAMILIES = {family.key: family for family in (SGD, ADAMW)}
