"""guard: any change of what is frozen raises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torch_freeze import FrozenAwareSGD, freeze, guard, unfreeze


def make() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    freeze(model, "0", "1")
    return model


def _write(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.add_(1)


def _write_statistics(model: Any) -> None:
    model[1].running_mean.add_(1)


def _train_norm(model: Any) -> None:
    model[1].training = True
    model(torch.randn(4, 3))


def _stale_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].bias.grad = torch.ones(4)
    optimizer.step()


def _load(model: Any) -> None:
    other = make()
    with torch.no_grad():
        other[0].weight.mul_(2)
    model.load_state_dict(other.state_dict())


def _swap_parameter(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.ones(4, 3), requires_grad=False)


def _remove_parameter(model: Any) -> None:
    model[0].bias = None


def _swap_data(model: Any) -> None:
    model[0].weight.data = torch.ones(4, 3)


def _unfreeze_and_train(model: Any) -> None:
    unfreeze(model, "0")
    model(torch.randn(4, 3)).square().sum().backward()
    FrozenAwareSGD(model.parameters(), lr=0.1).step()


def _write_data(model: Any) -> None:
    model[0].weight.data.add_(1)


def _nan(model: Any) -> None:
    model[0].weight.data[0, 0] = math.nan


def _fused_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    model[0].bias.grad = torch.ones(4)
    optimizer.step()


# change: (how, named, seen by version counters)
CHANGES: dict[str, tuple[Callable[[Any], None], list[str], bool]] = {
    "a write": (_write, ["0.weight"], True),
    "a write to a held statistic": (_write_statistics, ["1.running_mean"], True),
    "a held norm put in train mode": (
        _train_norm,
        ["1.running_mean", "1.running_var", "1.num_batches_tracked"],
        True,
    ),
    "a step of stock with a stale gradient": (_stale_step, ["0.bias"], True),
    "a loaded checkpoint": (_load, ["0.weight"], True),
    "another parameter in its place": (_swap_parameter, ["0.weight"], True),
    "a removed parameter": (_remove_parameter, ["0.bias"], True),
    "other data": (_swap_data, ["0.weight"], True),
    "training after unfreezing inside": (_unfreeze_and_train, ["0.weight", "0.bias"], True),
    "a write through data": (_write_data, ["0.weight"], False),
    "a NaN through data": (_nan, ["0.weight"], False),
    "a step of a kernel that counts no versions": (_fused_step, ["0.bias"], False),
}


SEEN = [(change, content) for change in CHANGES for content in (False, True)]


@pytest.mark.parametrize(
    ("change", "content"),
    [case for case in SEEN if case[1] or CHANGES[case[0]][2]],
    ids=lambda value: value if isinstance(value, str) else f"content={value}",
)
def test_the_guard_raises_and_names(change: str, content: bool) -> None:
    act, named, _ = CHANGES[change]
    model = make()
    with pytest.raises(RuntimeError, match="guard: ") as caught, guard(model, content=content):
        act(model)
    for name in named:
        assert f"{name} (" in str(caught.value)
    assert "2." not in str(caught.value)


@pytest.mark.parametrize("content", [False, True], ids=["by version", "by content"])
def test_training_the_rest_passes(content: bool) -> None:
    model = make()
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with guard(model, content=content):
        for _ in range(3):
            model.train()
            model(torch.randn(4, 3)).square().sum().backward()
            model[0].weight.grad = torch.ones(4, 3)
            optimizer.step()
            optimizer.zero_grad()


def test_a_frozen_spectral_norm_is_watched() -> None:
    spectral_norm: Any = nn.utils.parametrizations.spectral_norm
    model: Any = nn.Sequential(spectral_norm(nn.Linear(3, 4)))
    freeze(model)
    with guard(model):
        model.train()(torch.randn(4, 3))
    named = r"changed inside the block: 0.parametrizations.weight.0._u \("
    with pytest.raises(RuntimeError, match=named), guard(model):
        model[0].parametrizations.weight[0]._u.neg_()


def test_equal_values_written_are_a_change_by_version_and_none_by_content() -> None:
    model = make()
    state = model.state_dict()
    with guard(model, content=True):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="written to"), guard(model):
        model.load_state_dict({k: v.clone() for k, v in state.items()})


def test_a_nan_that_stays_is_no_change() -> None:
    model = make()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with guard(model, content=True):
        pass


def test_minus_zero_is_a_change_of_zero() -> None:
    model = nn.Linear(1, 1)
    freeze(model)
    model.weight.data.zero_()
    with pytest.raises(RuntimeError, match="weight"), guard(model, content=True):
        model.weight.data.neg_()


def test_an_exception_inside_passes_unchanged() -> None:
    model = make()

    def work() -> None:
        with guard(model):
            _write(model)
            raise KeyError

    with pytest.raises(KeyError):
        work()


def test_no_parameter_is_copied_without_content(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Size] = []
    clone = torch.Tensor.clone

    def count(self: torch.Tensor) -> torch.Tensor:
        copied.append(self.shape)
        return clone(self)

    model = make()
    monkeypatch.setattr(torch.Tensor, "clone", count)
    with guard(model):
        pass
    statistics = [buffer.shape for buffer in model[1].buffers()]
    assert copied == statistics
    with guard(model, content=True):
        pass
    assert len(copied) == 2 * len(statistics) + 4


def test_statistics_written_without_a_version_are_seen() -> None:
    # InstanceNorm's kernel writes the statistics, raises no version and counts no batches.
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    freeze(norm)
    norm.training = True
    with pytest.raises(RuntimeError, match="running_mean"), guard(norm):
        norm(torch.randn(2, 2, 5))


def test_tensors_made_under_inference_mode_are_compared_by_content() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
        for p in model.parameters():
            p.requires_grad_(False)
    with guard(model):
        pass
    with pytest.raises(RuntimeError, match="weight"), guard(model), torch.inference_mode():
        model.weight.add_(1)


def test_a_long_list_of_changes_is_cut() -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(30))
    freeze(model)
    with pytest.raises(RuntimeError, match=r"30 frozen tensors .* and 10 more"), guard(model):
        torch._foreach_add_([p.detach() for p in model], 1)


def test_lazy_and_sparse_tensors_can_be_guarded() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    sparse = torch.eye(2).to_sparse()
    model.register_parameter("sparse", nn.Parameter(sparse))
    freeze(model)
    for content in (False, True):
        with guard(model, content=content):
            pass


def test_a_str_for_the_model_raises() -> None:
    call: Any = guard
    with pytest.raises(TypeError, match="guard"), call("net"):
        pass
