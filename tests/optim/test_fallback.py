"""What the kernels do not cover: stock's own form, the same results, still frozen-aware."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_freeze
from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import Family, FrozenAwareSGD, Hyper

each_hyper = pytest.mark.parametrize(
    ("family", "hyper"),
    cases.per_family(lambda family: {} if family is cases.ADAM else family.some_hypers),
)

# ------------------------------------------------------------------------------------------ sparse

SPARSE_HYPERS: dict[str, Hyper] = {
    "plain": {"lr": 0.1},
    "maximize": {"lr": 0.1, "maximize": True},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "momentum and dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
}


def _sparse_grad(gen: torch.Generator, coalesced: bool = False) -> Tensor:
    """A gradient for some of ten rows, for some of them twice."""
    rows = torch.randint(10, (6,), generator=gen)
    grad = torch.sparse_coo_tensor(
        rows[None], cases.randn((6, 4), gen), (10, 4), check_invariants=True
    )
    return grad.coalesce() if coalesced else grad


def _assert_same(a: Any, b: Any, what: str) -> None:
    if a is None or b is None:
        assert a is b, what
        return
    assert a.layout == b.layout, what
    cases.assert_same_bits(a.to_dense(), b.to_dense(), what)


@pytest.mark.parametrize("coalesced", [False, True], ids=["uncoalesced", "coalesced"])
@pytest.mark.parametrize("hyper", cases.ids(SPARSE_HYPERS))
def test_sparse_gradients(hyper: Hyper, coalesced: bool) -> None:
    """A sparse buffer stays sparse, and dense parameters in the same group are stepped as usual."""
    gen = cases.generator(0)
    ours = cases.make_parameters((7, (10, 4), 5, (10, 4)), gen)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, **hyper)
    reference = torch.optim.SGD(theirs, **hyper, foreach=False)
    for step in range(4):
        cases.set_grads(ours, theirs, gen)
        for i in (1, 3):
            grad = _sparse_grad(gen, coalesced)
            ours[i].grad, theirs[i].grad = grad, grad.clone()
        frozen = step == 2
        ours[3].requires_grad_(not frozen)
        if frozen:
            theirs[3].grad = None
        optimizer.step()
        reference.step()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            what = f"after step {step + 1}: params[{i}]"
            _assert_same(p, q, what)
            _assert_same(cases.buffer_of(optimizer, p), cases.buffer_of(reference, q), what)
        assert not frozen or ours[3].grad is None


def test_dense_then_sparse_gradient_with_momentum() -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters(((10, 4),), gen)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for step in range(4):
        grad = cases.randn((10, 4), gen) if step % 2 == 0 else _sparse_grad(gen)
        for p in (*ours, *theirs):
            p.grad = None
            p.grad = grad.clone()
        optimizer.step()
        reference.step()
        _assert_same(ours[0], theirs[0], f"after step {step + 1}")


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "in the middle", "last"])
@pytest.mark.parametrize("groups", [1, 3], ids="{} groups".format)
@pytest.mark.parametrize("momentum", [0, 0.9], ids="momentum {}".format)
def test_sparse_with_decay_raises_and_writes_nothing(
    momentum: float, groups: int, place: int
) -> None:
    gen = cases.generator(0)
    params = cases.make_parameters(((10, 4), (10, 4), (10, 4)), gen)
    optimizer = FrozenAwareSGD(cases.in_groups(params, groups), momentum=momentum, weight_decay=0.1)
    for p in params:
        p.grad = cases.randn((10, 4), gen)
    params[place].grad = None
    params[place].grad = _sparse_grad(gen)
    before = cases.Snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    before.assert_unchanged()


def test_a_frozen_sparse_gradient_with_decay_is_simply_dropped() -> None:
    gen = cases.generator(0)
    frozen, trained = cases.make_parameters(((10, 4), (10, 4)), gen)
    frozen.requires_grad_(False)
    optimizer = FrozenAwareSGD([frozen, trained], lr=0.1, weight_decay=0.1)
    frozen.grad, trained.grad = _sparse_grad(gen), torch.ones(10, 4)
    optimizer.step()
    assert frozen.grad is None


@pytest.mark.parametrize("device", cases.DEVICES)
def test_an_embedding_with_sparse_gradients_trains(device: str) -> None:
    torch.manual_seed(0)
    models = [torch.nn.Embedding(10, 4, sparse=True, device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizer = FrozenAwareSGD(models[0].parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, foreach=False)
    for step in range(4):
        for model, sgd in zip(models, (optimizer, reference), strict=True):
            sgd.zero_grad()
            model(torch.tensor([step, 3, 3], device=device)).square().sum().backward()
            sgd.step()
        cases.assert_same_bits(models[0].weight, models[1].weight, f"after step {step + 1}")


# ----------------------------------------------------------------------------------------- complex

COMPLEX = {"complex64": torch.complex64, "complex128": torch.complex128}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(COMPLEX))
@pytest.mark.parametrize("conjugate", [False, True], ids=["plain gradient", "conjugated gradient"])
@each_hyper
def test_complex_parameters(
    family: Family, hyper: Hyper, conjugate: bool, dtype: torch.dtype, device: str
) -> None:
    gen = cases.generator(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=dtype).to(device)

    start = values(7, 3)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    beside = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = family.ours([beside, p], **hyper)
    reference = family.stock([q], **hyper, foreach=device == "cuda")
    for step in range(4):
        grad = values(7, 3)
        p.grad = grad.conj() if conjugate else grad.clone()
        q.grad = p.grad.resolve_conj().clone()
        beside.grad = torch.ones_like(beside)
        p.requires_grad_(step != 2)
        if step == 2:
            q.grad = None
        optimizer.step()
        reference.step()
        cases.assert_same_bits(p, q, f"after step {step + 1}")
        assert step != 2 or p.grad is None
    assert (beside != 1).all()


# -------------------------------------------------------------------------------------- subclasses


class PlainSubclass(torch.nn.Parameter):
    """Overrides nothing, like subclasses that only mark EMA or LoRA parameters."""


class FunctionSubclass(Tensor):
    """Counts the operations it sees."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        FunctionSubclass.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(Tensor):
    """Holds its numbers in another tensor; has no memory of its own."""

    elem: Tensor
    writes = 0

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False) -> Wrapper:
        self: Wrapper = Tensor._make_wrapper_subclass(
            cls, elem.shape, dtype=elem.dtype, device=elem.device, requires_grad=requires_grad
        )
        self.elem = elem
        return self

    def __repr__(self) -> str:
        return f"Wrapper({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map

        def unwrap(x: Any) -> Any:
            return x.elem if isinstance(x, Wrapper) else x

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if func.overloadpacket.__name__.endswith("_"):
            Wrapper.writes += 1
            return args[0]
        return tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, out)


