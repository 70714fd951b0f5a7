"""A layer with frozen rows computes what it did, and the gradient of the live rows alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.helpers import optim_cases as cases
from torch_freeze import freeze, freeze_except, unfreeze
from torch_freeze.rows import RowFrozenParameter

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, WIDTH = 11, 6
# Which rows train, and whether they are one run (looked up by their distance) or not.
LIVE: dict[str, list[int]] = {
    "the first": [0, 1],
    "the last": [9, 10],
    "inside": [4, 5, 6],
    "apart": [1, 4, 10],
    "one": [7],
    "all but one": [0, 1, 2, 3, 4, 6, 7, 8, 9, 10],
}


def ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def bag(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.EmbeddingBag(ROWS, WIDTH, **options)


# A layer, and its arguments.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "embedding": (lambda: nn.Embedding(ROWS, WIDTH), (ids(5, 9),)),
    "embedding, int32": (lambda: nn.Embedding(ROWS, WIDTH), (ids(40, dtype=torch.int32),)),
    "embedding, one id": (lambda: nn.Embedding(ROWS, WIDTH), (torch.tensor(10),)),
    "embedding, no ids": (lambda: nn.Embedding(ROWS, WIDTH), (ids(0),)),
    "embedding, padding": (lambda: nn.Embedding(ROWS, WIDTH, padding_idx=4), (ids(5, 9),)),
    "embedding, last row pads": (lambda: nn.Embedding(ROWS, WIDTH, padding_idx=-1), (ids(5, 9),)),
    "embedding, by frequency": (
        lambda: nn.Embedding(ROWS, WIDTH, scale_grad_by_freq=True),
        (ids(5, 9),),
    ),
    "bag, mean": (bag(), (ids(4, 5),)),
    "bag, sum": (bag(mode="sum"), (ids(4, 5), None, floats(4, 5))),
    "bag, max": (bag(mode="max"), (ids(4, 5),)),
    "bag, offsets": (bag(mode="sum"), (ids(20), torch.tensor([0, 3, 3, 11]))),
    "bag, last offset": (
        bag(include_last_offset=True),
        (ids(20), torch.tensor([0, 3, 3, 11, 20])),
    ),
    "bag, padding": (bag(padding_idx=4), (ids(4, 5),)),
    "bag, absent padding": (bag(padding_idx=-1), (torch.tensor([[0, 4, 7]]),)),
    "linear": (lambda: nn.Linear(WIDTH, ROWS), (floats(7, WIDTH),)),
    "linear, no bias": (lambda: nn.Linear(WIDTH, ROWS, bias=False), (floats(7, WIDTH),)),
    "linear, 3 dimensions": (lambda: nn.Linear(WIDTH, ROWS), (floats(2, 7, WIDTH),)),
    "linear, one vector": (lambda: nn.Linear(WIDTH, ROWS), (floats(WIDTH),)),
}


def with_live(layer: nn.Module, live: list[int]) -> nn.Module:
    """A copy of a layer of which only these rows train, with a name that freeze can use."""
    holder = nn.ModuleDict({"table": copy.deepcopy(layer)})
    freeze_except(holder, "table", rows=live)
    return holder["table"]


def run(layer: nn.Module, args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of the inputs that can have one."""
    given = [
        a.clone().to(dtype).requires_grad_()
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    out = layer(*given)
    # So that no two elements have the same gradient.
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out * weight.to(out)).sum().backward()
    inputs = [a.grad for a in given if isinstance(a, Tensor) and a.requires_grad]
    return [out.detach(), *[grad for grad in inputs if grad is not None]]


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize(
    ("layer", "dtype", "device"),
    [
        *((layer, dtype, "cpu") for layer in LAYERS for dtype in ("fp32", "fp64", "bf16")),
        *(
            pytest.param(layer, "fp32", "cuda", marks=pytest.mark.gpu)
            for layer in LAYERS
            # A bag's backward needs what its forward saves on a GPU, which no CPU form does.
            if not layer.startswith("bag")
        ),
    ],
)
def test_output_and_gradients_are_those_of_the_whole_layer(
    layer: str, live: str, dtype: str, device: str
) -> None:
    make, args = LAYERS[layer]
    if layer == "bag, max" and dtype == "bf16":
        dtype = "fp16"  # torch has no maximum of a bag in bfloat16
    kind, rows = cases.DTYPES[dtype], LIVE[live]
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
    plain = make().to(device, kind)
    ours = with_live(plain, rows)
    expected, got = run(plain, args, kind), run(ours, args, kind)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    assert ours.live_rows.index.device.type == device
    for key, parameter in plain.named_parameters():
        table = ours._parameters[key]
        assert table is not None
        assert parameter.grad is not None
        assert table.grad is None
        assert not table.requires_grad
        grad = ours.live_rows.get_parameter(key).grad
        assert grad is not None
        assert grad.shape == (len(rows), *parameter.shape[1:])
        if isinstance(ours, nn.Linear) or device == "cuda":
            # A product of fewer columns may be summed in another order.
            torch.testing.assert_close(grad, parameter.grad[rows])
        else:
            assert torch.equal(grad, parameter.grad[rows])


