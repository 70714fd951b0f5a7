"""audit: every kind of finding, with cases that cause it and cases that do not."""

from __future__ import annotations

import functools
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torch_freeze
from tests.helpers.models import norm_net
from torch_freeze import (
    FINDING_KINDS,
    Finding,
    FrozenAwareAdamW,
    FrozenAwareSGD,
    audit,
    build_info,
    freeze,
    freeze_except,
    unfreeze,
)

# The function has the same name as the module and hides it.
torch_freeze_audit: Any = sys.modules["torch_freeze.audit"]


def stock(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, **options)


Make = Callable[..., Any]
with_momentum: Make = functools.partial(FrozenAwareSGD, lr=0.1, momentum=0.9)
adamw: Make = functools.partial(FrozenAwareAdamW, lr=0.1)


def back(model: Any) -> None:
    model(torch.randn(4, 3)).square().sum().backward()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"embed": nn.Embedding(6, 4), "mlp": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 6)
        embed: Any = self.body["embed"]
        self.head.weight = embed.weight


Case = Callable[[], tuple[nn.Module, Any]]


def unowned() -> tuple[nn.Module, Any]:
    model = norm_net()
    return model, stock(model[2].parameters())


def _stale() -> tuple[nn.Module, Any]:
    model = norm_net()
    for p in model[0].parameters():
        p.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 3)
    return model, stock(model.parameters())


def _stale_in_ours(make_one: Make = with_momentum) -> tuple[nn.Module, Any]:
    model, _ = _stale()
    return model, make_one(model.parameters())


def _stale_in_ours_and_in_stock() -> tuple[nn.Module, Any]:
    model, optimizer = _stale_in_ours()
    return model, [optimizer, stock([model.get_parameter("0.weight")])]


def _stale_elsewhere() -> tuple[nn.Module, Any]:
    model, _ = _stale()
    return model, stock([p for p in model.parameters() if p.requires_grad])


def no_gradient() -> tuple[nn.Module, Any]:
    model = norm_net()
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    back(model)
    return model, stock(model.parameters())


def compiled_stale() -> tuple[nn.Module, Any]:
    # This is what a stale compiled graph does: it goes on as if the layer were frozen.
    model = norm_net()
    freeze(model, "0")
    unfreeze(model, "0")
    model[1:](model[0](torch.randn(4, 3)).detach()).square().sum().backward()
    return model, None


def _never_stepped() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "0")
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)
    back(model)
    optimizer.step()
    optimizer.zero_grad()
    unfreeze(model, "0.bias")
    return model, optimizer


def norm_trains() -> tuple[nn.Module, Any]:
    model = norm_net()
    for p in model[1].parameters():
        p.requires_grad_(False)
    return model, None


def bare_norm_trains() -> tuple[nn.Module, Any]:
    model = bare()
    model[0].requires_grad_(False)
    return model, None


def _spectral_norm_moves(how: Any) -> Case:
    def case() -> tuple[nn.Module, Any]:
        model = nn.Sequential(how(nn.Linear(3, 4)), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        return model, None

    return case


def norm_told_not_to_track() -> tuple[nn.Module, Any]:
    model, _ = norm_trains()
    norm: Any = model.get_submodule("1")
    norm.track_running_stats = False
    return model, None


def hold_lost_by_conversion() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "0", "1")
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(model).train(), None


def _hold_overridden() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "1")
    model[1].training = True
    return model, None


def _held_but_made_trainable(*frozen: str) -> Case:
    def case() -> tuple[nn.Module, Any]:
        model = norm_net()
        freeze(model, *frozen)
        for p in model.parameters():
            p.requires_grad = True
        return model.train(), stock(model.parameters())

    return case


def _held_and_partly_trainable() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "1")
    model[1].weight.requires_grad_(True)
    model[1].training = True
    return model, None


def bare() -> nn.Sequential:
    """A norm without parameters beside a layer, and another layer."""
    inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))
    return nn.Sequential(inner, nn.Linear(4, 2))


def _held_without_parameters() -> tuple[nn.Module, Any]:
    model = bare()
    freeze(model, "0")
    return model.requires_grad_(True).train(), None


def tied_half_frozen() -> tuple[nn.Module, Any]:
    model = Tied()
    freeze(model, "body")
    return model, None


def tied_half_trainable() -> tuple[nn.Module, Any]:
    model = Tied()
    freeze_except(model, "head")
    return model, None


def tied() -> tuple[nn.Module, Any]:
    return Tied(), None


def two_groups() -> tuple[nn.Module, Any]:
    model = norm_net()
    optimizer = stock(model.parameters())
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model[2].bias]})
    return model, optimizer


