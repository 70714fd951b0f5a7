"""Nothing is cached across steps: every edit between two steps is honoured, as stock honours it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import ADAMW, SGD, Family, FrozenAwareAdamW, FrozenAwareSGD, Hyper

# An edit gets an optimizer and the index of one of its parameters; it is applied to ours and to the
# oracle in turn. Edits that replace parameters update the caller's list of parameters.
Edit = Callable[[torch.optim.Optimizer, int, int], None]

each_hyper = pytest.mark.parametrize(
    ("family", "hyper"),
    cases.per_family(lambda family: {} if family is cases.ADAM else family.some_hypers),
)
MOMENTUM = cases.SOME_HYPERS["momentum, dampening and decay"]


def _at(optimizer: torch.optim.Optimizer, g: int, i: int) -> Tensor:
    return optimizer.param_groups[g]["params"][i]


def _fill(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.randn(tuple(shape), cases.generator(77)).to(dtype)


def _clear_state(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.state.clear()


def _delete_entry(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.state.pop(_at(optimizer, g, i), None)


def _empty_entry(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.state[_at(optimizer, g, i)] = {}


def _foreign_key(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.state[_at(optimizer, g, i)]["someone else's"] = 3


def _replace_state(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    copied = type(optimizer.state)(dict)
    copied.update({p: dict(entry) for p, entry in optimizer.state.items()})
    optimizer.state = copied


def _new_buffer(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    p = _at(optimizer, g, i)
    optimizer.state[p]["momentum_buffer"] = _fill(p.shape, p.dtype)


def _buffer_none(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.state[_at(optimizer, g, i)]["momentum_buffer"] = None


def _buffer_data(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    p = _at(optimizer, g, i)
    optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p).detach())
    optimizer.state[p]["momentum_buffer"].data = _fill(p.shape, p.dtype)


def _buffer_zeroed(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    for entry in optimizer.state.values():
        if entry.get("momentum_buffer") is not None:
            entry["momentum_buffer"].zero_()


def _replace_parameter(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    p = _at(optimizer, g, i)
    optimizer.param_groups[g]["params"][i] = torch.nn.Parameter(_fill(p.shape, p.dtype))


def _replace_by_other_shape(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.param_groups[g]["params"][i] = torch.nn.Parameter(_fill((3, 4)))


def _remove_parameter(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    del optimizer.param_groups[g]["params"][i]


def _append_parameter(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.param_groups[g]["params"].append(torch.nn.Parameter(_fill((19,))))


def _reverse_parameters(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.param_groups[g]["params"].reverse()


def _params_as_tuple(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    group = optimizer.param_groups[g]
    group["params"] = tuple(group["params"])


def _new_data(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    p = _at(optimizer, g, i)
    p.data = _fill(p.shape, p.dtype)


def _new_data_view(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    p = _at(optimizer, g, i)
    p.data = _fill((p.numel() + 3,), p.dtype)[3:].view(p.shape)


def _swap_groups(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.param_groups.reverse()


def _drop_group(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    if len(optimizer.param_groups) > 1:
        del optimizer.param_groups[g]


def _replace_group_dict(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.param_groups[g] = dict(optimizer.param_groups[g])


def _replace_groups(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.param_groups = [
        {**group, "params": list(group["params"])} for group in optimizer.param_groups
    ]


def _add_group(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.add_param_group(
        {"params": [torch.nn.Parameter(_fill((7,)))], "lr": 0.3, "momentum": 0.5}
    )


def _extra_group_key(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
    optimizer.param_groups[g]["initial_lr"] = 3.0


def _set(**changes: Any) -> Edit:
    def edit(optimizer: torch.optim.Optimizer, g: int, i: int) -> None:
        optimizer.param_groups[g].update(changes)

    return edit


EDITS: dict[str, Edit] = {
    "state.clear()": _clear_state,
    "del state[p]": _delete_entry,
    "state[p] = {}": _empty_entry,
    "another key in state[p]": _foreign_key,
    "a new state dict": _replace_state,
    "a new buffer": _new_buffer,
    "a buffer of None": _buffer_none,
    "new data in the buffer": _buffer_data,
    "all buffers zeroed in place": _buffer_zeroed,
    "a new parameter in its place": _replace_parameter,
    "a new parameter of another shape": _replace_by_other_shape,
    "a parameter removed": _remove_parameter,
    "a parameter appended": _append_parameter,
    "parameters reversed": _reverse_parameters,
    "parameters in a tuple": _params_as_tuple,
    "p.data = a new tensor": _new_data,
    "p.data = a misaligned view": _new_data_view,
    "groups reversed": _swap_groups,
    "a group deleted": _drop_group,
    "a group dict replaced": _replace_group_dict,
    "param_groups replaced": _replace_groups,
    "add_param_group": _add_group,
    "another key in the group": _extra_group_key,
    "lr changed": _set(lr=0.7),
    "lr made a tensor": _set(lr=torch.tensor(0.7)),
    "lr made a tensor of shape [1]": _set(lr=torch.tensor([0.7])),
    "momentum off": _set(momentum=0),
    "momentum on": _set(momentum=0.9),
    "momentum negative": _set(momentum=-0.5),
    "dampening changed": _set(dampening=0.9),
    "decay off": _set(weight_decay=0),
    "decay on": _set(weight_decay=0.3),
    "decay negative": _set(weight_decay=-0.3),
    "nesterov on": _set(nesterov=True),
    "nesterov on with dampening": _set(nesterov=True, dampening=0.5),
    "nesterov on without momentum": _set(nesterov=True, momentum=0),
    "maximize on": _set(maximize=True),
    "foreach=True in one group": _set(foreach=True),
    "foreach=False in one group": _set(foreach=False),
    "fused=False in one group": _set(fused=False),
}


class Pair:
    """Our optimizer and the oracle over twin tensors, with the same gradients and edits."""

    def __init__(
        self, hyper: Hyper, dtype: torch.dtype = torch.float32, family: Family = SGD
    ) -> None:
        self.gen = cases.generator(11)
        ours = cases.make_parameters(((3, 4), 17, (), 65), self.gen, dtype)
        theirs = cases.twin(ours)
        self.optimizer: Any = family.ours(cases.in_groups(ours, 2), **hyper)
        self.reference: Any = family.reference(cases.in_groups(theirs, 2), **hyper)

    def both(self) -> tuple[Any, Any]:
        return self.optimizer, self.reference

    def params(self, optimizer: Any) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def train(self, steps: int, what: str) -> None:
        for step in range(steps):
            cases.set_grads(self.params(self.optimizer), self.params(self.reference), self.gen)
            self.optimizer.step()
            self.reference.step()
            cases.assert_same_training(self.optimizer, self.reference, f"{what}, step {step + 1}:")


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
@pytest.mark.parametrize("edit", cases.ids(EDITS))
@pytest.mark.parametrize("group", [0, 1], ids=["in the first group", "in the last group"])
def test_an_edit_between_steps_is_honoured(
    group: int, edit: Edit, hyper: Hyper, dtype: torch.dtype
) -> None:
    pair = Pair(hyper, dtype)
    pair.train(2, "before the edit")
    for optimizer in pair.both():
        edit(optimizer, group, 0)
    pair.train(3, "after the edit")


@pytest.mark.parametrize("first", cases.ids(EDITS))
def test_edits_before_the_first_step_are_honoured(first: Edit) -> None:
    pair = Pair(MOMENTUM)
    for optimizer in pair.both():
        first(optimizer, 0, 0)
    pair.train(3, "after the edit")


def test_momentum_off_on_and_off_again() -> None:
    """The buffer stays unchanged while momentum is 0 and is used again later, as in stock."""
    pair = Pair({"lr": 0.1})
    for momentum in (0, 0.9, 0, 0.5, 0):
        for optimizer in pair.both():
            for group in optimizer.param_groups:
                group["momentum"] = momentum
        pair.train(3, f"{momentum=}")


def test_nesterov_toggled() -> None:
    pair = Pair({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})
    for nesterov in (True, False, True):
        for optimizer in pair.both():
            for group in optimizer.param_groups:
                group["nesterov"] = nesterov
        pair.train(3, f"{nesterov=}")


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda p: torch.empty(p.shape[::-1], dtype=p.dtype).t(),
    "every second column": lambda p: torch.empty(p.shape[0], 2 * p.shape[1], dtype=p.dtype)[:, ::2],
    "at an odd offset": lambda p: torch.empty(p.numel() + 1, dtype=p.dtype)[1:].view(p.shape),
}


@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("hyper", [MOMENTUM, cases.SOME_HYPERS["nesterov, decay and maximize"]])
@pytest.mark.parametrize("make", cases.ids(STRIDES))
def test_a_buffer_of_other_strides(
    make: Callable[[Tensor], Tensor], hyper: Hyper, dtype: torch.dtype
) -> None:
    """It stays the same tensor with the same strides, and its values have stock's accuracy."""
    gen = cases.generator(4)
    ours = cases.make_parameters(((6, 10),), gen, dtype)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, **hyper)
    reference = torch.optim.SGD(theirs, **hyper, foreach=False)
    value = cases.randn((6, 10), gen, dtype)
    for sgd, p in ((optimizer, ours[0]), (reference, theirs[0])):
        sgd.state[p]["momentum_buffer"] = make(p.detach()).copy_(value)
    buffer = optimizer.state[ours[0]]["momentum_buffer"]
    strides = buffer.stride()
    for step in range(4):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        assert optimizer.state[ours[0]]["momentum_buffer"] is buffer
        assert buffer.stride() == strides
        cases.assert_close(ours[0], theirs[0], f"after step {step + 1}: parameter")
        cases.assert_close(buffer, reference.state[theirs[0]]["momentum_buffer"], "buffer")