@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@each_hyper
def test_a_subclass_of_parameter(family: Family, hyper: Hyper, dtype: torch.dtype) -> None:
    gen = cases.generator(0)
    ours = [PlainSubclass(cases.randn(n, gen, dtype)) for n in (5, 70)]
    theirs = cases.twin(ours)
    optimizer = family.ours(ours, **hyper)
    reference = family.stock(theirs, **hyper, foreach=False)
    for step in range(4):
        cases.set_grads([p.data for p in ours], theirs, gen)
        for p, q in zip(ours, theirs, strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
        ours[0].requires_grad_(step != 1)
        theirs[0].requires_grad_(step != 1)
        if step == 1:
            theirs[0].grad = None
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@each_hyper
def test_a_torch_function_subclass_sees_its_operations(family: Family, hyper: Hyper) -> None:
    gen = cases.generator(0)
    start = cases.randn(5, gen)
    p = torch.nn.Parameter(start.clone().as_subclass(FunctionSubclass))
    q = torch.nn.Parameter(start.clone())
    optimizer = family.ours([p], **hyper)
    reference = family.stock([q], **hyper, foreach=False)
    for step in range(3):
        grad = cases.randn(5, gen)
        p.grad, q.grad = grad.clone().as_subclass(FunctionSubclass), grad.clone()
        before = FunctionSubclass.calls
        optimizer.step()
        assert FunctionSubclass.calls > before, "updated behind the subclass's back"
        reference.step()
        cases.assert_same_bits(p.as_subclass(Tensor), q, f"after step {step + 1}")
    p.requires_grad_(False)
    p.grad = torch.ones(5).as_subclass(FunctionSubclass)
    optimizer.step()
    assert p.grad is None
    cases.assert_same_bits(p.as_subclass(Tensor), q, "frozen")


class WithoutLayout(Wrapper):
    """Answers for its own strides, and says no."""

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False) -> WithoutLayout:
        self: WithoutLayout = Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            elem.stride(),
            dtype=elem.dtype,
            device=elem.device,
            requires_grad=requires_grad,
            dispatch_sizes_strides_policy="strides",
        )
        self.elem = elem
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "is_contiguous":
            raise RuntimeError("asked for its layout")
        if func.overloadpacket.__name__ in ("stride", "sym_stride"):
            return args[0].elem.stride()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return cls(out.elem) if type(out) is Wrapper else out


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_subclass_is_not_asked_for_its_layout(momentum: float) -> None:
    p, q = WithoutLayout(torch.ones(3, 4), requires_grad=True), torch.nn.Parameter(torch.ones(3, 4))
    optimizer = FrozenAwareSGD([p], lr=0.1, momentum=momentum)
    reference = torch.optim.SGD([q], lr=0.1, momentum=momentum, foreach=False)
    for _ in range(2):
        p.grad, q.grad = WithoutLayout(torch.ones(3, 4)), torch.ones(3, 4)
        optimizer.step()
        reference.step()
    cases.assert_same_bits(p.elem, q, "after two steps")


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_torch_dispatch_subclass_sees_its_operations(hyper: Hyper) -> None:
    gen = cases.generator(0)
    start = cases.randn(5, gen)
    p = torch.nn.Parameter(Wrapper(start.clone()))
    q, beside = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([p, beside], **hyper)
    reference = torch.optim.SGD([q], **hyper, foreach=False)
    for step in range(3):
        grad = cases.randn(5, gen)
        p.grad, q.grad = Wrapper(grad.clone()), grad.clone()
        beside.grad = torch.ones(3)
        before = Wrapper.writes
        optimizer.step()
        assert Wrapper.writes > before
        reference.step()
        cases.assert_same_bits(p.detach().elem, q, f"after step {step + 1}")
        if hyper.get("momentum"):
            buffer = cases.buffer_of(optimizer, p)
            assert isinstance(buffer, Wrapper)
            cases.assert_same_bits(buffer.elem, cases.buffer_of(reference, q), "buffer")
    p.requires_grad_(False)
    p.grad = Wrapper(torch.ones(5))
    optimizer.step()
    assert p.grad is None
    cases.assert_same_bits(p.detach().elem, q, "frozen")


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_the_meta_device(hyper: Hyper) -> None:
    """Memory planning runs a step on shapes alone."""
    params = [torch.nn.Parameter(torch.empty(3, 4, device="meta")) for _ in range(2)]
    params[1].requires_grad_(False)
    optimizer = FrozenAwareSGD(params, **hyper)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty(3, 4, device="meta")
        optimizer.step()
        assert params[1].grad is None
    buffer = cases.buffer_of(optimizer, params[0])
    assert (buffer is not None) == bool(hyper.get("momentum"))
    assert buffer is None or buffer.is_meta
    optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    assert params[0].grad is None