def two_optimizers() -> tuple[nn.Module, Any]:
    model = norm_net()
    return model, [stock(model.parameters()), stock([model[2].bias])]


def all_frozen() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model)
    return model, FrozenAwareSGD(model.parameters(), lr=0.1)


def foreign() -> tuple[nn.Module, Any]:
    model = norm_net()
    optimizer = stock(model.parameters())
    model[2] = nn.Linear(4, 2)
    return model, optimizer


def _state_of_frozen(make_one: Make, **options: Any) -> Case:
    """The first layer is frozen after it was stepped once."""

    def case() -> tuple[nn.Module, Any]:
        model = norm_net()
        optimizer = make_one(model.parameters(), **options)
        back(model)
        optimizer.step()
        optimizer.zero_grad()
        freeze(model, "0")
        return model, optimizer

    return case


momentum_of_frozen = _state_of_frozen(with_momentum)


def _state_of_one_group_dropped(make_one: Make, policy: str) -> Case:
    def case() -> tuple[nn.Module, Any]:
        model = norm_net()
        groups = [
            {"params": list(model[0].parameters()), policy: "drop"},
            {"params": [*model[1].parameters(), *model[2].parameters()]},
        ]
        optimizer = make_one(groups)
        back(model)
        optimizer.step()
        freeze(model, "0")
        return model, optimizer

    return case


def frozen_unowned(make_one: Make = stock) -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "0", "1")
    return model, make_one([p for p in model.parameters() if p.requires_grad])


def _not_reduced() -> tuple[nn.Module, Any]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = norm_net()
    freeze(model, "0")
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    model[0].requires_grad_(True)
    return ddp, None


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _norm_left_in_eval() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "1", hold_norm=False)
    model[1].eval()
    unfreeze(model)
    return model, None