# Ways to use a table beside its layer's own forward.
USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "transposed": lambda m, x: x @ m.table.weight.T,
    "t()": lambda m, x: x @ m.table.weight.t(),
    "cast and transposed": lambda m, x: x.double() @ m.table.weight.double().mT,
    "indexed": lambda m, x: m.table.weight[[1, 4, 4, 9]] * x[0],
    "functional linear": lambda m, x: functional.linear(x, m.table.weight),
    "functional linear by keyword": lambda m, x: functional.linear(input=x, weight=m.table.weight),
    "functional embedding": lambda m, x: functional.embedding(
        torch.tensor([[9, 4]]), m.table.weight
    ),
    "torch.embedding": lambda m, x: torch.embedding(m.table.weight, torch.tensor([4, 9, 1])),
    "sum": lambda m, x: m.table.weight.sum() * x,
    "norm": lambda m, x: m.table.weight.norm(dim=1),
    "stacked": lambda m, x: torch.stack([m.table.weight, m.table.weight * 2]),
    "einsum": lambda m, x: torch.einsum("nd,vd->nv", x, m.table.weight),
    "both ways": lambda m, x: functional.linear(m.table(torch.tensor([4, 9])), m.table.weight),
}


@pytest.mark.parametrize("use", USES)
def test_the_table_used_directly_gives_the_live_rows_their_gradient(use: str) -> None:
    plain = nn.ModuleDict({"table": nn.Embedding(ROWS, WIDTH)})
    plain.table = plain["table"]
    ours = copy.deepcopy(plain)
    freeze_except(ours, "table", rows=LIVE["apart"])
    x = floats(3, WIDTH)
    for model in (plain, ours):
        out = USES[use](model, x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    expected = plain.table.weight.grad[LIVE["apart"]]
    torch.testing.assert_close(ours.table.live_rows.weight.grad, expected)


@pytest.mark.parametrize(
    ("backend", "layer", "live"),
    [
        *itertools.product(
            ["eager", "aot_eager"],
            ["embedding", "embedding, padding", "linear", "linear, no bias"],
            ["the last", "apart"],
        ),
        ("inductor", "linear", "apart"),  # this backend takes long
    ],
)
def test_compiled(layer: str, live: str, backend: str) -> None:
    """One graph, which also sees values that the live rows got since."""
    torch.compiler.reset()
    make, args = LAYERS[layer]
    ours = with_live(make(), LIVE[live])
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            for parameter in ours.live_rows.parameters():
                parameter.add_(0.25)
        results = []
        for model in (compiled, ours):
            ours.zero_grad()
            results.append(run(model, args, torch.float32))
            results[-1] += [p.grad.clone() for p in ours.live_rows.parameters()]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), ours(*args))


