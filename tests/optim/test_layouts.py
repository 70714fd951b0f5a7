"""Every layout a parameter, gradient or buffer can have; nothing outside of it is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import Family, FrozenAwareSGD, Hyper

each_hyper = pytest.mark.parametrize(
    ("family", "hyper"),
    cases.per_family(lambda family: {} if family is cases.ADAM else family.some_hypers),
)

# A layout makes an uninitialised tensor of the given shape, dtype and device.
Layout = Callable[[tuple[int, ...], torch.dtype, str], Tensor]


def _transposed(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(shape[::-1], dtype=dtype, device=device).permute(
        *reversed(range(len(shape)))
    )


def _channels_last(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def _odd_singletons(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Contiguous, but with unusual strides in the dimensions of size 1."""
    plain = torch.empty(shape, dtype=dtype, device=device)
    strides = [
        997 if size == 1 else stride for size, stride in zip(shape, plain.stride(), strict=True)
    ]
    return plain.as_strided(shape, strides)


def _every_second(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype, device=device)[..., ::2]


def _inner_block(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    larger = torch.empty([size + 2 for size in shape], dtype=dtype, device=device)
    return larger[tuple(slice(1, 1 + size) for size in shape)]


DENSE_LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device),
    "transposed": _transposed,
    "channels_last": _channels_last,
    "odd strides in size-1 dims": _odd_singletons,
}

STRIDED_LAYOUTS: dict[str, Layout] = {
    "every second element": _every_second,
    "a block inside a larger tensor": _inner_block,
}

SHAPES = {
    "an ordinary shape": (6, 3, 5, 4),
    "one channel": (6, 1, 5, 4),
    "one row": (1, 3, 1, 70),
}


def _filled(layout: Layout, value: Tensor) -> Tensor:
    return layout(tuple(value.shape), value.dtype, str(value.device)).copy_(value)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@each_hyper
@pytest.mark.parametrize("shape", cases.ids({name: (shape,) for name, shape in SHAPES.items()}))
@pytest.mark.parametrize("layout", cases.ids(DENSE_LAYOUTS))
def test_dense_tensors_of_equal_strides_are_exact(
    layout: Layout,
    shape: tuple[int, ...],
    family: Family,
    hyper: Hyper,
    dtype: torch.dtype,
    device: str,
) -> None:
    gen = cases.generator(0)
    start = cases.randn(shape, gen, dtype, device)
    p, q = (torch.nn.Parameter(_filled(layout, start)) for _ in range(2))
    strides = p.stride()
    optimizer, reference = family.ours([p], **hyper), family.reference([q], **hyper)
    for step in range(3):
        grad = cases.randn(shape, gen, dtype, device)
        p.grad, q.grad = _filled(layout, grad), _filled(layout, grad)
        optimizer.step()
        reference.step()
        cases.assert_same_training(
            optimizer, reference, f"after step {step + 1}:", exact=family.exact_on(device)
        )
    assert p.stride() == strides


def _tolerance(dtype: torch.dtype) -> float:
    """1e-5, and for narrow types two roundings more, because stock rounds at each operation."""
    return max(1e-5, 4 * torch.finfo(dtype).eps) if dtype.itemsize == 2 else 1e-5