class Dropping(nn.Module):
    """A layer with dropout of its own kind, as attention and recurrent layers have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body, self.head = layer, nn.Linear(4, 2)


def _dropout(layer: Callable[[], nn.Module]) -> Case:
    def case() -> tuple[nn.Module, Any]:
        model = Dropping(layer())
        freeze(model, "body")
        return model.train(), None

    return case


class SomeDropPath(nn.Module):
    """Stochastic depth, by the name and attribute that timm and transformers give it."""

    drop_prob = 0.1


def _old_weight_norm(bias: bool) -> Case:
    def case() -> tuple[nn.Module, Any]:
        weight_norm: Any = nn.utils.weight_norm
        model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Linear(4, 2))
        freeze(model, *("0",) if bias else ())
        weight_norm(model[0])
        return model, None

    return case


def _groups(model: Any, body: float, head: float) -> list[dict[str, Any]]:
    return [
        {"params": [*model[0].parameters(), *model[1].parameters()], "lr": body},
        {"params": model[2].parameters(), "lr": head},
    ]


def _zero_lr() -> tuple[nn.Module, Any]:
    model = norm_net()
    optimizer = torch.optim.AdamW(_groups(model, 0.0, 0.1))
    back(model)
    optimizer.step()
    return model, optimizer


# name: (case, level, kind, what it is about, words)
def _rows(replaced: bool) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3))
    freeze_except(model, "1", rows={"0": [3, 4]})
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1)
    if replaced:
        with pytest.warns(UserWarning, match="its live rows have no effect any more"):
            model[0].weight = nn.Parameter(torch.zeros(5, 2))
    return model, optimizer


FINDINGS: dict[str, tuple[Case, str, str, list[str], str]] = {
    "rows of a table whose weight was replaced": (
        lambda: _rows(replaced=True),
        "error",
        "rows lost",
        ["0.live_rows.weight"],
        "has rows that should train, but 0.weight was replaced since",
    ),
    "a table with frozen rows": (
        lambda: _rows(replaced=False),
        "info",
        "frozen rows",
        ["0.weight"],
        "has 3 frozen rows of 5; the others (3 to 4) train as 0.live_rows.weight.",
    ),
    "trainable in no optimizer": (
        unowned,
        "error",
        "unowned",
        ["0", "1"],
        "has 2 parameters that are trainable but in no optimizer: their gradients are computed",
    ),
    "a frozen parameter with a gradient in the optimizer": (
        _stale,
        "error",
        "stale gradient",
        ["0.weight"],
        "may still move it",
    ),
    "a frozen parameter with a gradient in an optimizer that will not move it": (
        _stale_in_ours,
        "warning",
        "stale gradient",
        ["0.weight"],
        "a gradient of 48 B, which the next step frees; clip_grad_norm_ counts it",
    ),
    "a frozen parameter with a gradient in an AdamW that will not move it": (
        lambda: _stale_in_ours(adamw),
        "warning",
        "stale gradient",
        ["0.weight"],
        "a gradient of 48 B, which the next step frees; clip_grad_norm_ counts it",
    ),
    "a frozen parameter with a gradient in two optimizers, one of them stock": (
        _stale_in_ours_and_in_stock,
        "error",
        "stale gradient",
        ["0.weight"],
        "may still move it",
    ),
    "a frozen parameter with a gradient elsewhere": (
        _stale_elsewhere,
        "warning",
        "stale gradient",
        ["0.weight"],
        "clip_grad_norm_ counts it",
    ),
    "a trainable without a gradient": (
        no_gradient,
        "warning",
        "no gradient",
        ["spare"],
        "the loss depends on it",
    ),
    "unfrozen, but a stale graph ran": (
        compiled_stale,
        "warning",
        "no gradient",
        ["0"],
        "compiled after the last unfreeze",
    ),
    "in the optimizer but never stepped": (
        _never_stepped,
        "info",
        "never stepped",
        ["0.bias"],
        "unfrozen just now",
    ),
    "a norm of a frozen layer in train mode": (
        norm_trains,
        "warning",
        "norm trains",
        ["1"],
        "updates its running statistics",
    ),
    "a norm without parameters beside frozen ones": (
        bare_norm_trains,
        "warning",
        "norm trains",
        ["0.1"],
        "updates its running statistics",
    ),
    "a norm that does not track": (
        norm_told_not_to_track,
        "warning",
        "norm trains",
        ["1"],
        "normalizes by the batch",
    ),
    "a spectral norm of a frozen layer in train mode": (
        _spectral_norm_moves(nn.utils.parametrizations.spectral_norm),
        "warning",
        "norm trains",
        ["0.parametrizations.weight.0"],
        "the layer's weight changes",
    ),
    "a layer with spectral norm by the older hook, frozen, in train mode": (
        _spectral_norm_moves(nn.utils.spectral_norm),
        "warning",
        "norm trains",
        ["0"],
        "the layer's weight changes",
    ),
    "a hold lost by a conversion": (
        hold_lost_by_conversion,
        "warning",
        "norm trains",
        ["1"],
        "hold_norm=True",
    ),
    "a hold overridden by a direct write": (
        _hold_overridden,
        "error",
        "hold overridden",
        ["1"],
        "Freeze it again",
    ),
    "a norm frozen along with a layer, then all made trainable by hand": (
        _held_but_made_trainable("0", "1"),
        "error",
        "held but trainable",
        ["1"],
        "Call torch_freeze.unfreeze on it",
    ),
    "a norm frozen alone, then made trainable by hand": (
        _held_but_made_trainable("1"),
        "error",
        "held but trainable",
        ["1"],
        "made trainable without torch_freeze",
    ),
    "a held norm of which one parameter was made trainable, and its mode": (
        _held_and_partly_trainable,
        "error",
        "held but trainable",
        ["1"],
        "made trainable without torch_freeze",
    ),
    "a held norm without parameters, all around it made trainable by hand": (
        _held_without_parameters,
        "warning",
        "held but trainable",
        ["0.1"],
        "This is fine if it was frozen by itself",
    ),
    "a tied parameter half frozen": (
        tied_half_frozen,
        "warning",
        "tied half",
        ["body.embed.weight"],
        "though head.weight is in a module that is otherwise trainable",
    ),
    "a tied parameter half trainable": (
        tied_half_trainable,
        "warning",
        "tied half",
        ["body.embed.weight"],
        "though body.embed.weight is in a module that is otherwise frozen",
    ),
    "a tied parameter": (
        tied,
        "info",
        "tied",
        ["body.embed.weight"],
        "body.embed.weight = head.weight is one tensor",
    ),
    "a parameter in two groups": (
        two_groups,
        "error",
        "two groups",
        ["2.bias"],
        "is 2 times in the param groups",
    ),
    "a parameter in two optimizers": (
        two_optimizers,
        "error",
        "two groups",
        ["2.bias"],
        "is 2 times in the param groups",
    ),
    "everything frozen": (all_frozen, "warning", "all frozen", [""], "does nothing"),
    "parameters replaced after the optimizer was made": (
        foreign,
        "warning",
        "foreign",
        [""],
        "2 parameters in the optimizer are not in the model",
    ),
    "the replacements, which the optimizer never sees": (
        foreign,
        "error",
        "unowned",
        ["2"],
        "in no optimizer",
    ),
    "momentum held for frozen parameters": (
        momentum_of_frozen,
        "info",
        "momentum of frozen",
        [""],
        "64 B of state (64 bytes) for 2 frozen parameters",
    ),
    "moments held for frozen parameters": (
        _state_of_frozen(adamw),
        "info",
        "momentum of frozen",
        [""],
        # Two moments and a count for each.
        "136 B of state (136 bytes) for 2 frozen parameters",
    ),
    "moments held by stock with amsgrad": (
        _state_of_frozen(torch.optim.AdamW, amsgrad=True),
        "info",
        "momentum of frozen",
        [""],
        "200 B of state (200 bytes) for 2 frozen parameters",
    ),
    "momentum held by stock": (
        _state_of_frozen(stock, momentum=0.9),
        "info",
        "momentum of frozen",
        [""],
        "It is used again when they are unfrozen; delete optimizer.state[p]",
    ),
    "momentum that is kept": (
        _state_of_frozen(with_momentum, frozen_momentum="keep"),
        "info",
        "momentum of frozen",
        [""],
        "It is used again when they are unfrozen; frozen_momentum='drop' frees it",
    ),
    "moments that are kept": (
        _state_of_frozen(adamw, frozen_state="keep"),
        "info",
        "momentum of frozen",
        [""],
        "It is used again when they are unfrozen; frozen_state='drop' frees it",
    ),
    "momentum that starts afresh": (
        _state_of_frozen(with_momentum, frozen_momentum="reset"),
        "info",
        "momentum of frozen",
        [""],
        "It starts from zero when they are unfrozen; frozen_momentum='drop' frees it as well",
    ),
    "moments that start afresh": (
        _state_of_frozen(adamw, frozen_state="reset"),
        "info",
        "momentum of frozen",
        [""],
        "It starts from zero when they are unfrozen; frozen_state='drop' frees it as well",
    ),
    "momentum that is dropped": (
        _state_of_frozen(with_momentum, frozen_momentum="drop"),
        "info",
        "momentum of frozen",
        [""],
        "The next zero_grad() or step() frees it",
    ),
    "moments that are dropped": (
        _state_of_frozen(adamw, frozen_state="drop"),
        "info",
        "momentum of frozen",
        [""],
        "The next zero_grad() or step() frees it",
    ),
    "momentum that one param group drops": (
        _state_of_one_group_dropped(with_momentum, "frozen_momentum"),
        "info",
        "momentum of frozen",
        [""],
        "The next zero_grad() or step() frees it",
    ),
    "moments that one param group drops": (
        _state_of_one_group_dropped(adamw, "frozen_state"),
        "info",
        "momentum of frozen",
        [""],
        "The next zero_grad() or step() frees it",
    ),
    "a parameter DDP never averages": (
        _not_reduced,
        "error",
        "not reduced",
        ["0"],
        "has 2 parameters that are trainable but were frozen when DistributedDataParallel wrapped",
    ),
    "a norm that trains, left in eval mode": (
        _norm_left_in_eval,
        "warning",
        "norm in eval",
        ["1"],
        "statistics that no longer follow the data",
    ),
    "a dropout layer in a frozen part": (
        _dropout(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1))),
        "info",
        "dropout active",
        ["body.1"],
        "the output differs from pass to pass",
    ),
    "several of them": (
        _dropout(
            lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout2d(0.1), SomeDropPath(), nn.Dropout())
        ),
        "info",
        "dropout active",
        ["body"],
        "has 3 dropout layers that drop at random in frozen parts",
    ),
    "dropout of a frozen recurrent layer": (
        _dropout(lambda: nn.LSTM(3, 4, num_layers=2, dropout=0.1)),
        "info",
        "dropout active",
        ["body"],
        "drops at random in a frozen part",
    ),
    "dropout of a frozen attention": (
        _dropout(lambda: nn.MultiheadAttention(4, 2, dropout=0.1)),
        "info",
        "dropout active",
        ["body"],
        "drops at random in a frozen part",
    ),
    "the older weight_norm on a frozen layer": (
        _old_weight_norm(bias=True),
        "warning",
        "weight norm",
        ["0"],
        "is frozen except for 0.weight_g and 0.weight_v",
    ),
    "the older weight_norm on a layer without bias in a frozen model": (
        _old_weight_norm(bias=False),
        "warning",
        "weight norm",
        ["0"],
        "they train, and the weight is computed from them",
    ),
    "lr 0 in place of freezing": (
        _zero_lr,
        "warning",
        "zero lr",
        ["0", "1"],
        # Two moments and a step count of Adam for each parameter, and its gradient.
        "their gradients are computed, and gradients and optimizer state take",
    ),
    "frozen parameters the filter left out": (
        frozen_unowned,
        "info",
        "frozen unowned",
        [""],
        "4 frozen parameters are in no optimizer, such as 0.weight",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", FINDINGS)
def test_audit_finds(case: str) -> None:
    build, level, kind, about, words = FINDINGS[case]
    if kind == "not reduced" and not build_info().compiled:
        pytest.skip("no compiled module")
    model, optimizer = build()
    found = [finding for finding in audit(model, optimizer) if finding.kind == kind]
    assert [finding.parameter for finding in found] == about
    assert {finding.level for finding in found} == {level}
    for finding in found:
        line = str(finding)
        assert words in line and line.startswith(f"{level}: {finding.parameter}")
        assert "\n" not in line and finding.fix and line.endswith(".")


def test_every_kind_has_a_case_at_every_level_and_none_is_unlisted() -> None:
    shown = {(kind, level) for _, level, kind, _, _ in FINDINGS.values()}
    listed = {(kind, level) for kind, (levels, _) in FINDING_KINDS.items() for level in levels}
    assert shown == listed
    assert tuple(FINDING_KINDS) == get_args(torch_freeze_audit.Kind)


def test_the_reference_page_lists_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    # The site's hooks import its generator, which is not needed here.
    griffe: Any = ModuleType("griffe")
    griffe.Extension = griffe.Object = object
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    docs = Path(__file__).parents[2] / "docs"
    hooks = runpy.run_path(str(docs / "site_hooks.py"))
    page = (docs / "reference" / "inspecting.md").read_text()
    made = hooks["on_page_markdown"](page)
    for kind, (levels, sentence) in FINDING_KINDS.items():
        assert f"| `{kind}` | {', '.join(levels)} | {sentence} |" in made.splitlines()
    assert made.count("\n| `") == len(FINDING_KINDS)


# Optimizers that own what trains alone, and what should own everything.
FITTING: dict[str, tuple[Make, str]] = {
    "SGD": (torch.optim.SGD, "FrozenAwareSGD"),
    "Adam": (torch.optim.Adam, "FrozenAwareAdam"),
    "AdamW": (torch.optim.AdamW, "FrozenAwareAdamW"),
    "a kind of AdamW": (type("Own", (torch.optim.AdamW,), {}), "FrozenAwareAdamW"),
    "ours": (adamw, "FrozenAwareAdamW"),
    "another": (torch.optim.RMSprop, "FrozenAwareAdam, FrozenAwareAdamW or FrozenAwareSGD"),
    "two": (
        lambda params: [torch.optim.AdamW(params[:1]), torch.optim.SGD(params[1:], lr=0.1)],
        "FrozenAwareAdamW or FrozenAwareSGD",
    ),
}


@pytest.mark.parametrize(("make_one", "fits"), FITTING.values(), ids=FITTING)
def test_the_optimizer_that_fits_is_recommended(make_one: Make, fits: str) -> None:
    (finding,) = (f for f in audit(*frozen_unowned(make_one)) if f.kind == "frozen unowned")
    assert finding.fix == f"Pass model.parameters(), all of them, to {fits}."


def test_the_cost_of_lr_0_is_what_is_held() -> None:
    model, optimizer = _zero_lr()
    body = [p for name, p in model.named_parameters() if name[0] in "01"]
    held = sum(p.grad.nbytes for p in body if p.grad is not None)
    held += sum(t.nbytes for p in body for t in optimizer.state[p].values())
    # Frozen again, the body holds none of it.
    found = [f for f in audit(model, optimizer) if f.kind == "zero lr"]
    bytes_ = [int(re.findall(r"take (\d+) B", f.sentence)[0]) for f in found]
    assert sum(bytes_) == held


QUIET: dict[str, tuple[str, Case]] = {}


def quiet(kind: str) -> Callable[[Case], Case]:
    """Enter a case in which audit has no such finding."""

    def enter(case: Case) -> Case:
        QUIET[f"{kind}: {case.__name__.replace('_', ' ').strip()}"] = (kind, case)
        return case

    return enter


def _trained(model: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, **options)
    back(model)
    optimizer.step()
    return optimizer


@quiet("no gradient")
def _unfrozen_and_no_backward_since() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "0", "1")
    optimizer = _trained(model)
    unfreeze(model, "0")
    unfreeze(model[1])
    return model, optimizer


@quiet("no gradient")
def _unfrozen_by_a_schedule() -> tuple[nn.Module, Any]:
    model = norm_net()
    schedule = torch_freeze.gradual_unfreeze(model, ["0", "1", "2"])
    schedule.step()
    optimizer = _trained(model)
    schedule.step()
    with torch.no_grad():
        model.eval()(torch.randn(4, 3))
    return model.train(), optimizer


def _scheduled(make_schedule: Callable[[Any], Any], steps: int = 0) -> Case:
    def case() -> tuple[nn.Module, Any]:
        model = norm_net()
        optimizer = torch.optim.SGD(_groups(model, 0.1, 0.2), lr=0.1)
        schedule = make_schedule(optimizer)
        back(model)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return model, optimizer

    return case


LAMBDAS = [lambda step: step / 10, lambda step: 1.0]


@quiet("zero lr")
def _warm_up_of_one_group_from_0() -> tuple[nn.Module, Any]:
    return _scheduled(lambda o: torch.optim.lr_scheduler.LambdaLR(o, LAMBDAS))()


@quiet("zero lr")
def _warm_up_of_all_by_hand() -> tuple[nn.Module, Any]:
    model = norm_net()
    return model, torch.optim.SGD(_groups(model, 0.0, 0.0), lr=0.0)


@quiet("zero lr")
def _a_schedule_at_its_end() -> tuple[nn.Module, Any]:
    end = [lambda step: float(step < 2), lambda step: 1.0]
    return _scheduled(lambda o: torch.optim.lr_scheduler.LambdaLR(o, end), steps=2)()


@quiet("zero lr")
def _frozen_as_well() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "0", "1")
    return model, torch.optim.SGD(_groups(model, 0.0, 0.1), lr=0.1)


@quiet("zero lr")
def _an_optimizer_that_chooses_its_rate() -> tuple[nn.Module, Any]:
    model, optimizer = norm_net(), stock([torch.zeros(1)])
    optimizer.param_groups = [{"params": list(model.parameters()), "lr": None}]
    return model, optimizer


@quiet("never stepped")
def _lbfgs_which_keeps_all_state_under_one_parameter() -> tuple[nn.Module, Any]:
    model = norm_net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    x = torch.randn(8, 3)

    def closure() -> Any:
        loss = model(x).square().sum()
        loss.backward()
        return loss

    step: Any = optimizer.step
    step(closure)
    optimizer.zero_grad()
    return model, optimizer


@quiet("momentum of frozen")
def _lbfgs_whose_first_parameter_is_frozen() -> tuple[nn.Module, Any]:
    model, optimizer = _lbfgs_which_keeps_all_state_under_one_parameter()
    freeze(model, "0")
    return model, optimizer


@quiet("norm in eval")
def _the_whole_model_in_eval() -> tuple[nn.Module, Any]:
    return norm_net().eval(), None


@quiet("norm in eval")
def _a_held_norm() -> tuple[nn.Module, Any]:
    model = norm_net()
    freeze(model, "1")
    return model.train(), None


@quiet("dropout active")
def _dropout_of_rate_0_in_eval_or_beside_what_trains() -> tuple[nn.Module, Any]:
    inner = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Dropout().eval())
    model = nn.Sequential(inner, nn.Dropout(), nn.Linear(4, 2))
    freeze(model, "0")
    return model, None


@quiet("weight norm")
def _the_older_weight_norm_before_freezing() -> tuple[nn.Module, Any]:
    weight_norm: Any = nn.utils.weight_norm
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    freeze(model, "0")
    return model, None


@quiet("weight norm")
def _frozen_biases_everywhere() -> tuple[nn.Module, Any]:
    weight_norm: Any = nn.utils.weight_norm
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), weight_norm(nn.Linear(4, 2)))
    freeze(model, "*.bias")
    return model, None


@quiet("weight norm")
def _trainable_throughout() -> tuple[nn.Module, Any]:
    weight_norm: Any = nn.utils.weight_norm
    return nn.Sequential(weight_norm(nn.Linear(3, 4, bias=False)), nn.Linear(4, 2)), None


@quiet("norm trains")
def _a_detectors_norm_that_never_moves() -> tuple[nn.Module, Any]:
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ops.FrozenBatchNorm2d(4))
    return model.requires_grad_(False), None


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", QUIET)
def test_audit_gives_no_false_alarm(case: str) -> None:
    kind, build = QUIET[case]
    model, optimizer = build()
    assert [finding for finding in audit(model, optimizer) if finding.kind == kind] == []


def test_a_tied_parameter_beside_another_tied_one() -> None:
    # As in BertForMaskedLM: the decoder's weight is the embedding's, its bias the head's.
    model = Tied()
    decoder = model.head
    head = nn.ModuleDict({"transform": nn.Linear(4, 4), "decoder": decoder})
    head.register_parameter("bias", decoder.bias)
    model.head = head
    freeze(model, "body")
    found = [(f.kind, f.names[-1]) for f in audit(model) if f.kind.startswith("tied")]
    # The weight is frozen in a head that trains; the bias trains with the head.
    assert found == [("tied half", "head.decoder.weight"), ("tied", "head.decoder.bias")]


def test_what_was_unfrozen_and_still_gets_no_gradient_is_found() -> None:
    model, optimizer = _unfrozen_and_no_backward_since()
    model[1:](torch.randn(4, 4)).sum().backward()
    (finding,) = (f for f in audit(model, optimizer) if f.kind == "no gradient")
    assert finding.names == ("0.weight", "0.bias")


MOVERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD with decay, fused": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "RMSprop with momentum": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "Adadelta with decay": lambda p: torch.optim.Adadelta(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("zeros", [False, True], ids=["as it was", "zeroed"])
@pytest.mark.parametrize("mover", MOVERS)
def test_a_stale_gradient_moves_what_is_frozen_under(mover: str, zeros: bool) -> None:
    """The error also holds for a gradient that zero_grad(set_to_none=False) left behind."""
    model = norm_net()
    optimizer = MOVERS[mover](model.parameters())
    back(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False) if zeros else None
    model[0].requires_grad_(False)
    (finding,) = (f for f in audit(model, optimizer) if f.kind == "stale gradient")
    assert (finding.level, finding.names) == ("error", ("0.weight", "0.bias"))
    assert f"are in {type(optimizer).__name__}, which may still move them" in finding.sentence
    before = model[0].weight.clone()
    optimizer.step()
    assert not model[0].weight.equal(before)
    # This is the fix: without the gradient the parameter stays.
    freeze(model, "0")
    assert not [f for f in audit(model, optimizer) if f.kind == "stale gradient"]
    before = model[0].weight.clone()
    optimizer.step()
    assert model[0].weight.equal(before)


def test_lbfgs_moves_what_is_frozen_without_a_gradient() -> None:
    model = norm_net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    x = torch.randn(8, 3)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    def stale() -> list[tuple[str, tuple[str, ...]]]:
        return [(f.level, f.names) for f in audit(model, optimizer) if f.kind == "stale gradient"]

    step: Any = optimizer.step
    step(closure)
    freeze(model, "0")
    assert stale() == [("error", ("0.weight", "0.bias"))]
    before = model[0].weight.clone()
    step(closure)
    assert not model[0].weight.equal(before)
    # The fix.
    optimizer.state.clear()
    assert stale() == []
    before = model[0].weight.clone()
    step(closure)
    step(closure)
    assert model[0].weight.equal(before)


@given(
    names=st.sets(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), min_size=1
    ),
    data=st.data(),
)
def test_all_names_are_grouped_under_a_few_modules(names: set[str], data: Any) -> None:
    # The name of a module that holds parameters is not a parameter itself.
    everything = sorted(n for n in names if not any(m.startswith(f"{n}.") for m in names))
    concerned = data.draw(st.lists(st.sampled_from(everything), unique=True))
    groups = torch_freeze_audit._grouped(concerned, everything)
    assert sorted(name for group in groups for name in group.names) == sorted(concerned)
    assert len(groups) <= 8
    for group in groups:
        if group.names == (group.head,):
            continue
        inside = [n for n in everything if not group.head or n.startswith(f"{group.head}.")]
        assert set(group.names) <= set(inside) and group.of == len(inside)
    if set(concerned) == set(everything) and len(everything) > 1:
        assert len(groups) == 1


HEALTHY: dict[str, Callable[[Any], Any]] = {
    "all trainable": lambda m: stock(m.parameters()),
    "frozen by freeze": lambda m: (freeze(m, "0", "1"), FrozenAwareSGD(m.parameters(), lr=0.1))[1],
    "frozen by a schedule": lambda m: (
        torch_freeze.gradual_unfreeze(m, ["0", "1", "2"]).step(),
        FrozenAwareSGD(m.parameters(), lr=0.1),
    )[1],
}


@pytest.mark.parametrize("case", HEALTHY)
def test_audit_is_silent_on_a_healthy_model(case: str) -> None:
    model = norm_net()
    optimizer = HEALTHY[case](model)
    assert audit(model, optimizer) == []
    model.train()
    back(model)
    assert audit(model, optimizer) == []
    optimizer.step()
    assert audit(model, optimizer) == []
    optimizer.zero_grad()
    assert audit(model, optimizer) == []


# name: (what is done, whether everything around the held norm trains)
HOLDS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "the norm alone is frozen": (lambda m: freeze(m, nn.BatchNorm1d), True),
    "the norm and one layer are frozen": (lambda m: freeze(m, nn.BatchNorm1d, "0.0"), False),
    "one parameter is freed": (lambda m: (freeze(m), unfreeze(m, "0.0.weight")), False),
    "all is freed": (lambda m: (freeze(m), unfreeze(m)), False),
    "all is freed one by one": (
        lambda m: (freeze(m), [unfreeze(m, p) for p in m.parameters()]),
        False,
    ),
    "all but one parameter is freed": (
        lambda m: (freeze(m), unfreeze(m, exclude="0.2.bias")),
        False,
    ),
    "all but the norm is freed": (
        lambda m: (freeze(m), unfreeze(m, exclude=nn.BatchNorm1d)),
        True,
    ),
    "all is frozen for a moment": (lambda m: torch_freeze.frozen(m).__enter__(), False),
}


@pytest.mark.parametrize("affine", [True, False], ids=["with parameters", "without parameters"])
@pytest.mark.parametrize("case", HOLDS)
def test_a_hold_that_freezing_made_is_no_error(case: str, affine: bool) -> None:
    does, alone = HOLDS[case]
    norm = nn.BatchNorm1d(4, affine=affine)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 4)), nn.Linear(4, 2))
    does(model)
    found = [(f.level, f.parameter) for f in audit(model.train()) if f.kind.startswith("held")]
    # A norm without parameters no longer shows that it was named itself.
    assert found == ([("warning", "0.1")] if alone and not affine else [])


@pytest.mark.compiled
def test_gradients_applied_in_backward_are_not_missed() -> None:
    model = norm_net()
    optimizer = FrozenAwareSGD(
        model.parameters(), lr=0.1, momentum=0.9, step_in_backward=True, bucket_mb=0
    )
    freeze(model, "0")
    for _ in range(2):
        optimizer.zero_grad()
        back(model)
        assert any(p.grad is None for p in model[1:].parameters())
        assert audit(model, optimizer) == []
        optimizer.step()
        assert audit(model, optimizer) == []
    # A missing gradient is still reported for parameters that another optimizer steps.
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    optimizer.zero_grad()
    back(model)
    found = audit(model, [optimizer, stock([model.spare])])
    assert [(f.kind, f.parameter) for f in found] == [("no gradient", "spare")]


def test_each_fix_works() -> None:
    model, optimizer = _stale()
    freeze(model, "0")
    assert audit(model, optimizer) == []
    model, _ = norm_trains()
    freeze(model, "1")
    assert audit(model) == []
    model, _ = _hold_overridden()
    freeze(model, "1")
    assert audit(model) == []
    for held in (_held_but_made_trainable("0", "1"), _held_without_parameters):
        model, _ = held()
        (finding,) = audit(model)
        unfreeze(model, finding.parameter)
        assert audit(model) == [] and model.get_submodule(finding.parameter).training
    model, _ = frozen_unowned()
    assert audit(model, FrozenAwareSGD(model.parameters(), lr=0.1)) == []


def test_errors_come_first() -> None:
    model, optimizer = momentum_of_frozen()
    model.get_submodule("1").weight.requires_grad_(False)
    model.register_parameter("new", nn.Parameter(torch.ones(1)))
    levels = [finding.level for finding in audit(model, optimizer)]
    assert levels == sorted(levels, key=["error", "warning", "info"].index) and len(levels) > 1


def test_audit_changes_nothing() -> None:
    model, optimizer = momentum_of_frozen()
    entries = len(optimizer.state)
    versions = [t._version for t in model.state_dict().values()]
    audit(model, optimizer)
    freeze(model)
    audit(model, stock(model.parameters()))
    assert len(optimizer.state) == entries
    assert [t._version for t in model.state_dict().values()] == versions


def test_names_have_no_wrapper_segments() -> None:
    model, optimizer = unowned()
    compiled: Any = torch.compile(model, backend="eager")
    assert audit(compiled, optimizer)[0].names == ("0.weight", "0.bias")


def test_a_finding_is_a_plain_value() -> None:
    finding = Finding("info", "fc.bias", "is tied.", "Nothing to do.", "tied")
    assert finding == Finding("info", "fc.bias", "is tied.", "Nothing to do.", "tied")
    assert str(finding) == "info: fc.bias is tied. Nothing to do." and finding.names == ()
    with pytest.warns(DeprecationWarning, match="Finding.fix"):
        assert finding.mend == finding.fix


def test_wrong_arguments_raise() -> None:
    call: Any = audit
    with pytest.raises(TypeError, match=r"audit\(model, 'net'\)"):
        call("net")
    with pytest.raises(TypeError, match="optimizer must be"):
        call(norm_net(), "sgd")