@pytest.mark.parametrize("layer", ["embedding", "linear"])
def test_autocast(layer: str) -> None:
    make, args = LAYERS[layer]
    plain = make()
    ours = with_live(plain, LIVE["apart"])
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(*args), plain(*args)
    assert out.dtype is expected.dtype
    assert torch.equal(out, expected)
    for each in (out, expected):
        each.float().square().sum().backward()
    grad = ours.live_rows.weight.grad
    assert grad.dtype is torch.float32
    torch.testing.assert_close(grad, plain.weight.grad[LIVE["apart"]], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layer", ["embedding", "linear"])
def test_second_derivatives(layer: str) -> None:
    """A penalty on a gradient, which depends on the live rows, too."""
    make, args = LAYERS[layer]
    plain = make().double()
    ours = with_live(plain, LIVE["apart"])
    grads = []
    for model in (plain, ours):
        given = [a.double().requires_grad_() if a.is_floating_point() else a for a in args]
        out = model(*given).tanh().sum()
        first = given[0] if given[0].requires_grad else list(model.parameters())[-1]
        if model is plain and not given[0].requires_grad:
            first = model.weight
        (slope,) = torch.autograd.grad(out, first, create_graph=True)
        slope.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for whole, live in zip(grads[0], grads[1], strict=True):
        torch.testing.assert_close(live, whole[LIVE["apart"]])


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    """As with a plain layer, whose weight the backward needs as forward saw it."""
    layer = with_live(nn.Linear(WIDTH, ROWS), [2, 3])
    out = layer(floats(3, WIDTH).requires_grad_()).sum()
    with torch.no_grad():
        layer.live_rows.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("layer", ["embedding", "linear"])
def test_the_output_may_be_changed_in_place(layer: str) -> None:
    make, args = LAYERS[layer]
    plain = make()
    ours = with_live(plain, LIVE["the last"])
    for model in (plain, ours):
        out = model(*args)
        out += 1
        out.relu_().square().sum().backward()
    torch.testing.assert_close(ours.live_rows.weight.grad, plain.weight.grad[LIVE["the last"]])


def test_checkpointing() -> None:
    plain = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS))
    ours = copy.deepcopy(plain)
    freeze_except(ours, rows={"0": LIVE["apart"], "1": LIVE["apart"]})
    for model in (plain, ours):
        for reentrant in (False, True):
            marked = floats(1).requires_grad_()
            out = checkpoint(
                lambda i, one, model=model: model(i) * one,
                ids(5),
                marked,
                use_reentrant=reentrant,
            )
            out.square().sum().backward()
    for name in ("0", "1"):
        expected = plain.get_parameter(f"{name}.weight").grad[LIVE["apart"]]
        torch.testing.assert_close(ours.get_parameter(f"{name}.live_rows.weight").grad, expected)


def test_tied_both_sides_give_one_gradient() -> None:
    plain = nn.Module()
    plain.embed, plain.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)
    plain.head.weight = plain.embed.weight
    ours = copy.deepcopy(plain)
    # Either name is the same table; the head's own bias is not.
    freeze_except(ours, "embed", "head", rows=LIVE["apart"])
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        "embed.live_rows.weight",
        "head.live_rows.bias",
    ]
    for model in (plain, ours):
        model.head(model.embed(ids(7)).tanh()).square().sum().backward()
    torch.testing.assert_close(
        ours.embed.live_rows.weight.grad, plain.embed.weight.grad[LIVE["apart"]]
    )
    torch.testing.assert_close(ours.head.live_rows.bias.grad, plain.head.bias.grad[LIVE["apart"]])
    unfreeze(ours, "head.weight")
    assert ours.embed.weight is ours.head.weight
    assert type(ours.embed.weight) is nn.Parameter
    assert not hasattr(ours.embed, "live_rows")
    assert isinstance(ours.head.bias, RowFrozenParameter)


def test_only_the_bias() -> None:
    plain = nn.Linear(WIDTH, ROWS)
    ours = nn.Sequential(copy.deepcopy(plain))
    freeze(ours, "0.bias", rows=[r for r in range(ROWS) if r not in (2, 8)])
    x = floats(4, WIDTH)
    for model in (plain, ours):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours[0].live_rows.bias.grad, plain.bias.grad[[2, 8]])
    torch.testing.assert_close(ours[0].weight.grad, plain.weight.grad)


def test_no_gradient_of_the_table_and_no_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that forward, backward and step make is as large as the table."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            known = {
                a.untyped_storage().data_ptr() for a in tree_iter(args) if isinstance(a, Tensor)
            }
            made.extend(
                t.untyped_storage().nbytes()
                for t in tree_iter(out)
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
            )
            return out

    rows, width = 5000, 16
    model = nn.ModuleDict({"embed": nn.Embedding(rows, width), "head": nn.Linear(width, rows)})
    model["head"].weight = model["embed"].weight
    freeze_except(model, "embed", rows=[3, 4999])
    optimizer = torch.optim.AdamW(model.parameters())
    # The form that runs outside of dispatch modes is the one to look at.
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    with Sizes():
        model["head"](model["embed"](torch.tensor([3, 3, 17, 4999]))).sum().backward()
        optimizer.step()
    output = 4 * rows * 4
    assert made
    assert max(made) <= output
    assert output < rows * width * 4
