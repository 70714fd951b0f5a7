"""audit: each kind of finding, with what makes it and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_freeze
from torch_freeze import Finding, FrozenAwareSGD, audit, freeze, freeze_except, unfreeze


def make() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def stock(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, **options)


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


def row_4_unowned() -> tuple[nn.Module, Any]:
    model = make()
    return model, stock(model[2].parameters())


def _stale() -> tuple[nn.Module, Any]:
    model = make()
    for p in model[0].parameters():
        p.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 3)
    return model, stock(model.parameters())


def _stale_in_ours() -> tuple[nn.Module, Any]:
    model, _ = _stale()
    return model, FrozenAwareSGD(model.parameters(), lr=0.1)


def _stale_in_ours_and_in_stock() -> tuple[nn.Module, Any]:
    model, optimizer = _stale_in_ours()
    return model, [optimizer, stock([model.get_parameter("0.weight")])]


def _stale_elsewhere() -> tuple[nn.Module, Any]:
    model, _ = _stale()
    return model, stock([p for p in model.parameters() if p.requires_grad])


def row_21_no_gradient() -> tuple[nn.Module, Any]:
    model = make()
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    back(model)
    return model, stock(model.parameters())


def row_21_compiled_stale() -> tuple[nn.Module, Any]:
    # What a stale compiled graph looks like: some trainables get gradients, others do not.
    model = make()
    freeze(model, "0")
    back(model)
    unfreeze(model, "0")
    return model, None


def _never_stepped() -> tuple[nn.Module, Any]:
    model = make()
    freeze(model, "0")
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)
    back(model)
    optimizer.step()
    optimizer.zero_grad()
    unfreeze(model, "0.bias")
    return model, optimizer


def row_12_norm_trains() -> tuple[nn.Module, Any]:
    model = make()
    for p in model[1].parameters():
        p.requires_grad_(False)
    return model, None


def row_12_bare_norm_trains() -> tuple[nn.Module, Any]:
    model = bare()
    model[0].requires_grad_(False)
    return model, None


def _spectral_norm_moves(how: Any) -> Case:
    def case() -> tuple[nn.Module, Any]:
        model = nn.Sequential(how(nn.Linear(3, 4)), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        return model, None

    return case


def row_15_norm_told_not_to_track() -> tuple[nn.Module, Any]:
    model, _ = row_12_norm_trains()
    norm: Any = model.get_submodule("1")
    norm.track_running_stats = False
    return model, None


def row_13_hold_lost_by_conversion() -> tuple[nn.Module, Any]:
    model = make()
    freeze(model, "0", "1")
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(model).train(), None


def _hold_overridden() -> tuple[nn.Module, Any]:
    model = make()
    freeze(model, "1")
    model[1].training = True
    return model, None


def _held_but_made_trainable(*frozen: str) -> Case:
    def case() -> tuple[nn.Module, Any]:
        model = make()
        freeze(model, *frozen)
        for p in model.parameters():
            p.requires_grad = True
        return model.train(), stock(model.parameters())

    return case


def _held_and_partly_trainable() -> tuple[nn.Module, Any]:
    model = make()
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


def row_19_tied_half_frozen() -> tuple[nn.Module, Any]:
    model = Tied()
    freeze(model, "body")
    return model, None


def row_19_tied_half_trainable() -> tuple[nn.Module, Any]:
    model = Tied()
    freeze_except(model, "head")
    return model, None


def row_19_tied() -> tuple[nn.Module, Any]:
    return Tied(), None


def row_11_two_groups() -> tuple[nn.Module, Any]:
    model = make()
    optimizer = stock(model.parameters())
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model[2].bias]})
    return model, optimizer


def row_11_two_optimizers() -> tuple[nn.Module, Any]:
    model = make()
    return model, [stock(model.parameters()), stock([model[2].bias])]


def row_23_all_frozen() -> tuple[nn.Module, Any]:
    model = make()
    freeze(model)
    return model, FrozenAwareSGD(model.parameters(), lr=0.1)


def row_27_foreign() -> tuple[nn.Module, Any]:
    model = make()
    optimizer = stock(model.parameters())
    model[2] = nn.Linear(4, 2)
    return model, optimizer


def row_6_momentum_of_frozen() -> tuple[nn.Module, Any]:
    model = make()
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)
    back(model)
    optimizer.step()
    optimizer.zero_grad()
    freeze(model, "0")
    return model, optimizer


def _momentum_by_policy(policy: str | None) -> Case:
    def case() -> tuple[nn.Module, Any]:
        model = make()
        make_one: Any = stock if policy is None else FrozenAwareSGD
        options = {} if policy is None else {"lr": 0.1, "frozen_momentum": policy}
        optimizer = make_one(model.parameters(), momentum=0.9, **options)
        back(model)
        optimizer.step()
        freeze(model, "0")
        return model, optimizer

    return case


def _momentum_of_one_group_dropped() -> tuple[nn.Module, Any]:
    model = make()
    groups = [
        {"params": list(model[0].parameters()), "frozen_momentum": "drop"},
        {"params": [*model[1].parameters(), *model[2].parameters()]},
    ]
    optimizer = FrozenAwareSGD(groups, lr=0.1, momentum=0.9)
    back(model)
    optimizer.step()
    freeze(model, "0")
    return model, optimizer


def row_5_frozen_unowned() -> tuple[nn.Module, Any]:
    model = make()
    freeze(model, "0", "1")
    return model, stock([p for p in model.parameters() if p.requires_grad])


# name: (case, level, kind, what it is about, words)
FINDINGS: dict[str, tuple[Case, str, str, list[str], str]] = {
    "row_4 and recipe 3, trainable in no optimizer": (
        row_4_unowned,
        "error",
        "unowned",
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        "never used or cleared",
    ),
    "row_3 a frozen parameter with a gradient in the optimizer": (
        _stale,
        "error",
        "stale gradient",
        ["0.weight"],
        "may still move it",
    ),
    "row_3 a frozen parameter with a gradient in an optimizer that will not move it": (
        _stale_in_ours,
        "warning",
        "stale gradient",
        ["0.weight"],
        "a gradient of 48 B, which the next step frees; clip_grad_norm_ counts it",
    ),
    "row_3 a frozen parameter with a gradient in two optimizers, one of them stock": (
        _stale_in_ours_and_in_stock,
        "error",
        "stale gradient",
        ["0.weight"],
        "may still move it",
    ),
    "row_22 a frozen parameter with a gradient elsewhere": (
        _stale_elsewhere,
        "warning",
        "stale gradient",
        ["0.weight"],
        "clip_grad_norm_ counts it",
    ),
    "row_21 a trainable without a gradient": (
        row_21_no_gradient,
        "warning",
        "no gradient",
        ["spare"],
        "the loss depends on it",
    ),
    "row_21 unfrozen, but a stale graph ran": (
        row_21_compiled_stale,
        "warning",
        "no gradient",
        ["0.weight", "0.bias"],
        "compiled after the last unfreeze",
    ),
    "row_5 in the optimizer but never stepped": (
        _never_stepped,
        "info",
        "never stepped",
        ["0.bias"],
        "unfrozen just now",
    ),
    "row_12 a norm of a frozen layer in train mode": (
        row_12_norm_trains,
        "warning",
        "norm trains",
        ["1"],
        "updates its running statistics",
    ),
    "row_12 a norm without parameters beside frozen ones": (
        row_12_bare_norm_trains,
        "warning",
        "norm trains",
        ["0.1"],
        "updates its running statistics",
    ),
    "row_15 a norm told not to track": (
        row_15_norm_told_not_to_track,
        "warning",
        "norm trains",
        ["1"],
        "normalises by the batch",
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
    "row_13 a hold lost by a conversion": (
        row_13_hold_lost_by_conversion,
        "warning",
        "norm trains",
        ["1"],
        "hold_norm=True",
    ),
    "row_13 a hold overridden by a direct write": (
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
        "Fine if it was frozen by itself",
    ),
    "row_19 a tied parameter half frozen": (
        row_19_tied_half_frozen,
        "warning",
        "tied half",
        ["body.embed.weight"],
        "though head.weight lies in a module that is otherwise trainable",
    ),
    "row_19 a tied parameter half trainable": (
        row_19_tied_half_trainable,
        "warning",
        "tied half",
        ["body.embed.weight"],
        "though body.embed.weight lies in a module that is otherwise frozen",
    ),
    "row_19 a tied parameter": (
        row_19_tied,
        "info",
        "tied",
        ["body.embed.weight"],
        "body.embed.weight = head.weight is one tensor",
    ),
    "row_11 a parameter in two groups": (
        row_11_two_groups,
        "error",
        "two groups",
        ["2.bias"],
        "stands 2 times",
    ),
    "row_11 a parameter in two optimizers": (
        row_11_two_optimizers,
        "error",
        "two groups",
        ["2.bias"],
        "stands 2 times",
    ),
    "row_23 everything frozen": (row_23_all_frozen, "warning", "all frozen", [""], "does nothing"),
    "row_27 parameters replaced after the optimizer was made": (
        row_27_foreign,
        "warning",
        "foreign",
        [""],
        "2 parameters in the optimizer are not in the model",
    ),
    "row_27 the replacements, which the optimizer never sees": (
        row_27_foreign,
        "error",
        "unowned",
        ["2.weight", "2.bias"],
        "in no optimizer",
    ),
    "row_6 momentum held for frozen parameters": (
        row_6_momentum_of_frozen,
        "info",
        "momentum of frozen",
        [""],
        "64 B of momentum (64 bytes) for 2 frozen parameters",
    ),
    "momentum held by stock": (
        _momentum_by_policy(None),
        "info",
        "momentum of frozen",
        [""],
        "It resumes from there when they are unfrozen; delete optimizer.state[p]",
    ),
    "momentum that is kept": (
        _momentum_by_policy("keep"),
        "info",
        "momentum of frozen",
        [""],
        "It resumes from there when they are unfrozen; frozen_momentum='drop' frees it",
    ),
    "momentum that begins anew": (
        _momentum_by_policy("reset"),
        "info",
        "momentum of frozen",
        [""],
        "It begins anew when they are unfrozen",
    ),
    "momentum that is dropped": (
        _momentum_by_policy("drop"),
        "info",
        "momentum of frozen",
        [""],
        "The next zero_grad() or step() frees it",
    ),
    "momentum that one param group drops": (
        _momentum_of_one_group_dropped,
        "info",
        "momentum of frozen",
        [""],
        "The next zero_grad() or step() frees it",
    ),
    "row_5 frozen parameters the filter left out": (
        row_5_frozen_unowned,
        "info",
        "frozen unowned",
        [""],
        "4 frozen parameters are in no optimizer, such as 0.weight",
    ),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_audit_finds(case: str) -> None:
    build, level, kind, about, words = FINDINGS[case]
    model, optimizer = build()
    found = [finding for finding in audit(model, optimizer) if finding.kind == kind]
    assert [finding.parameter for finding in found] == about
    assert {finding.level for finding in found} == {level}
    for finding in found:
        line = str(finding)
        assert words in line and line.startswith(f"{level}: {finding.parameter}")
        assert "\n" not in line and finding.mend and line.endswith(".")


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
    model = make()
    optimizer = HEALTHY[case](model)
    assert audit(model, optimizer) == []
    model.train()
    back(model)
    assert audit(model, optimizer) == []
    optimizer.step()
    assert audit(model, optimizer) == []
    optimizer.zero_grad()
    assert audit(model, optimizer) == []


# name: (what is done, whether all around the norm trains though it is held)
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
    # One without parameters shows no more that it was named itself.
    assert found == ([("warning", "0.1")] if alone and not affine else [])


def test_gradients_applied_in_backward_are_not_missed() -> None:
    model = make()
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
    # Of parameters that others step, a missing gradient is told as ever.
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    optimizer.zero_grad()
    back(model)
    found = audit(model, [optimizer, stock([model.spare])])
    assert [(f.kind, f.parameter) for f in found] == [("no gradient", "spare")]


def test_each_mend_works() -> None:
    model, optimizer = _stale()
    freeze(model, "0")
    assert audit(model, optimizer) == []
    model, _ = row_12_norm_trains()
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
    model, _ = row_5_frozen_unowned()
    assert audit(model, FrozenAwareSGD(model.parameters(), lr=0.1)) == []


def test_errors_come_first() -> None:
    model, optimizer = row_6_momentum_of_frozen()
    model.get_submodule("1").weight.requires_grad_(False)
    model.register_parameter("new", nn.Parameter(torch.ones(1)))
    levels = [finding.level for finding in audit(model, optimizer)]
    assert levels == sorted(levels, key=["error", "warning", "info"].index) and len(levels) > 1


def test_audit_changes_nothing() -> None:
    model, optimizer = row_6_momentum_of_frozen()
    entries = len(optimizer.state)
    versions = [t._version for t in model.state_dict().values()]
    audit(model, optimizer)
    freeze(model)
    audit(model, stock(model.parameters()))
    assert len(optimizer.state) == entries
    assert [t._version for t in model.state_dict().values()] == versions


def test_names_have_no_wrapper_segments() -> None:
    model, optimizer = row_4_unowned()
    compiled: Any = torch.compile(model, backend="eager")
    assert audit(compiled, optimizer)[0].parameter == "0.weight"


def test_a_finding_is_a_plain_value() -> None:
    finding = Finding("info", "fc.bias", "is frozen.", "Nothing to do.", "example")
    assert finding == Finding("info", "fc.bias", "is frozen.", "Nothing to do.", "example")
    assert str(finding) == "info: fc.bias is frozen. Nothing to do."


def test_wrong_arguments_raise() -> None:
    call: Any = audit
    with pytest.raises(TypeError, match=r"audit\(model, 'net'\)"):
        call("net")
    with pytest.raises(TypeError, match="optimizer must be"):
        call(make(), "sgd")