ALL_LAYOUTS = DENSE_LAYOUTS | STRIDED_LAYOUTS


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
@pytest.mark.parametrize("grad_layout", cases.ids(ALL_LAYOUTS))
@pytest.mark.parametrize("layout", cases.ids(ALL_LAYOUTS))
def test_any_layout_of_parameter_and_gradient(
    layout: Layout, grad_layout: Layout, hyper: Hyper, dtype: torch.dtype, device: str
) -> None:
    """Parameter and gradient may differ (stock fused gives silently wrong results there)."""
    gen = cases.generator(0)
    shape = (6, 3, 5, 4)
    start = cases.randn(shape, gen, dtype, device)
    p, q = torch.nn.Parameter(_filled(layout, start)), torch.nn.Parameter(start.clone())
    strides = p.stride()
    optimizer = FrozenAwareSGD([p], **hyper)
    reference = cases.Reference([q], **hyper)
    for step in range(3):
        grad = cases.randn(shape, gen, dtype, device)
        p.grad, q.grad = _filled(grad_layout, grad), grad.clone()
        kept = p.grad.clone()
        optimizer.step()
        reference.step()
        cases.assert_same_bits(p.grad, kept, "the gradient is only read")
        cases.assert_close(p, q, f"after step {step + 1}", _tolerance(dtype))
        if hyper.get("momentum"):
            ours, theirs = cases.buffer_of(optimizer, p), cases.buffer_of(reference, q)
            cases.assert_close(ours, theirs, f"buffer after step {step + 1}", _tolerance(dtype))
    assert p.stride() == strides


@pytest.mark.parametrize("grad_layout", cases.ids(ALL_LAYOUTS))
@pytest.mark.parametrize("layout", cases.ids(ALL_LAYOUTS))
@pytest.mark.parametrize(
    "hyper", cases.ids({k: v for k, v in cases.SOME_HYPERS.items() if "momentum" in v})
)
def test_the_first_buffer_has_stocks_strides(
    hyper: Hyper, layout: Layout, grad_layout: Layout
) -> None:
    """A copy of the gradient with the gradient's strides, where those are dense."""
    value = cases.randn((6, 3, 5, 4), cases.generator(0))
    p, q = (torch.nn.Parameter(_filled(layout, value)) for _ in range(2))
    optimizer = FrozenAwareSGD([p], **hyper)
    reference = torch.optim.SGD([q], **hyper, foreach=False)
    for sgd, parameter in ((optimizer, p), (reference, q)):
        parameter.grad = _filled(grad_layout, value)
        sgd.step()
    assert cases.buffer_of(optimizer, p).stride() == cases.buffer_of(reference, q).stride()


ODD_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one number expanded": lambda g: g[0, 0].expand(g.shape),
    "one row expanded": lambda g: g[:1].expand(g.shape),
    "one column expanded": lambda g: g[:, :1].expand(g.shape),
    "a negated view": lambda g: torch._neg_view(g),
    "the imaginary part of a conjugate": lambda g: torch.complex(g, g).conj().imag,
    "the real part of a complex tensor": lambda g: torch.complex(g, -g).real,
    "a tensor of zeros without storage": lambda g: torch._efficientzerotensor(
        g.shape, dtype=g.dtype, device=g.device
    ),
    "a view into a larger tensor": lambda g: torch.cat([g, g])[1 : 1 + len(g)],
    "flipped": lambda g: g.flip(0),
    "a gradient that requires grad": lambda g: g.clone().requires_grad_(),
    "a gradient with a history": lambda g: g.clone().requires_grad_() * 1,
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
@pytest.mark.parametrize("odd", cases.ids(ODD_GRADIENTS))
def test_odd_gradients(
    odd: Callable[[Tensor], Tensor], hyper: Hyper, dtype: torch.dtype, device: str
) -> None:
    gen = cases.generator(3)
    start = cases.randn((8, 9), gen, dtype, device)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = FrozenAwareSGD([p], **hyper)
    reference = torch.optim.SGD([q], **hyper, foreach=False)
    for step in range(3):
        value = cases.randn((8, 9), gen, dtype, device)
        p.grad, q.grad = odd(value), odd(value).detach().resolve_neg().clone()
        optimizer.step()
        reference.step()
        cases.assert_close(p, q, f"after step {step + 1}")
        if hyper.get("momentum"):
            buffer = cases.buffer_of(optimizer, p)
            cases.assert_close(buffer, cases.buffer_of(reference, q), "buffer")
            assert not buffer.requires_grad and buffer.is_leaf