OTHER_DTYPES = {
    "fp32 parameter, fp64 buffer": (torch.float32, torch.float64),
    "fp64 parameter, fp32 buffer": (torch.float64, torch.float32),
    "fp32 parameter, bf16 buffer": (torch.float32, torch.bfloat16),
    "bf16 parameter, fp32 buffer": (torch.bfloat16, torch.float32),
    "fp16 parameter, fp32 buffer": (torch.float16, torch.float32),
    "bf16 parameter, fp16 buffer": (torch.bfloat16, torch.float16),
    "fp16 parameter, fp64 buffer": (torch.float16, torch.float64),
}


@pytest.mark.parametrize("hyper", [MOMENTUM, cases.SOME_HYPERS["nesterov, decay and maximize"]])
@pytest.mark.parametrize(("dtype", "buffer_dtype"), cases.ids(OTHER_DTYPES))
def test_a_buffer_of_another_dtype(
    dtype: torch.dtype, buffer_dtype: torch.dtype, hyper: Hyper
) -> None:
    """It keeps its dtype, and the result is at least as close to the exact one as stock's.

    Bits are not compared: stock rounds bf16 and fp16 at every operation of such a mixture.
    """
    gen = cases.generator(6)
    worst = {"ours": 0.0, "stock's": 0.0}
    for _ in range(5):
        p = torch.nn.Parameter(torch.randn(2000, generator=gen).to(dtype))
        q = torch.nn.Parameter(p.detach().clone())
        buffer = torch.randn(2000, generator=gen).to(buffer_dtype)
        grad = torch.randn(2000, generator=gen).to(dtype)
        exact = torch.nn.Parameter(p.detach().to(torch.float64, copy=True))
        optimizer = FrozenAwareSGD([p], **hyper)
        stock = torch.optim.SGD([q], **hyper, foreach=False)
        oracle = torch.optim.SGD([exact], **hyper, foreach=False)
        mine = buffer.clone()
        optimizer.state[p]["momentum_buffer"] = mine
        stock.state[q]["momentum_buffer"] = buffer.clone()
        oracle.state[exact]["momentum_buffer"] = buffer.to(torch.float64, copy=True)
        p.grad, q.grad, exact.grad = grad.clone(), grad.clone(), grad.to(torch.float64, copy=True)
        for sgd in (optimizer, stock, oracle):
            sgd.step()
        assert cases.buffer_of(optimizer, p) is mine and mine.dtype == buffer_dtype
        for name, tensor in (("ours", p), ("stock's", q)):
            error = (tensor.detach().double() - exact.detach()).abs().max().item()
            worst[name] = max(worst[name], error)
        cases.assert_close(
            mine,
            oracle.state[exact]["momentum_buffer"],
            "buffer",
            2 * max(torch.finfo(dtype).eps, torch.finfo(buffer_dtype).eps),
        )
    assert worst["ours"] <= worst["stock's"] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("start", "to"),
    cases.ids(
        {
            "model.double()": (torch.float32, torch.float64),
            "model.float()": (torch.float64, torch.float32),
        }
    ),
)
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_model_cast_wide_goes_on_as_stock(
    hyper: Hyper, start: torch.dtype, to: torch.dtype
) -> None:
    """The buffer keeps its dtype, as in stock."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(7, 5, dtype=start)
    theirs = copy.deepcopy(ours)
    optimizer = FrozenAwareSGD(ours.parameters(), **hyper)
    reference = torch.optim.SGD(theirs.parameters(), **hyper, foreach=False)
    gen = cases.generator(0)
    for step in range(6):
        if step == 3:
            ours.to(to)
            theirs.to(to)
        cases.set_grads(list(ours.parameters()), list(theirs.parameters()), gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@pytest.mark.parametrize("to", cases.ids(cases.NARROW_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_model_cast_narrow_goes_on(hyper: Hyper, to: torch.dtype) -> None:
    """The gradient is cast with the model; the fp32 buffer stays fp32 and is still used."""
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 5)
    optimizer = FrozenAwareSGD(model.parameters(), **hyper)
    gen = cases.generator(0)
    for step in range(4):
        if step == 2:
            model.to(to)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        wide = [
            torch.nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in model.parameters()
        ]
        oracle = torch.optim.SGD(wide, **hyper, foreach=False)
        for p, w in zip(model.parameters(), wide, strict=True):
            buffer = cases.buffer_of(optimizer, p)
            if buffer is not None:
                oracle.state[w]["momentum_buffer"] = buffer.to(torch.float32, copy=True)
            assert p.grad is not None
            w.grad = p.grad.to(torch.float32, copy=True)
        optimizer.step()
        oracle.step()
        for p, w in zip(model.parameters(), wide, strict=True):
            cases.assert_close(p, w, f"after step {step + 1}", torch.finfo(p.dtype).eps)
            if hyper.get("momentum"):
                assert cases.buffer_of(optimizer, p).dtype == torch.float32


def _through_torch_save(state_dict: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CARRIERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "handed over": lambda state_dict: state_dict,
    "deep-copied": copy.deepcopy,
    "pickled": lambda state_dict: pickle.loads(pickle.dumps(state_dict)),
    "through torch.save and weights_only": _through_torch_save,
}

DIRECTIONS = {
    "stock to ours": ("stock", "ours"),
    "ours to stock": ("ours", "stock"),
    "ours to ours": ("ours", "ours"),
}


@pytest.mark.parametrize("carry", cases.ids(CARRIERS))
@pytest.mark.parametrize(("source", "target"), cases.ids(DIRECTIONS))
@each_hyper
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named parameters"])
def test_state_dicts_load_both_ways(
    named: bool,
    family: Family,
    hyper: Hyper,
    source: str,
    target: str,
    carry: Callable[[Any], Any],
) -> None:
    """Training goes on in another optimizer as if nothing had happened."""
    gen = cases.generator(9)
    start = cases.make_parameters(((3, 4), 17, 0, 65), gen)

    def make(kind: Any, params: list[Any], **kwargs: Any) -> Any:
        return kind([(f"p{i}", p) for i, p in enumerate(params)] if named else params, **kwargs)

    straight, first = cases.twin(start), cases.twin(start)
    reference = make(family.stock, straight, **hyper, foreach=False)
    optimizer = make(getattr(family, source), first, **hyper)
    for _ in range(3):
        cases.set_grads(first, straight, gen)
        optimizer.step()
        reference.step()
    second = cases.twin(first)
    loaded = make(getattr(family, target), second, lr=123.0)
    loaded.load_state_dict(carry(optimizer.state_dict()))
    for step in range(3):
        cases.set_grads(second, straight, gen)
        loaded.step()
        reference.step()
        cases.assert_same_training(loaded, reference, f"after step {step + 1}:")


@pytest.mark.parametrize("steps", [0, 1, 3], ids="after {} steps".format)
@each_hyper
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named parameters"])
def test_state_dict_is_stocks(named: bool, family: Family, hyper: Hyper, steps: int) -> None:
    """Same keys in the same order, same values, same types; the buffers are the live ones."""
    gen = cases.generator(9)
    ours = cases.make_parameters(((3, 4), 17, 5), gen)
    theirs = cases.twin(ours)

    def make(kind: Any, params: list[Any]) -> Any:
        entries = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
        return kind([{"params": entries[:2], "lr": 0.5}, {"params": entries[2:]}], **hyper)

    optimizer, reference = make(family.ours, ours), make(family.stock, theirs)
    for _ in range(steps):
        cases.set_grads(ours, theirs, gen, skip=lambda i: i == 1)
        optimizer.step()
        reference.step()
    a, b = optimizer.state_dict(), reference.state_dict()
    assert list(a) == list(b)
    assert a["param_groups"] == b["param_groups"]
    assert [list(group) for group in a["param_groups"]] == [list(g) for g in b["param_groups"]]
    assert list(a["state"]) == list(b["state"])
    for index, entry in b["state"].items():
        assert list(a["state"][index]) == list(entry)
        for key, value in entry.items():
            cases.assert_same_bits(a["state"][index][key], value, f"{key} {index}")
            assert a["state"][index][key] is cases.buffer_of(optimizer, ours[index], key)


def test_a_checkpoint_from_an_old_stock_loads() -> None:
    """Keys that old versions did not write get their defaults."""
    pair = Pair(MOMENTUM)
    pair.train(2, "before")
    for optimizer in pair.both():
        old = optimizer.state_dict()
        for group in old["param_groups"]:
            for key in ("nesterov", "maximize", "foreach", "differentiable", "fused"):
                del group[key]
        optimizer.load_state_dict(old)
        assert not any(group["nesterov"] for group in optimizer.param_groups)
    pair.train(3, "after loading")


# What may happen to AdamW's state and options between two steps, beside what EDITS has for all.
ADAMW_EDITS: dict[str, Edit] = {
    "state.clear()": _clear_state,
    "del state[p]": _delete_entry,
    "state[p] = {}": _empty_entry,
    "another key in state[p]": _foreign_key,
    "a new state dict": _replace_state,
    "a new parameter in its place": _replace_parameter,
    "p.data = a misaligned view": _new_data_view,
    "groups reversed": _swap_groups,
    "lr changed": _set(lr=0.7),
    "lr made a float64 tensor": _set(lr=torch.tensor(0.7, dtype=torch.float64)),
    "betas changed": _set(betas=(0.5, 0.75)),
    "betas made a list": _set(betas=[0.5, 0.75]),
    "betas made tensors": _set(betas=(torch.tensor(0.5), torch.tensor(0.75))),
    "eps changed": _set(eps=0.1),
    "decay off": _set(weight_decay=0),
    "amsgrad off": _set(amsgrad=False),
    "maximize on": _set(maximize=True),
    "L2 decay": _set(decoupled_weight_decay=False),
    "foreach=True in one group": _set(foreach=True),
    "foreach=False in one group": _set(foreach=False),
}


@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("edit", cases.ids(ADAMW_EDITS))
def test_an_edit_of_adamw_between_steps_is_honoured(edit: Edit, dtype: torch.dtype) -> None:
    pair = Pair(ADAMW.some_hypers["amsgrad, decay and maximize"], dtype, ADAMW)
    pair.train(2, "before the edit")
    for optimizer in pair.both():
        edit(optimizer, 0, 0)
    pair.train(3, "after the edit")


def test_amsgrad_starts_from_zero_where_it_is_switched_on() -> None:
    """Stock raises KeyError; here the largest second moment is counted from then on."""
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70), gen)
    theirs = cases.twin(ours)
    optimizer, reference = ADAMW.ours(ours), ADAMW.stock(theirs, foreach=False)
    for step in range(4):
        cases.set_grads(ours, theirs, gen)
        if step == 2:
            for each in (optimizer, reference):
                each.param_groups[0]["amsgrad"] = True
            for q in theirs:
                reference.state[q]["max_exp_avg_sq"] = torch.zeros_like(q).detach()
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@pytest.mark.compiled
@pytest.mark.parametrize("remake", ["load_state_dict", "deepcopy", "pickle"])
def test_moments_in_bfloat16_survive(remake: str) -> None:
    """Bit for bit, with the seed; and a group added later has its moments so too."""
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70), gen)
    optimizer = FrozenAwareAdamW(ours, moment_dtype=torch.bfloat16, moment_seed=3, amsgrad=True)
    cases.set_grads(ours, ours, gen)
    optimizer.step()
    if remake == "load_state_dict":
        theirs = cases.twin(ours)
        other = FrozenAwareAdamW(theirs, moment_dtype=torch.bfloat16, moment_seed=3)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        again = copy.deepcopy if remake == "deepcopy" else _pickled
        other = again(optimizer)
        theirs = list(other.param_groups[0]["params"])
    for each in (optimizer, other):
        added = cases.make_parameters((9,), cases.generator(1))
        each.add_param_group({"params": added, "amsgrad": False})
        assert each.param_groups[1]["moment_dtype"] is torch.bfloat16
        (ours if each is optimizer else theirs).extend(added)
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = cases.randn(p.shape, gen)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            cases.assert_same_bits(p, q, f"after step {step + 1}")
            for key, value in optimizer.state[p].items():
                assert key == "step" or value.dtype is torch.bfloat16
                cases.assert_same_bits(value, other.state[q][key], f"{key} after step {step + 1}")


def _pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


STEP_DTYPES = {
    "torch.float64 by default": (torch.float64, {}),
    "torch.float64 by default, fused": (torch.float64, {"fused": True}),
    "torch.float32 by default": (torch.float32, {}),
}


@pytest.mark.parametrize(
    ("default", "options"),
    [
        pytest.param(
            *case,
            id=name,
        )
        for name, case in STEP_DTYPES.items()
    ],
)
def test_a_count_has_stocks_dtype(default: torch.dtype, options: Hyper) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        counts = []
        for make in (ADAMW.ours, ADAMW.stock):
            p = torch.nn.Parameter(torch.ones(3))
            optimizer = make([p], **options)
            p.grad = torch.ones(3)
            optimizer.step()
            counts.append(optimizer.state[p]["step"].dtype)
        assert counts[0] is counts[1]
    finally:
        torch.set_default_dtype(before)


@pytest.mark.compiled
def test_a_float32_tensor_lr_has_stocks_bits() -> None:
    pair = Pair({"lr": 0.1}, family=ADAMW)
    for optimizer in pair.both():
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1)
    pair.train(5, "a tensor lr")


def test_loading_a_state_dict_replaces_the_state_while_frozen() -> None:
    """A checkpoint taken under another frozen set loads; the groups never change."""
    gen = cases.generator(1)
    ours = cases.make_parameters((5, 6), gen)
    optimizer = FrozenAwareSGD(ours, **MOMENTUM)
    cases.set_grads(ours, ours, gen)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    ours[0].requires_grad_(False)
    fresh = FrozenAwareSGD(ours, lr=1.0)
    fresh.load_state_dict(saved)
    before = cases.buffer_of(fresh, ours[0]).clone()
    cases.set_grads(ours, ours, gen)
    fresh.step()
    cases.assert_same_bits(cases.buffer_of(fresh, ours[0]), before, "the frozen one's buffer")


REMAKES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": lambda optimizer: _whole(optimizer),
}


def _whole(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("remake", cases.ids(REMAKES))
@each_hyper
def test_a_remade_optimizer_goes_on(
    family: Family, hyper: Hyper, remake: Callable[[Any], Any]
) -> None:
    """pickle and deepcopy bypass __init__ and keep only defaults, state and param_groups."""
    pair = Pair(hyper, family=family)
    pair.train(2, "before")
    pair.optimizer = remake(pair.optimizer)
    pair.reference = remake(pair.reference)
    assert type(pair.optimizer) is family.ours
    for optimizer in pair.both():
        optimizer.zero_grad()
        _at(optimizer, 0, 0).requires_grad_(False)
    pair.train(3, "after")
    for optimizer in pair.both():
        _at(optimizer, 0, 0).requires_grad_(True)
    pair.train(2, "unfrozen")


def test_a_remade_optimizer_still_works_with_a_grad_scaler() -> None:
    pair = Pair(MOMENTUM)
    pair.optimizer = copy.deepcopy(pair.optimizer)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for _ in range(2):
        cases.set_grads(pair.params(pair.optimizer), pair.params(pair.reference), pair.gen)
        for scaler, optimizer in zip(scalers, pair.both(), strict=True):
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        cases.assert_same_training(pair.optimizer, pair.reference)


def test_subclass_with_state_of_its_own_survives_pickle() -> None:
    optimizer = pickle.loads(pickle.dumps(Named(cases.make_parameters((3,), cases.generator(0)))))
    p = optimizer.param_groups[0]["params"][0]
    before = p.detach().clone()
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, before - 1e-3) and optimizer.calls == 1


class Named(FrozenAwareSGD):
    """A user's subclass (module level, so that pickle finds it)."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure)