def test_fake_tensors() -> None:
    """They report a real device but have no memory to read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = torch.nn.Linear(3, 4)
        optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        model.bias.requires_grad_(False)
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        assert cases.buffer_of(optimizer, model.weight).shape == (4, 3)
        optimizer.zero_grad(set_to_none=False)


# ---------------------------------------------------------------- implementations asked for by name

BY_NAME: dict[str, Hyper] = {
    "foreach=True": {"foreach": True},
    "foreach=False": {"foreach": False},
    "fused=False": {"fused": False},
    "foreach=True, fused=False": {"foreach": True, "fused": False},
    "foreach=False, fused=False": {"foreach": False, "fused": False},
}


@pytest.mark.parametrize("per_group", [False, True], ids=["per optimizer", "per group"])
@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@each_hyper
@pytest.mark.parametrize("name", cases.ids(BY_NAME))
def test_an_implementation_asked_for_by_name_is_stocks(
    name: Hyper, family: Family, hyper: Hyper, dtype: torch.dtype, device: str, per_group: bool
) -> None:
    """Its rounding of bf16 and fp16 is kept, too, and frozen tensors are still left out."""
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70, 9), gen, dtype, device)
    theirs = cases.twin(ours)

    def make(kind: Any, params: list[Any]) -> Any:
        if not per_group:
            return kind(params, **hyper, **name)
        return kind([{"params": params[:2], **name}, {"params": params[2:], **name}], **hyper)

    optimizer, stock = make(family.ours, ours), make(family.stock, theirs)
    for step in range(5):
        frozen = step in (1, 2)
        ours[1].requires_grad_(not frozen)
        theirs[1].requires_grad_(not frozen)
        cases.set_grads(ours, theirs, gen)
        if frozen:
            theirs[1].grad = None
        optimizer.step()
        stock.step()
        cases.assert_same_training(optimizer, stock, f"after step {step + 1}:")


def test_foreach_with_nesterov_does_not_write_into_the_gradient() -> None:
    """Stock's foreach form does, where there is no decay."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([p], lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
        assert torch.equal(p.grad, torch.ones(3))


