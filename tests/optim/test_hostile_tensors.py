"""Tensors that share memory, have lost it or are of other kinds; see hostile_input.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import hostile
from tests.helpers import optim_cases as cases
from tests.helpers.hostile_input import (
    BUFFERS,
    Build,
    Case,
    Make,
    check,
    each,
    edit_state,
    make_params,
    trained,
)

# --- memory that is shared, strided or gone


def _tensors(make_tensors: Callable[[], list[Any]], **hyper: Any) -> Build:
    def build(make: Make) -> torch.optim.Optimizer:
        return make(make_tensors(), **hyper)

    return build


def _with_grad(p: Tensor, grad: Tensor | None = None) -> Tensor:
    p = p.detach().requires_grad_()
    p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(p.dtype) if grad is None else grad
    return p


def _views(*slices: slice) -> Callable[[], list[Any]]:
    def make_tensors() -> list[Any]:
        base = torch.arange(64.0)
        return [_with_grad(base[part]) for part in slices]

    return make_tensors


def _own_grad() -> list[Any]:
    p = torch.nn.Parameter(torch.ones(8))
    p.grad = p.data
    return [p]


def _others_grad() -> list[Any]:
    a, b = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8) * 2)
    a.grad, b.grad = b.data, a.data
    return [a, b]


def _one_grad_for_all() -> list[Any]:
    params = [torch.nn.Parameter(torch.full((8,), float(i))) for i in range(4)]
    grad = torch.ones(8)
    for p in params:
        p.grad = grad
    return params


def _resize(what: Callable[[torch.optim.Optimizer, Tensor], Tensor], to: int) -> Build:
    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make)
        p = optimizer.param_groups[0]["params"][1]
        what(optimizer, p).untyped_storage().resize_(to)
        return optimizer

    return build


def _twice(make: Make) -> torch.optim.Optimizer:
    params = make_params()
    optimizer = trained(make, params)
    optimizer.param_groups[0]["params"] = [*params, params[0], params[2]]
    return optimizer


def _memory_cases() -> Iterator[tuple[str, Case]]:
    tables: dict[str, Callable[[], list[Any]]] = {
        "views side by side": _views(slice(0, 7), slice(7, 20), slice(20, 64)),
        "views that overlap by one": _views(slice(0, 8), slice(7, 20)),
        "views that overlap wholly": _views(slice(0, 20), slice(0, 20), slice(0, 20)),
        "a view inside a view": _views(slice(0, 64), slice(5, 6), slice(30, 40)),
        "views in falling order": _views(slice(40, 64), slice(20, 40), slice(0, 20)),
        "interleaved views": _views(slice(0, 64, 2), slice(1, 64, 2)),
        "a view of every third": _views(slice(0, 64, 3)),
        "a view of nothing": _views(slice(5, 5), slice(0, 64)),
        "its own gradient": _own_grad,
        "each other's gradient": _others_grad,
        "one gradient for all": _one_grad_for_all,
        "a transposed view of another": lambda: [
            _with_grad(base := torch.arange(16.0).reshape(4, 4)),
            _with_grad(base.t()),
        ],
        "the diagonal of another": lambda: [
            _with_grad(base := torch.arange(16.0).reshape(4, 4)),
            _with_grad(base.diagonal()),
        ],
        "memory of NumPy, twice": lambda: [
            _with_grad(torch.from_numpy(array)) for array in [torch.arange(8.0).numpy()] * 2
        ],
        "a byte buffer": lambda: [
            _with_grad(torch.frombuffer(bytearray(64), dtype=torch.float32, offset=4))
        ],
        "a misaligned byte buffer": lambda: [
            _with_grad(torch.frombuffer(bytearray(65), dtype=torch.float32, offset=1, count=16))
        ],
        "a gradient that is expanded": lambda: [
            _with_grad(torch.ones(4, 6), torch.ones(1).expand(4, 6))
        ],
        "a gradient that is transposed": lambda: [
            _with_grad(torch.ones(4, 6), torch.arange(24.0).reshape(6, 4).t())
        ],
        "a gradient that requires grad": lambda: [
            _with_grad(torch.ones(4, 6), torch.ones(4, 6, requires_grad=True))
        ],
        "a gradient that is a view of the parameter": lambda: [
            _with_grad(p := torch.arange(12.0), p.view(12))
        ],
        "0-dim": lambda: [_with_grad(torch.tensor(3.0))],
        "of 30 dimensions": lambda: [_with_grad(torch.arange(4.0).reshape([1] * 28 + [2, 2]))],
        "of sizes 0": lambda: [_with_grad(torch.ones(0, 3)), _with_grad(torch.ones(3, 0, 2))],
        "huge and empty": lambda: [_with_grad(torch.ones(0, 1 << 40))],
        "huge and expanded": lambda: [
            _with_grad(torch.ones(1).expand(1 << 40), torch.ones(1).expand(1 << 40))
        ],
    }
    for name, make_tensors in tables.items():
        # Stock, as a loop, rounds strided and expanded tensors in another order.
        strided = any(
            w in name for w in ("interleaved", "third", "transposed", "diagonal", "expanded")
        )
        # Stock's AdamW decays the parameter before it reads the gradient.
        as_gradient = name in ("its own gradient", "a gradient that is a view of the parameter")
        for family in ("SGD", "AdamW"):
            alone = strided or (as_gradient and family == "AdamW")
            yield (
                f"tensors: {name}, {family}",
                Case(_tensors(make_tensors), alone=alone, families=(family,)),
            )
        yield (
            f"tensors: {name}, no momentum",
            Case(_tensors(make_tensors, momentum=0.0), alone=strided, families=("SGD",)),
        )
    values: dict[str, Callable[[str], Callable[[Tensor, dict[str, Any]], Any]]] = {
        "the parameter": lambda key: lambda p, entry: p.data,
        "the gradient": lambda key: lambda p, entry: p.grad,
        "the parameter object": lambda key: lambda p, entry: p,
        "an overlapping view of the parameter": lambda key: (
            lambda p, entry: p.data.as_strided((4, 6), (3, 1))
        ),
        "a subclass": lambda key: lambda p, entry: entry[key].as_subclass(_Plain),
    }
    for key, family in BUFFERS.items():
        for name, value in values.items():
            yield (
                f"{key} that is {name}",
                Case(
                    edit_state(key, value(key)),
                    alone="overlapping" in name,
                    families=(family,),
                ),
            )
        yield (
            f"{key} that is an inference tensor",
            Case(
                edit_state(key, lambda p, entry: _inference(p)),
                error=f"{key}.*inference",
                families=(family,),
            ),
        )
        for to in (0, 4, 92):
            yield (
                f"{key} whose storage has {to} of 96 bytes",
                Case(
                    _resize(lambda o, p, key=key: o.state[p][key], to),
                    error=r"params'\]\[1\].*storage",
                    families=(family,),
                ),
            )
    yield "a parameter that is an inference tensor", Case(_inference_parameter, error="inference")
    whats: dict[str, Callable[[torch.optim.Optimizer, Tensor], Tensor]] = {
        "parameter": lambda o, p: p.detach(),
        "gradient": lambda o, p: p.grad,  # type: ignore[dict-item, return-value]
    }
    for name, what in whats.items():
        for to in (0, 4, 92):
            yield (
                f"a {name} whose storage has {to} of 96 bytes",
                Case(_resize(what, to), error=r"params'\]\[1\].*storage"),
            )
    yield "a parameter that is there twice", Case(_twice)
    for family in ("SGD", "AdamW"):
        yield (
            f"a parameter that is there twice from the start, {family}",
            Case(
                lambda make: make([*(params := make_params()), params[0], params[2]]),
                families=(family,),
            ),
        )


# --- the count of updates, and what AdamW's state holds beside it


def _share(*keys: str) -> Build:
    """All parameters have the first one's."""

    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make)
        params = optimizer.param_groups[0]["params"]
        for p in params:
            optimizer.state[p].update({key: optimizer.state[params[0]][key] for key in keys})
        return optimizer

    return build