@pytest.mark.parametrize("momentum", [0, 0.9], ids=["without momentum", "with momentum"])
def test_add_param_group_mid_training(momentum: float) -> None:
    pair = Pair({"lr": 0.1, "momentum": momentum})
    pair.train(3, "before")
    for optimizer in pair.both():
        params = cases.make_parameters((5, 129), cases.generator(8))
        optimizer.add_param_group({"params": params, "weight_decay": 0.1, "nesterov": momentum > 0})
    pair.train(3, "after")


def test_the_first_buffer_is_a_copy_and_not_the_gradient() -> None:
    p = torch.nn.Parameter(torch.zeros(5))
    optimizer = FrozenAwareSGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    p.grad = torch.ones(5)
    optimizer.step()
    buffer = cases.buffer_of(optimizer, p)
    p.grad.fill_(7.0)
    assert torch.equal(buffer, torch.ones(5)), "undamped, and no view of the gradient"
    assert buffer.is_leaf and not buffer.requires_grad


def test_no_state_without_momentum_or_before_a_gradient() -> None:
    ours = cases.make_parameters((3, 4, 5), cases.generator(0))
    optimizer = FrozenAwareSGD(ours, lr=0.1)
    for p in ours:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["momentum"] = 0.9
    ours[0].grad = None
    optimizer.step()
    assert list(optimizer.state) == ours[1:]