@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize(
    "hyper", cases.ids(cases.SOME_HYPERS | {"damped": {"momentum": 0.9, "dampening": 0.3}})
)
@pytest.mark.parametrize("odd", [name for name in ODD_GRADIENTS if "expanded" in name])
def test_an_expanded_gradient_has_stocks_bits(odd: str, hyper: Hyper, dtype: torch.dtype) -> None:
    """Stock rounds the product of a repeated element before the sum at the end of a row."""
    gen = cases.generator(3)
    start = cases.randn((33, 13), gen, dtype)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = FrozenAwareSGD([p], **{"lr": 0.1} | hyper)
    reference = torch.optim.SGD([q], foreach=False, **{"lr": 0.1} | hyper)
    for step in range(5):
        p.grad = q.grad = ODD_GRADIENTS[odd](cases.randn((33, 13), gen, dtype))
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


ODD_PARAMETERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a negated view": lambda p: torch._neg_view(-p),
    "the imaginary part of a conjugate": lambda p: torch.complex(p, -p).conj().imag,
    "the real part of a complex tensor": lambda p: torch.complex(p, p).real,
    "a diagonal": lambda p: torch.diag(p.flatten()).diagonal().view(-1),
    "a column": lambda p: p.flatten()[:, None].repeat(1, 5)[:, 2],
}


@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@each_hyper
@pytest.mark.parametrize("odd", cases.ids(ODD_PARAMETERS))
def test_odd_parameters(
    odd: Callable[[Tensor], Tensor], family: Family, hyper: Hyper, dtype: torch.dtype
) -> None:
    gen = cases.generator(3)
    p = torch.nn.Parameter(odd(cases.randn((8, 9), gen, dtype)))
    q = torch.nn.Parameter(p.detach().resolve_neg().clone())
    optimizer = family.ours([p], **hyper)
    reference = family.stock([q], **hyper, foreach=False)
    for step in range(3):
        value = cases.randn(p.shape, gen, dtype)
        p.grad, q.grad = value.clone(), value.clone()
        optimizer.step()
        reference.step()
        cases.assert_close(p, q, f"after step {step + 1}")


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@each_hyper
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)], ids=str)
def test_zero_dimensional_and_empty(
    shape: tuple[int, ...], family: Family, hyper: Hyper, dtype: torch.dtype, device: str
) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((shape, 3, shape), gen, dtype, device)
    theirs = cases.twin(ours)
    optimizer, reference = family.ours(ours, **hyper), family.reference(theirs, **hyper)
    for step in range(3):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(
            optimizer, reference, f"after step {step + 1}:", exact=family.exact_on(device)
        )


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("part", ["parameter", "gradient", "buffer", "all three"])
def test_views_at_any_element_offset(part: str, dtype: torch.dtype, device: str) -> None:
    """Every offset into a flat storage and every short length; no neighbour is written."""
    gen = cases.generator(0)
    hyper = cases.SOME_HYPERS["momentum, dampening and decay"]
    guard = 8
    ours, theirs, flats = [], [], []

    def place(value: Tensor, offset: int, name: str) -> Tensor:
        if part not in (name, "all three"):
            return value.clone()
        flat = torch.full(
            (guard + offset + value.numel() + guard,), 77.0, dtype=dtype, device=device
        )
        view = flat[guard + offset : guard + offset + value.numel()]
        view.copy_(value)
        flats.append((flat, view, offset))
        return view

    for offset in range(33):
        for length in (1, 5, 16, 33, 64 + offset):
            value = cases.randn(length, gen, dtype, device)
            ours.append(torch.nn.Parameter(place(value, offset, "parameter")))
            theirs.append(torch.nn.Parameter(value.clone()))
    optimizer, reference = FrozenAwareSGD(ours, **hyper), cases.Reference(theirs, **hyper)
    for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        value = cases.randn(p.shape, gen, dtype, device)
        optimizer.state[p]["momentum_buffer"] = place(value, index % 33, "buffer")
        reference.state[q]["momentum_buffer"] = value.clone()
    for step in range(2):
        for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            value = cases.randn(p.shape, gen, dtype, device)
            p.grad, q.grad = place(value, index % 33, "gradient"), value.clone()
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")
    for flat, view, offset in flats:
        outside = torch.cat([flat[: guard + offset], flat[guard + offset + view.numel() :]])
        assert (outside == 77.0).all(), "a neighbour was written"


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
def test_storage_at_any_byte_offset(dtype: torch.dtype) -> None:
    """Foreign memory may not be aligned to its elements; it takes stock's form and roundings."""
    gen = cases.generator(0)
    hyper = cases.SOME_HYPERS["momentum, dampening and decay"]
    ours, theirs, memory = [], [], []
    for offset in range(1, 9):
        value = cases.randn(77, gen, dtype)
        raw = bytearray(offset + 77 * dtype.itemsize)
        memory.append(raw)
        ours.append(torch.nn.Parameter(torch.frombuffer(raw, dtype=dtype, offset=offset)))
        ours[-1].data.copy_(value)
        theirs.append(torch.nn.Parameter(value.clone()))
    # Where elements start at every second byte some are aligned, and the kernels take those.
    aligned = [(i + 1) % dtype.itemsize == 0 for i in range(len(ours))]
    optimizer = FrozenAwareSGD(ours, **hyper)
    reference = cases.Reference(
        [
            {"params": [p], "foreach": None if whole else False}
            for p, whole in zip(theirs, aligned, strict=True)
        ],
        **hyper,
    )
    for _ in range(3):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            cases.assert_same_bits(p, q, "parameter")
            cases.assert_same_bits(
                cases.buffer_of(optimizer, p), cases.buffer_of(reference, q), "momentum"
            )