def _in_group(**hyper: Any) -> Build:
    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make)
        optimizer.param_groups[0].update(hyper)
        return optimizer

    return build


def _count_cases() -> Iterator[tuple[str, Case]]:
    adamw = {"families": ("AdamW",)}
    fine: dict[str, Callable[[Tensor, dict[str, Any]], Any]] = {
        "int64": lambda p, entry: entry["step"].long(),
        "float64": lambda p, entry: entry["step"].double(),
        "bfloat16": lambda p, entry: entry["step"].bfloat16(),
        "of shape [1]": lambda p, entry: entry["step"].reshape(1),
        "of shape [1, 1]": lambda p, entry: entry["step"].reshape(1, 1),
        "expanded": lambda p, entry: torch.tensor(1.0).expand(1),
        "requiring grad": lambda p, entry: torch.tensor(1.0, requires_grad=True),
        "a Parameter": lambda p, entry: torch.nn.Parameter(torch.tensor(1.0)),
        "a subclass": lambda p, entry: torch.tensor(1.0).as_subclass(_Loud),
        "a quiet subclass": lambda p, entry: torch.tensor(1.0).as_subclass(_Plain),
        "a negative view": lambda p, entry: cases.negated(1.0, "cpu"),
        "nan": lambda p, entry: torch.tensor(math.nan),
        "inf": lambda p, entry: torch.tensor(math.inf),
        "half a step": lambda p, entry: torch.tensor(0.5),
        "too large to grow": lambda p, entry: torch.tensor(2.0**24),
        "misaligned": lambda p, entry: torch.frombuffer(
            bytearray(9), dtype=torch.float32, offset=1, count=1
        ),
    }
    for name, value in fine.items():
        yield f"a step that is {name}", Case(edit_state("step", value), **adamw)
    overlapping: dict[str, Callable[[Tensor, dict[str, Any]], Any]] = {
        "of the parameter": lambda p, entry: p.data[0, 0],
        "of the gradient": lambda p, entry: p.grad[0, 0],  # type: ignore[index]
        "of a moment": lambda p, entry: entry["exp_avg"][0, 0],
    }
    for name, value in overlapping.items():
        yield (
            f"a step that is an element {name}",
            Case(edit_state("step", value), **adamw),
        )
    yield (
        "a step without memory",
        Case(
            _resize(lambda o, p: o.state[p]["step"], 0),
            error="step.*storage",
            **adamw,
        ),
    )
    bad: dict[str, Callable[[Tensor, dict[str, Any]], Any]] = {
        "None": lambda p, entry: None,
        "a Python number": lambda p, entry: 1,
        "of two": lambda p, entry: torch.ones(2),
        "of none": lambda p, entry: torch.ones(0),
        "of the parameter's shape": lambda p, entry: torch.ones_like(p).detach(),
        "complex": lambda p, entry: torch.tensor(1j),
        "bool": lambda p, entry: torch.tensor(True),
        "sparse": lambda p, entry: torch.tensor([1.0]).to_sparse(),
        "on the meta device": lambda p, entry: entry["step"].to("meta"),
        "an inference tensor": lambda p, entry: _inference(entry["step"]),
    }
    for name, value in bad.items():
        yield (
            f"a step that is {name}",
            Case(
                edit_state("step", value),
                error=r"step.*param_groups\[0\]\['params'\]\[1\]|param_groups\[0\]\['params'\]\[1\].*step",
                **adamw,
            ),
        )
    yield "one step for all parameters", Case(_share("step"), **adamw)
    yield "one moment for all parameters", Case(_share("exp_avg"), **adamw)
    yield "one state for all parameters", Case(_share("step", "exp_avg", "exp_avg_sq"), **adamw)
    for first, second in (("exp_avg", "exp_avg_sq"), ("exp_avg_sq", "max_exp_avg_sq")):
        yield (
            f"{second} that is {first}",
            Case(
                edit_state(second, lambda p, entry, key=first: entry[key].mul_(1e4), amsgrad=True),
                **adamw,
            ),
        )
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        for name, change in {
            "float64": Tensor.double,
            "bfloat16": Tensor.bfloat16,
            "transposed": lambda moment: moment.t().contiguous().t(),
            "strided": lambda moment: moment.repeat(1, 2)[:, ::2],
            "of another shape": lambda moment: moment[:2],
            "sparse": Tensor.to_sparse,
        }.items():
            yield (
                f"with amsgrad, a {key} that is {name}",
                Case(
                    edit_state(
                        key,
                        lambda p, entry, key=key, change=change: change(entry[key]),
                        amsgrad=True,
                    ),
                    **adamw,
                ),
            )
    for key in ("step", "exp_avg", "exp_avg_sq"):
        yield (
            f"a state without {key}",
            Case(_without(key), error=rf"\['params'\]\[1\] has no {key}", **adamw),
        )
    yield "amsgrad switched on", Case(_in_group(amsgrad=True), alone=True, **adamw)
    yield "a state of other things", Case(_of_other_things, alone=True, **adamw)