@each_hyper
@pytest.mark.parametrize(
    "implementation",
    cases.ids({"foreach and fused unset": {}, "fused=True": {"fused": True}} | BY_NAME),
)
def test_no_implementation_writes_into_a_gradient(
    implementation: Hyper, family: Family, hyper: Hyper
) -> None:
    gen = cases.generator(0)
    params = cases.make_parameters((3, 70), gen)
    optimizer = family.ours(params, **hyper, **implementation)
    for _ in range(3):
        for p in params:
            p.grad = cases.randn(p.shape, gen)
        kept = [(p.grad.clone(), p.grad._version) for p in params if p.grad is not None]
        optimizer.step()
        for p, (grad, version) in zip(params, kept, strict=True):
            assert p.grad is not None and p.grad._version == version
            cases.assert_same_bits(p.grad, grad, "gradient")


FUSED_REFUSALS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {
    "complex": (lambda: torch.ones(10, 4, dtype=torch.complex64), torch.ones_like),
    "meta device": (lambda: torch.ones(10, 4, device="meta"), torch.ones_like),
    "sparse": (lambda: torch.ones(10, 4), lambda p: _sparse_grad(cases.generator(0))),
}


@pytest.mark.parametrize(("value", "grad"), cases.ids(FUSED_REFUSALS))
def test_fused_true_refuses_what_stock_fused_refuses(
    value: Callable[[], Tensor], grad: Callable[[Tensor], Tensor]
) -> None:
    """With stock's message, and before anything is written."""
    p, q = torch.nn.Parameter(value()), torch.nn.Parameter(value())
    beside = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([beside, p], lr=0.1, momentum=0.9, fused=True)
    stock = torch.optim.SGD([q], lr=0.1, momentum=0.9, fused=True)
    beside.grad, p.grad, q.grad = torch.ones(3), grad(p.detach()), grad(q.detach())
    with pytest.raises(RuntimeError) as expected:
        stock.step()
    before = cases.Snapshot(optimizer)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert str(expected.value) in str(raised.value)
    before.assert_unchanged()
    p.requires_grad_(False)
    optimizer.step()
    assert p.grad is None and (beside != 1).all(), (
        "the gradient of a frozen parameter is not checked"
    )