def test_numpy_memory_is_updated_in_place() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.ones(5, dtype=numpy.float32)
    p = torch.nn.Parameter(torch.from_numpy(array))
    optimizer = FrozenAwareSGD([p], lr=0.5)
    p.grad = torch.ones(5)
    optimizer.step()
    assert array.tolist() == [0.5] * 5


@each_hyper
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
def test_parameters_that_are_views_of_one_flat_storage(
    dtype: torch.dtype, family: Family, hyper: Hyper
) -> None:
    gen = cases.generator(0)
    sizes = (3, 16, 1, 0, 127, 33)
    values = [cases.randn(size, gen, dtype) for size in sizes]
    flat, flat_grad = torch.cat(values), torch.zeros(sum(sizes), dtype=dtype)
    ours = [torch.nn.Parameter(part) for part in flat.split(sizes)]
    grads = flat_grad.split(sizes)
    theirs = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer, reference = family.ours(ours, **hyper), family.reference(theirs, **hyper)
    for step in range(4):
        ours[step].requires_grad_(step % 2 == 0)
        theirs[step].requires_grad_(step % 2 == 0)
        flat_grad.copy_(cases.randn(sum(sizes), gen, dtype))
        for p, q, grad in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = grad, grad.clone()
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")
    cases.assert_same_bits(flat, torch.cat([p.detach() for p in ours]), "still one storage")


def _overlapping(kind: str, flat: Tensor) -> list[list[Tensor]]:
    """Groups of parameters over one storage."""
    return {
        "halves that overlap": [[flat[:40], flat[20:60]]],
        "the same memory twice": [[flat[:40], flat[:40]]],
        "one inside the other": [[flat[:60], flat[10:13]], [flat[55:]]],
        "across groups": [[flat[:40]], [flat[39:80]], [flat[:80]]],
        "overlapping but of other strides": [[flat[:36].view(6, 6), flat[:36].view(6, 6).t()]],
        "interleaved, never overlapping": [[flat[::2], flat[1::2]]],
        "a chain of three": [[flat[:30], flat[20:50], flat[40:80]]],
    }[kind]