def _without(key: str) -> Build:
    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make)
        del optimizer.state[optimizer.param_groups[0]["params"][1]][key]
        return optimizer

    return build


def _of_other_things(make: Make) -> torch.optim.Optimizer:
    optimizer = trained(make)
    optimizer.state[optimizer.param_groups[0]["params"][1]] = {"mine": 1}
    return optimizer


def _inference(p: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.ones_like(p)


def _inference_parameter(make: Make) -> torch.optim.Optimizer:
    params: list[Any] = make_params()
    with torch.inference_mode():
        params[1] = torch.nn.Parameter(torch.ones(4, 6))
        params[1].grad = torch.ones(4, 6)
    return make(params)


# --- tensors of other kinds


class _Plain(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class _Loud(torch.Tensor):
    pass


class _Hashed(torch.nn.Parameter):
    """Its hash is a Python function that drops all gradients."""

    victims: list[Tensor]

    def __hash__(self) -> int:
        for p in type(self).victims:
            p.grad = None
        return id(self)


class _Refuses(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grad" in str(func) or "hash" in str(func):
            return super().__torch_function__(func, kinds, args, kwargs or {})
        raise RuntimeError("not through me")


def _with_hashed(make: Make) -> torch.optim.Optimizer:
    params = make_params(4)
    _Hashed.victims = []
    params.insert(2, _Hashed(torch.ones(4, 6)))
    params[2].grad = torch.ones(4, 6)
    optimizer = trained(make, params)
    _Hashed.victims = params
    return optimizer


def _evil_lr(what: Callable[[torch.optim.Optimizer], Any]) -> Build:
    """Reading the second group's lr runs `what`."""

    def build(make: Make) -> torch.optim.Optimizer:
        gen = cases.generator(3)
        params = cases.make_parameters([40_000] * 4, gen, device=hostile.DEVICE)
        for p in params:
            p.grad = cases.randn(40_000, gen, device=hostile.DEVICE)
        optimizer = make([{"params": params[:2]}, {"params": params[2:]}])
        optimizer.step()

        class Evil:
            def __float__(self) -> float:
                what(optimizer)
                return 0.1

        optimizer.param_groups[1]["lr"] = Evil()
        return optimizer

    return build


def _kind_cases() -> Iterator[tuple[str, Case]]:
    kinds: dict[str, Callable[[], list[Any]]] = {
        "complex64": lambda: [_with_grad(torch.ones(4, dtype=torch.complex64))],
        "complex128": lambda: [_with_grad(torch.ones(4, dtype=torch.complex128))],
        "meta": lambda: [_with_grad(torch.ones(4, device="meta"), torch.ones(4, device="meta"))],
        "a sparse gradient": lambda: [_with_grad(torch.ones(4), torch.ones(4).to_sparse())],
        "a sparse parameter": lambda: [
            _with_grad(torch.eye(4).to_sparse(), torch.eye(4).to_sparse())
        ],
        "a CSR gradient": lambda: [_with_grad(torch.eye(4), torch.eye(4).to_sparse_csr())],
        "a conjugate view": lambda: [
            _with_grad(
                torch.ones(4, dtype=torch.complex64), torch.ones(4, dtype=torch.complex64).conj()
            )
        ],
        "a negative view": lambda: [
            _with_grad(torch.ones(4), torch.zeros(4, dtype=torch.complex64).conj().imag)
        ],
        "nested": lambda: [
            _with_grad(
                torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
                torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            )
        ],
        "mkldnn": lambda: [_with_grad(torch.ones(4).to_mkldnn(), torch.ones(4).to_mkldnn())],
        "an inference tensor": lambda: [_inference(torch.ones(4))],
        "a subclass": lambda: [_with_grad(torch.ones(4)).as_subclass(_Loud)],
        "a quiet subclass": lambda: [torch.nn.Parameter(torch.ones(4)).as_subclass(_Plain)],
        "an uninitialized parameter": lambda: [torch.nn.UninitializedParameter()],
        "float8": lambda: [
            _with_grad(torch.ones(4).to(torch.float8_e4m3fn), torch.ones(4).to(torch.float8_e4m3fn))
        ],
        "a gradient of nan": lambda: [_with_grad(torch.ones(9), torch.full((9,), math.nan))],
        "a gradient of inf": lambda: [_with_grad(torch.ones(9), torch.full((9,), math.inf))],
        "denormal": lambda: [_with_grad(torch.full((9,), 1e-40), torch.full((9,), -1e-41))],
        "near overflow": lambda: [_with_grad(torch.full((9,), 3e38), torch.full((9,), -3e38))],
    }
    for name, make_tensors in kinds.items():
        with_others = _tensors(lambda make_tensors=make_tensors: [*make_params(2), *make_tensors()])
        if name == "a conjugate view":  # stock's AdamW gives up when it has counted the step
            for family in ("SGD", "AdamW"):
                alone = {"alone": family == "AdamW", "families": (family,)}
                yield f"of a kind: {name}, {family}", Case(_tensors(make_tensors), **alone)
                yield f"of a kind: {name}, {family}, with others", Case(with_others, **alone)
            continue
        yield f"of a kind: {name}", Case(_tensors(make_tensors))
        yield f"of a kind: {name}, with others", Case(with_others)
    yield (
        "a subclass that refuses every operator",
        Case(_tensors(lambda: [_with_grad(torch.ones(4)).as_subclass(_Refuses)])),
    )
    yield "a parameter whose hash drops the gradients", Case(_with_hashed, alone=True)
    evil: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
        "drops the gradients": lambda o: o.zero_grad(),
        "clears the state": lambda o: o.state.clear(),
        "clears the groups": lambda o: o.param_groups.clear(),
        "clears its own group": lambda o: o.param_groups[1].clear(),
        "clears the parameters": lambda o: [g["params"].clear() for g in o.param_groups],
        "exchanges the memory": lambda o: [
            setattr(p, "data", p.detach().clone()) for g in o.param_groups for p in g["params"]
        ],
        "steps": lambda o: o.param_groups[1].update(lr=0.1) or o.step(),
        "steps forever": lambda o: o.step(),
        "adds a group": lambda o: o.add_param_group({"params": [torch.ones(2)]}),
    }
    for name, what in evil.items():
        yield f"an lr that, when read, {name}", Case(_evil_lr(what), alone=True)


CASES = hostile.Table(__name__, [*_memory_cases(), *_count_cases(), *_kind_cases()])


def _on_gpu() -> Iterator[str]:
    """What lies in a GPU's memory, once each.

    Left out: what only repeats a case without momentum or with other tensors beside it, memory of
    NumPy and Python, which stays on the CPU, and what stock finds wrong when an operator runs (no
    arithmetic of float8, shapes that do not fit), which may be late on simulated CUDA.
    """
    elsewhere = ("no momentum", "memory of NumPy", "byte buffer", "float8", "sq that is of another")
    for name in CASES:
        alone = name.startswith("of a kind") and not name.endswith("with others")
        if not alone and not any(words in name for words in elsewhere):
            yield name


@pytest.mark.filterwarnings("ignore")
@each(CASES, _on_gpu())
def test_hostile_input_is_an_error_or_stocks_result(case: Case, family: str, device: str) -> None:
    check(case, family, device)