# --------------------------------------------------------------------------------- differentiable


@pytest.mark.parametrize(
    ("momentum", "learn", "steps"),
    cases.ids(
        {
            "plain, learning rate and decay, three steps": (0, ("lr", "weight_decay"), 3),
            "plain, learning rate, two steps": (0, ("lr",), 2),
            "momentum, decay, three steps": (0.9, ("weight_decay",), 3),
            # Stock itself cannot differentiate a second step by the rate: it writes the buffer.
            "momentum, learning rate and decay, one step": (0.9, ("lr", "weight_decay"), 1),
            "momentum, neither, three steps": (0.9, (), 3),
        }
    ),
)
def test_differentiable_true_differentiates_through_the_step(
    momentum: float, learn: tuple[str, ...], steps: int
) -> None:
    """d(loss)/d(parameter), d(rate) and d(decay) are stock's, bit for bit."""
    results = []
    for make in (FrozenAwareSGD, torch.optim.SGD):
        gen = cases.generator(0)
        leaf = torch.randn(5, generator=gen, dtype=torch.float64, requires_grad=True)
        scalars = {
            key: torch.tensor(value, dtype=torch.float64, requires_grad=key in learn)
            for key, value in (("lr", 0.1), ("weight_decay", 0.01))
        }
        p = leaf.clone()
        sgd = make([p], **scalars, momentum=momentum, differentiable=True)
        for _ in range(steps):
            p.grad = (leaf * torch.randn(5, generator=gen, dtype=torch.float64)).clone()
            sgd.step()
        p.square().sum().backward()
        results.append([p.detach(), leaf.grad, *(scalars[key].grad for key in learn)])
    for a, b in zip(*results, strict=True):
        # None where the path is cut by the first buffer, which stock detaches.
        assert (a is None and b is None) or torch.equal(a, b)


def test_differentiable_true_detaches_the_first_buffer() -> None:
    leaf = torch.ones(3, requires_grad=True)
    p = leaf.clone()
    optimizer = FrozenAwareSGD([p], lr=0.1, momentum=0.9, differentiable=True)
    p.grad = leaf * 2
    optimizer.step()
    assert not optimizer.state[p]["momentum_buffer"].requires_grad


def test_differentiable_true_is_frozen_aware() -> None:
    leaf = torch.ones(3, requires_grad=True)
    p, frozen = leaf.clone(), torch.ones(3)
    optimizer = FrozenAwareSGD([p, frozen], lr=0.1, differentiable=True)
    p.grad, frozen.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3)) and frozen.grad is None
    assert torch.equal(p.detach(), torch.full((3,), 0.9)) and p.grad_fn is not None


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_hyper_parameter_that_requires_grad(hyper: Hyper, key: str) -> None:
    """Stock takes another formula for it, with another rounding."""
    results = []
    for make in (FrozenAwareSGD, torch.optim.SGD):
        gen = cases.generator(0)
        p = torch.nn.Parameter(cases.randn(70, gen))
        kwargs = hyper | {key: torch.tensor(0.1, requires_grad=True)}
        sgd = make([p], **kwargs, **({} if make is FrozenAwareSGD else {"foreach": False}))
        for _ in range(3):
            p.grad = cases.randn(70, gen)
            sgd.step()
        results.append(p.detach())
    cases.assert_same_bits(results[0], results[1], key)


# ----------------------------------------------------------------------------------- torch.compile

COMPILERS = ["eager", "aot_eager", "inductor"]


def _compiled(step: Callable[[], Any], backend: str) -> Callable[[], Any]:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    return torch.compile(step, backend=backend)