@each_hyper
@pytest.mark.parametrize(
    "kind",
    [
        "halves that overlap",
        "the same memory twice",
        "one inside the other",
        "across groups",
        "overlapping but of other strides",
        "interleaved, never overlapping",
        "a chain of three",
    ],
)
def test_overlapping_parameters_update_one_after_the_other(
    kind: str, family: Family, hyper: Hyper
) -> None:
    gen = cases.generator(0)
    start = cases.randn(80, gen)
    flats = start.clone(), start.clone()
    optimizer, reference = (
        make(
            [{"params": [torch.nn.Parameter(p) for p in g]} for g in _overlapping(kind, flat)],
            **hyper,
        )
        for make, flat in zip((family.ours, family.reference), flats, strict=True)
    )
    for step in range(4):
        ours = [p for group in optimizer.param_groups for p in group["params"]]
        theirs = [p for group in reference.param_groups for p in group["params"]]
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_close(flats[0], flats[1], f"after step {step + 1}")
        if kind not in ("overlapping but of other strides", "interleaved, never overlapping"):
            cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


Groups = list[dict[str, Any]]

# All over one storage: some have a kernel; those that are strided or in a group that asks for it
# take stock's form.
OVERLAPPING_IN_BOTH_FORMS: dict[str, Callable[[Tensor], Groups]] = {
    "dense, then strided": lambda flat: [{"params": [flat[:40], flat[:60:2]]}],
    "strided, then dense": lambda flat: [{"params": [flat[:60:2], flat[:40]]}],
    "strided between two that are dense": lambda flat: [
        {"params": [flat[:30], flat[20:60:2], flat[50:80]]}
    ],
    "a chain, strided at its end": lambda flat: [
        {"params": [flat[:30], flat[20:50], flat[40:80:2]]}
    ],
    "a chain, strided at its start": lambda flat: [
        {"params": [flat[:30:2], flat[20:50], flat[40:80]]}
    ],
    "with others that overlap nothing": lambda flat: [
        {"params": [flat[:10], flat[30:50], flat[:20:2], flat[60:80:2], flat[50:60]]}
    ],
    "across groups": lambda flat: [
        {"params": [flat[:40]]},
        {"params": [flat[:60:2], flat[70:80]]},
        {"params": [flat[30:70]]},
    ],
    "a group of stock's form between two": lambda flat: [
        {"params": [flat[:40]]},
        {"params": [flat[20:60]], "foreach": False},
        {"params": [flat[50:80]]},
    ],
}


def _all_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _in_both_forms(make_groups: Callable[[Tensor], Groups], hyper: Hyper) -> list[Any]:
    start = cases.randn(80, cases.generator(0))
    optimizers = []
    for make in (FrozenAwareSGD, torch.optim.SGD):
        groups = make_groups(start.clone())
        for group in groups:
            group["params"] = [torch.nn.Parameter(p) for p in group["params"]]
        stock = {} if make is FrozenAwareSGD else {"foreach": False}
        optimizers.append(make(groups, **hyper, **stock))
    return optimizers


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
@pytest.mark.parametrize("make_groups", cases.ids(OVERLAPPING_IN_BOTH_FORMS))
def test_overlapping_parameters_keep_their_order_where_one_has_no_kernel(
    make_groups: Callable[[Tensor], Groups], hyper: Hyper
) -> None:
    gen = cases.generator(1)
    optimizer, reference = _in_both_forms(make_groups, hyper)
    for step in range(5):
        ours, theirs = _all_parameters(optimizer), _all_parameters(reference)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            trains = step < 2 or i != step % len(ours)
            p.requires_grad_(trains), q.requires_grad_(trains)
            p.grad = cases.randn(p.shape, gen)
            q.grad = p.grad.clone() if trains else None
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@each_hyper
def test_strided_parameters_may_ask_for_fused(family: Family, hyper: Hyper) -> None:
    """Stock's fused form would take them for contiguous; overlapping ones keep their order."""
    flat = cases.randn(60, cases.generator(0))
    gen = cases.generator(1)
    ours, theirs = (
        [torch.nn.Parameter(memory[::step]) for step in (2, 3)]
        for memory in (flat.clone(), flat.clone())
    )
    optimizer = family.ours(ours, **hyper, fused=True)
    reference = family.stock(theirs, **hyper, foreach=False)
    for step in range(4):
        # The second has momentum before the first step of the first.
        cases.set_grads(ours[step == 0 :], theirs[step == 0 :], gen)
        optimizer.step()
        reference.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True)), step


