"""guard: any change of what is frozen raises."""

from __future__ import annotations

import copy
import gc
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import norm_net
from torch_freeze import FrozenAwareAdamW, FrozenAwareSGD, freeze, guard, unfreeze


def make() -> Any:
    model = norm_net()
    freeze(model, "0", "1")
    return model


class FirstThree(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in list(self)[:3]:
            x = layer(x)
        return x


def make_large() -> Any:
    """Like `make`, with additional frozen layers that are too large to be compared in full."""
    large = nn.Linear(400, 40, bias=False), nn.Linear(111, 37, bias=False)
    model = FirstThree(*make(), *large)
    freeze(model, "3", "4")
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
    model.load_state_dict({"0.weight": 2 * model[0].weight}, strict=False)


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


def _fused_adamw_decays(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model[0].bias.grad = torch.zeros(4)
    optimizer.step()


def _large_through_data(model: Any) -> None:
    model[3].weight.data[7, 300] += 1e-6


def _large_negated(model: Any) -> None:
    model[3].weight.data.neg_()


def _large_odd_tail(model: Any) -> None:
    model[4].weight.data[-1, -1] += 1e-6


def _replace_module(model: Any) -> None:
    model[0] = nn.Linear(3, 4)


def _replace_by_a_copy(model: Any) -> None:
    model[3] = copy.deepcopy(model[3])


def _replace_around_the_same_parameters(model: Any) -> None:
    other = nn.Linear(3, 4)
    other.weight, other.bias = model[0].weight, model[0].bias
    model[0] = other


def _remove_module(model: Any) -> None:
    model[0] = None


def _replace_norm(model: Any) -> None:
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    model[1] = convert(model[1])


# change: (how, named)
CHANGES: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "a write": (_write, ["0.weight"]),
    "a write to a held statistic": (_write_statistics, ["1.running_mean"]),
    "a held norm put in train mode": (
        _train_norm,
        ["1.running_mean", "1.running_var", "1.num_batches_tracked"],
    ),
    "a step of stock with a stale gradient": (_stale_step, ["0.bias"]),
    "a loaded checkpoint": (_load, ["0.weight"]),
    "another parameter in its place": (_swap_parameter, ["0.weight"]),
    "a removed parameter": (_remove_parameter, ["0.bias"]),
    "other data": (_swap_data, ["0.weight"]),
    "training after unfreezing inside": (_unfreeze_and_train, ["0.weight", "0.bias"]),
    "a write through data": (_write_data, ["0.weight"]),
    "a NaN through data": (_nan, ["0.weight"]),
    "a step of a kernel that counts no versions": (_fused_step, ["0.bias"]),
    "weight decay by another such kernel": (_fused_adamw_decays, ["0.bias"]),
    "one number of a large tensor": (_large_through_data, ["3.weight"]),
    "every sign of a large tensor": (_large_negated, ["3.weight"]),
    "the last number of a tensor of odd size": (_large_odd_tail, ["4.weight"]),
    "another module in its place": (_replace_module, ["0"]),
    "a copy of a module in its place": (_replace_by_a_copy, ["3"]),
    "another module that has its parameters": (_replace_around_the_same_parameters, ["0"]),
    "a removed module": (_remove_module, ["0"]),
    "a held norm converted": (_replace_norm, ["1"]),
}


@pytest.mark.parametrize("content", [False, True], ids=["by default", "by content"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_guard_raises_and_names(change: str, content: bool) -> None:
    act, named = CHANGES[change]
    model = make_large()
    with pytest.raises(RuntimeError, match="guard: ") as caught, guard(model, content=content):
        act(model)
    said = str(caught.value).split("inside the block: ")[1]
    assert re.findall(r"([\w.]+) \(", said) == named


def test_a_replaced_module_is_named_once_with_everything_inside_it() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(make(), make()), "head": nn.Linear(2, 2)})
    freeze(model, "body")
    said = r"guard: 1 frozen module .*: body \(replaced by another module\)"
    with pytest.raises(RuntimeError, match=said), guard(model):
        model["body"] = copy.deepcopy(model["body"])
    with guard(model):
        model["head"] = nn.Linear(2, 2)


def test_a_wrapper_put_around_a_module_is_no_change() -> None:
    model = make()
    with guard(model):
        model[0] = torch.compile(model[0], backend="eager")
    with guard(model):
        model[0] = model[0]._orig_mod


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "channels_last": lambda: torch.randn(16, 16, 9, 9).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(80, 90).t(),
    "every second column": lambda: torch.randn(80, 180)[:, ::2],
    "a view at an odd offset": lambda: torch.randn(7201)[1:],
    "bfloat16": lambda: torch.randn(81, 91).to(torch.bfloat16),
    "bytes": lambda: torch.randint(0, 255, (7203,), dtype=torch.uint8),
    "complex": lambda: torch.randn(80, 45, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(80, 45, dtype=torch.complex64).conj(),
    "one number": lambda: torch.randn(()),
    "nothing": lambda: torch.randn(0, 3),
    "a view that repeats": lambda: torch.randn(90, 1).expand(90, 90),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_change_of_one_number_is_seen_whatever_the_layout(layout: str) -> None:
    value = LAYOUTS[layout]()
    model = nn.ParameterDict({"p": nn.Parameter(value, requires_grad=False)})
    with guard(model):
        pass
    for place in {0, value.numel() // 2, value.numel() - 1} if value.numel() else ():
        index = tuple(int(i) for i in np.unravel_index(place, value.shape))
        with pytest.raises(RuntimeError, match="p \\(other values"), guard(model):
            model["p"].data[index] += 1


@pytest.mark.parametrize("content", [False, True], ids=["by default", "by content"])
@pytest.mark.parametrize(
    ("ours", "hyper"), [(FrozenAwareSGD, {"momentum": 0.9}), (FrozenAwareAdamW, {"amsgrad": True})]
)
def test_training_the_rest_passes(content: bool, ours: Any, hyper: dict[str, Any]) -> None:
    model = make()
    optimizer = ours(model.parameters(), lr=0.1, weight_decay=0.1, **hyper)
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


def test_writing_equal_values_is_a_change_by_version_but_not_by_content() -> None:
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


def test_minus_zero_in_place_of_zero_is_a_change() -> None:
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


def test_no_large_tensor_is_copied_without_content() -> None:
    model = make_large()
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)

    def held_inside(content: bool) -> int:
        """Bytes of all tensors that live only inside the block."""

        def alive() -> dict[int, torch.Tensor]:
            objects = gc.get_objects()
            return {id(t): t for t in objects if issubclass(type(t), torch.Tensor)}

        before = alive()
        with guard(model, content=content):
            return sum(t.nbytes for key, t in alive().items() if key not in before)

    assert held_inside(content=True) >= frozen
    assert held_inside(content=False) < frozen / 10


def test_the_guard_waits_for_a_device_once() -> None:
    """Reading a value from a device waits for all its work, so it is not done once per tensor."""
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.overloadpacket.__name__
            if name in ("equal", "_local_scalar_dense", "item", "is_nonzero", "nonzero"):
                asked.append(name)
            return func(*args, **(kwargs or {}))

    model = make_large()
    with Watch(), guard(model):
        pass
    assert asked == ["equal"]


def test_a_tensor_subclass_is_read_through_its_parts() -> None:
    value = TwoTensor(torch.randn(80, 80), torch.randn(80, 80))
    model = nn.ParameterDict({"p": nn.Parameter(value, requires_grad=False)})
    with guard(model):
        pass
    with pytest.raises(RuntimeError, match=r"p \(other values\)"), guard(model):
        model["p"].b[3, 4] += 1


def test_statistics_written_without_a_version_are_seen() -> None:
    # InstanceNorm's kernel writes the statistics without a new version or a count of batches.
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