@pytest.mark.parametrize("implementation", cases.ids({"foreach and fused unset": {}} | BY_NAME))
@pytest.mark.parametrize("backend", COMPILERS)
def test_a_compiled_step_honours_freezing_between_calls(
    backend: str, implementation: Hyper
) -> None:
    """Compiled code guards on `grad is None`, not on requires_grad: a traced check goes stale."""
    hyper = cases.SOME_HYPERS["momentum, dampening and decay"]
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 17), gen)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, **hyper, **implementation)
    reference = cases.Reference(theirs, **hyper)
    step = _compiled(lambda: optimizer.step(), backend)
    for number in range(8):
        for p in (ours[1], theirs[1]):
            p.requires_grad_(number not in (2, 3, 6))
        cases.set_grads(ours, theirs, gen)
        step()
        reference.step()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            what = f"after step {number + 1}: params[{i}]"
            cases.assert_close(p, q, what)
            if cases.buffer_of(reference, q) is not None:
                cases.assert_close(
                    cases.buffer_of(optimizer, p), cases.buffer_of(reference, q), what
                )
            assert p.requires_grad or p.grad is None


def test_a_training_step_compiled_by_inductor() -> None:
    """zero_grad, forward, backward and step in one compiled function."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizer = FrozenAwareSGD(models[0].parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, foreach=False)
    inputs = torch.randn(5, 4)

    def train(model: torch.nn.Module, sgd: torch.optim.Optimizer) -> None:
        sgd.zero_grad()
        model(inputs).square().sum().backward()
        sgd.step()

    compiled = _compiled(lambda: train(models[0], optimizer), "inductor")
    for number in range(5):
        for model in models:
            model.weight.requires_grad_(number != 2)
        compiled()
        train(models[1], reference)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), f"after step {number + 1}"


def test_compiling_a_step_warns_no_more_than_stock() -> None:
    heard = []
    for make in (torch.optim.SGD, FrozenAwareSGD):
        params = cases.make_parameters((5, 17), cases.generator(0))
        optimizer = make(params, lr=0.1, momentum=0.9)
        step = _compiled(lambda optimizer=optimizer: optimizer.step(), "eager")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                for p in params:
                    p.grad = torch.ones_like(p)
                step()
        heard.append({str(w.message)[:100] for w in caught})
    assert heard[1] <= heard[0]


CPU_ONLY = """
import warnings
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_freeze import FrozenAwareSGD

with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        p, frozen = (torch.nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2))
        optimizer = FrozenAwareSGD([p, frozen], lr=0.1, momentum=0.9)
        frozen.requires_grad_(False)
        for _ in range(3):
            p.grad, frozen.grad = torch.ones_like(p), torch.ones_like(p)
            optimizer.step()
            assert frozen.grad is None
        assert optimizer.state[p]["momentum_buffer"].is_cuda
print(*(w.message for w in caught), sep="\\n")
"""


@pytest.mark.skipif(torch_freeze.build_info().cuda is not None, reason="this build has CUDA code")
def test_cuda_tensors_with_a_cpu_only_build_warn_once_and_name_the_rebuild() -> None:
    """Fake CUDA tensors, so that no GPU is needed; a process of its own, since it warns once."""
    result = subprocess.run(
        [sys.executable, "-c", CPU_ONLY],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout.strip().split("\n")
    assert len(said) == 1, said
    assert "foreach" in said[0] and "USE_CUDA=1 pip install" in said[0]


def test_nothing_warns_on_the_usual_paths() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for hyper in cases.SOME_HYPERS.values():
            for kwargs in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}):
                params = cases.make_parameters((3, 0, (2, 5)), cases.generator(0))
                optimizer = FrozenAwareSGD(params, **hyper, **kwargs)
                params[0].requires_grad_(False)
                for _ in range(2):
                    for p in params:
                        p.grad = torch.ones_like(p)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)
                    optimizer.zero_grad()