def test_momentum_that_overlaps_keeps_its_order_where_one_has_no_kernel() -> None:
    gen = cases.generator(2)
    optimizer, reference = _in_both_forms(
        lambda flat: [{"params": [flat[:20], flat[20:80:2]]}], {"lr": 0.1, "momentum": 0.9}
    )
    shared = cases.randn(40, gen)
    for sgd in (optimizer, reference):
        memory = shared.clone()
        dense, strided = _all_parameters(sgd)
        sgd.state[dense]["momentum_buffer"] = memory[:20]
        sgd.state[strided]["momentum_buffer"] = memory[10:]
    for step in range(3):
        cases.set_grads(_all_parameters(optimizer), _all_parameters(reference), gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


def test_what_shares_memory_and_has_no_stock_form_is_refused() -> None:
    flat = cases.randn(60, cases.generator(0))
    p, q = torch.nn.Parameter(flat[:40]), torch.nn.Parameter(flat[:60:2])
    optimizer = FrozenAwareSGD(
        [{"params": [q]}, {"params": [p], "momentum_dtype": torch.bfloat16}], lr=0.1, momentum=0.9
    )
    p.grad, q.grad = torch.ones(40), torch.ones(30)
    before = flat.clone()
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\] .*shares memory"):
        optimizer.step()
    cases.assert_same_bits(flat, before, "the parameters")
    assert not optimizer.state


@pytest.mark.parametrize("threads", [1, 4], ids="{} threads".format)
@each_hyper
def test_large_overlapping_parameters(family: Family, hyper: Hyper, threads: int) -> None:
    """Large enough for several threads, which must not collide."""
    gen = cases.generator(0)
    start = cases.randn(400_000, gen)
    flats = start.clone(), start.clone()
    spans = ((0, 300_000), (1, 399_999), (250_000, 400_000))
    params = [[torch.nn.Parameter(flat[a:b]) for a, b in spans] for flat in flats]
    optimizer, reference = family.ours(params[0], **hyper), family.reference(params[1], **hyper)
    with cases.threads(threads):
        for step in range(3):
            cases.set_grads(*params, gen)
            optimizer.step()
            reference.step()
            cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@pytest.mark.parametrize(
    ("family", "hyper"),
    [
        *(pytest.param(cases.SGD, h, id=f"SGD: {name}") for name, h in cases.SOME_HYPERS.items()),
        pytest.param(
            cases.ADAMW,
            cases.ADAMW.some_hypers["decay"],
            id="AdamW: decay",
        ),
    ],
)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("places", [(0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1, 0)], ids=str)
def test_duplicates_within_a_group_update_one_after_the_other(
    places: tuple[int, ...], dtype: torch.dtype, family: Family, hyper: Hyper
) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70), gen, dtype)
    theirs = cases.twin(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer = family.ours([ours[i] for i in places], **hyper)
        reference = family.reference([theirs[i] for i in places], **hyper)
    for step in range(4):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@each_hyper
def test_one_parameter_edited_into_two_groups(family: Family, hyper: Hyper) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70), gen)
    theirs = cases.twin(ours)
    optimizer = family.ours(cases.in_groups(ours, 2), **hyper)
    reference = family.reference(cases.in_groups(theirs, 2), **hyper)
    optimizer.param_groups[1]["params"].insert(0, ours[0])
    reference.param_groups[1]["params"].insert(0, theirs[0])
    for step in range(4):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@each_hyper
def test_one_gradient_shared_by_two_parameters(family: Family, hyper: Hyper) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((70, 70), gen)
    theirs = cases.twin(ours)
    optimizer, reference = family.ours(ours, **hyper), family.reference(theirs, **hyper)
    for step in range(3):
        grad = cases.randn(70, gen)
        for p in (*ours, *theirs):
            p.grad = grad
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
@pytest.mark.parametrize("shift", [0, 4], ids=["the parameter itself", "a view of its memory"])
def test_a_gradient_that_shares_the_parameters_memory(shift: int, hyper: Hyper) -> None:
    """All of it is read before any of it is written, or the step is refused with nothing written.

    Stock refuses the shifted view where it adds it to the parameter without a copy between.
    """
    start = cases.randn(4100, cases.generator(0))
    ours, theirs = start.clone(), start.clone()
    p, q = torch.nn.Parameter(ours[:4096]), torch.nn.Parameter(theirs[:4096])
    p.grad, q.grad = ours[shift : shift + 4096], theirs[shift : shift + 4096].clone()
    cases.Reference([q], **hyper).step()
    try:
        FrozenAwareSGD([p], **hyper).step()
    except RuntimeError:
        assert shift and hyper == cases.SOME_HYPERS["plain"]
        cases.assert_same_bits(ours, start, "refused")
    else:
        cases.assert_same_bits(ours, theirs, "stepped")


def test_inference_mode_steps_as_stock() -> None:
    """A step inside inference mode, on ordinary parameters and on inference ones."""
    results = []
    for make in (FrozenAwareSGD, cases.Reference):
        ordinary = torch.nn.Parameter(torch.ones(5))
        with torch.inference_mode():
            inference = torch.nn.Parameter(torch.ones(5))
            sgd = make([ordinary, inference], lr=0.1, momentum=0.9)
            for _ in range(3):
                ordinary.grad, inference.grad = torch.ones(5), torch.ones(5)
                sgd.step()
        results.append((ordinary.detach().clone(), inference.detach().clone()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_gradient_made_in_inference_mode() -> None:
    with torch.inference_mode():
        grad = torch.ones(5)
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = FrozenAwareSGD([p], lr=0.1, momentum=0.9)
    for _ in range(2):
        p.grad = grad
        optimizer.step()
    assert torch.allclose(p, torch.full((5,), 0.71))
    assert not cases.buffer_of(optimizer, p).is_inference()


def test_a_buffer_made_in_inference_mode_is_refused_before_anything_is_written() -> None:
    """Stock refuses it outside of inference mode, but only after it has written to it."""
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = FrozenAwareSGD([p], lr=0.1, momentum=0.9)
    with torch.inference_mode():
        optimizer.state[p]["momentum_buffer"] = torch.ones(5)
    p.grad = torch.ones(5)
    before = cases.Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        optimizer.step()
    before.assert_unchanged()


def test_more_elements_than_an_int32_counts() -> None:
    """13 GB of memory; set TORCH_FREEZE_TEST_LARGE=1 to run it."""
    if os.environ.get("TORCH_FREEZE_TEST_LARGE") != "1":
        pytest.skip("needs 13 GB of memory; set TORCH_FREEZE_TEST_LARGE=1")
    count = 2**31 + 5
    p = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    p.grad = torch.ones(count, dtype=torch.bfloat16)
    optimizer = FrozenAwareSGD([p], lr=0.5, momentum=0.5)
    optimizer.step()
    optimizer.step()
    for part in (p.detach(), cases.buffer_of(optimizer, p)):
        assert part[0] == part[-1] == part[2**31 - 1] == part[2**31]
    assert p[-1].item() == -0.25
