"""Frozen rows under unusual use: nothing is lost, doubled, stale or half done."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import _global_optimizer_pre_hooks

from torch_freeze import freeze, freeze_except, unfreeze
from torch_freeze.rows import RowFrozenParameter, _owners

from .test_training import APART, VOCAB, WIDTH, Net

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(VOCAB)


def frozen_net() -> Net:
    """The table's rows APART train, and nothing else."""
    model = Net()
    freeze_except(model, "embed.weight", rows=APART)
    return model.eval()


def live_of(model: Net) -> nn.Parameter:
    live: nn.Parameter = model.embed.live_rows.weight
    return live


def move_live(model: Net) -> None:
    """Change the live rows as an optimizer does."""
    with torch.no_grad():
        live_of(model).add_(torch.arange(WIDTH) + 1.0)


# --- writes into the table ------------------------------------------------------------------------


def _all_of(state: dict[str, Tensor], act: Callable[[Tensor], Any]) -> None:
    for value in state.values():
        if value.is_floating_point():
            act(value)


def _assign_data(model: Net) -> None:
    model.embed.weight.data = model.embed.weight.data * 0.5


def _assign_each(model: Net) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


# Ways to halve the whole table (and perhaps everything else), each of which counts once.
WRITES: dict[str, Callable[[Net], Any]] = {
    "data, in place": lambda m: m.embed.weight.data.mul_(0.5),
    "data, by row": lambda m: m.embed.weight.data.__setitem__(
        slice(None), Net().embed.weight * 0.5
    ),
    "data of the tied head": lambda m: m.head.weight.data.mul_(0.5),
    "other data": _assign_data,
    "in place": lambda m: m.embed.weight.mul_(0.5),
    "in place, twice": lambda m: m.embed.weight.mul_(0.25).mul_(2),
    "with an operator": lambda m: m.embed.weight.__itruediv__(2),
    "copy_": lambda m: m.embed.weight.copy_(m.embed.weight * 0.5),
    "a view": lambda m: m.embed.weight.view(-1).mul_(0.5),
    "foreach": lambda m: torch._foreach_mul_([m.embed.weight], 0.5),
    "detached": lambda m: m.embed.weight.detach().mul_(0.5),
    "out": lambda m: torch.mul(Net().embed.weight, 0.5, out=m.embed.weight),
    "values of a state_dict": lambda m: _all_of(
        {"": m.state_dict()["embed.weight"]}, lambda v: v.mul_(0.5)
    ),
    "each parameter": lambda m: [p.mul_(0.5) for p in m.parameters()],
    "each parameter, in two steps": lambda m: [p.mul_(0.25).mul_(2) for p in m.parameters()],
    "each parameter, copied": lambda m: [p.copy_(p * 0.5) for p in m.parameters()],
    "each parameter, by row": lambda m: [
        p.__setitem__(slice(None), p * 0.5) for p in m.parameters()
    ],
    "each parameter's data": lambda m: [p.data.mul_(0.5) for p in m.parameters()],
    "each parameter's data, in two steps": lambda m: [
        (p.data.mul_(0.25), p.data.mul_(2)) for p in m.parameters()
    ],
    "other data for each": _assign_each,
    "all parameters, foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 0.5),
    "one vector of all": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 0.5, m.parameters()
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_the_table_counts_once(write: str) -> None:
    model, expected = frozen_net(), Net().embed.weight.detach() * 0.5
    with torch.no_grad():
        WRITES[write](model)
    torch.testing.assert_close(model.embed.weight.detach(), expected)
    out = model.embed(IDS)
    torch.testing.assert_close(out.detach(), expected)
    # The live rows have it, too, and train from there.
    torch.testing.assert_close(live_of(model).detach(), expected[APART])
    out.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    expected[APART] -= 1
    torch.testing.assert_close(model.embed.weight.detach(), expected)


INITS: dict[str, Callable[[Tensor], Any]] = {
    "normal_": nn.init.normal_,
    "uniform_": nn.init.uniform_,
    "trunc_normal_": nn.init.trunc_normal_,
    "constant_": lambda w: nn.init.constant_(w, 3.0),
    "zeros_": nn.init.zeros_,
    "eye_": nn.init.eye_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "orthogonal_": nn.init.orthogonal_,
}


@pytest.mark.parametrize("init", INITS)
def test_an_initialized_table_is_as_a_plain_one(init: str) -> None:
    model, plain = frozen_net(), Net()
    for each in (model, plain):
        torch.manual_seed(5)
        INITS[init](each.embed.weight)
    assert torch.equal(model.embed.weight.detach(), plain.embed.weight)
    model.embed(IDS)
    assert torch.equal(live_of(model), plain.embed.weight[APART])


@pytest.mark.parametrize("way", ["an optimizer's step", "a deep copy", "unfreeze", "a pickle"])
def test_what_is_written_is_not_lost_without_a_forward(way: str) -> None:
    model = frozen_net()
    model.embed.weight.data[2] = 7.0
    if way == "an optimizer's step":
        live_of(model).grad = torch.ones_like(live_of(model))
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        assert torch.equal(model.embed.weight[2], torch.full((WIDTH,), 6.0))
        return
    if way == "a deep copy":
        model = copy.deepcopy(model)
        assert torch.equal(live_of(model)[0], torch.full((WIDTH,), 7.0))
    elif way == "unfreeze":
        unfreeze(model, "embed")
    else:
        model = pickle.loads(pickle.dumps(model))
    assert torch.equal(model.embed.weight[2], torch.full((WIDTH,), 7.0))


def test_an_average_over_state_dicts() -> None:
    """As timm and YOLO keep it: in place, into the values of the average's state_dict."""
    model, plain = frozen_net(), Net().eval()
    averages = [copy.deepcopy(model), copy.deepcopy(plain)]
    for _ in range(3):
        move_live(model)
        plain.load_state_dict(model.state_dict())
        for average, source in zip(averages, (model, plain), strict=True):
            values = source.state_dict()
            for key, value in average.state_dict().items():
                if value.is_floating_point():
                    value.mul_(0.5).add_(values[key].detach(), alpha=0.5)
    for a, b in zip(*(each(IDS) for each in averages), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_checkpoint_read_into_the_own_state_dict(stepped: bool) -> None:
    """As torch.distributed.checkpoint does it, with a step that creates the optimizer's state."""
    model, other = frozen_net(), {k: v + 1 for k, v in Net().state_dict().items()}
    state = model.state_dict()
    if stepped:
        move_live(model)
    for key, value in state.items():
        value.copy_(other[key])
    model.load_state_dict(state)
    assert torch.equal(live_of(model), other["embed.weight"][APART])
    assert torch.equal(model.embed.weight.detach(), other["embed.weight"])
    # Its own state, unchanged, changes nothing.
    state = model.state_dict()
    move_live(model)
    moved = live_of(model).detach().clone()
    model.load_state_dict(state)
    assert torch.equal(live_of(model), moved)


# --- reads ----------------------------------------------------------------------------------------


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "type": lambda w: w.type(torch.float64),
    "type_as": lambda w: w.type_as(torch.zeros((), dtype=torch.float64)),
    "foreach": lambda w: torch._foreach_mul([w], 2.0)[0],
    "foreach norm": lambda w: torch._foreach_norm([w])[0],
    "private": lambda w: torch._weight_norm(w, torch.ones(VOCAB, 1), 0),
    "iteration": lambda w: torch.stack(list(w)),
    "unbind": lambda w: torch.stack(w.unbind()),
}


@pytest.mark.parametrize("read", READS)
def test_reads_see_the_live_rows_and_give_them_gradients(read: str) -> None:
    model, plain = frozen_net(), Net()
    move_live(model)
    with torch.no_grad():
        plain.embed.weight[APART] = live_of(model)
    results = [READS[read](each.embed.weight) for each in (model, plain)]
    torch.testing.assert_close(*results)
    for out in results:
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert plain.embed.weight.grad is not None
    torch.testing.assert_close(live_of(model).grad, plain.embed.weight.grad[APART])


def test_a_change_before_backward_is_an_error_for_any_use() -> None:
    """Otherwise the input's gradient would be that of the new values."""
    model = frozen_net()
    x = torch.randn(3, WIDTH, requires_grad=True)
    out = (x @ model.embed.weight.T).sum()
    move_live(model)
    model.embed(IDS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# --- memory ---------------------------------------------------------------------------------------


def test_a_deleted_model_leaves_nothing() -> None:
    gc.collect()
    gc.disable()
    try:
        model = frozen_net()
        model(IDS).sum().backward()
        parts = [model.embed.weight, live_of(model), model.embed.live_rows, model.embed, model.head]
        alive = [weakref.ref(part) for part in parts]
        del model, parts
        assert [ref() for ref in alive] == [None] * 5
    finally:
        gc.enable()


def test_many_rounds_leave_nothing() -> None:
    model = Net()
    # A step of any optimizer tidies up what other tests left.
    _owners._expected.clear()
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()
    before = len(_global_optimizer_pre_hooks), len(_owners._expected)
    for row in range(100):
        freeze(model, "embed.weight", rows=[row % VOCAB])
        assert len(_owners._expected) <= before[1] + 1
        unfreeze(model, "embed.weight")
    assert list(model.embed.children()) == []
    assert vars(model.embed.weight) == {}
    freeze_except(model, "embed.weight", rows=APART)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(IDS).sum().backward()
        optimizer.step()
    assert (len(_global_optimizer_pre_hooks), len(_owners._expected)) <= before
    assert _owners._look not in _global_optimizer_pre_hooks.values()


# --- bad input ------------------------------------------------------------------------------------


def looks(model: nn.Module) -> list[Any]:
    """Everything of a model that a call could change."""
    return [
        [
            (name, id(p), type(p), p.requires_grad, p.detach().tolist())
            for name, p in model.named_parameters()
        ],
        [(name, type(m), m.training, list(vars(m))) for name, m in model.named_modules()],
        list(model.state_dict()),
    ]


NO_ROWS: dict[str, tuple[Any, type[Exception], str]] = {
    "beyond": ([13], ValueError, r"names row 13 of embed.weight, which has only rows 0 to 12"),
    "before": ([-14], ValueError, r"names row -14 of embed.weight"),
    "far beyond": ([2**40], ValueError, r"names row 1,099,511,627,776"),
    "a huge number": ([2**70], TypeError, r"cannot take list as rows"),
    "none": ([], ValueError, r"rows=\[\] names no row of embed.weight, which has 13"),
    "no row of a mask": (torch.zeros(13, dtype=torch.bool), ValueError, r"names no row"),
    "all": (range(13), ValueError, r"names all 13 rows of embed.weight; leave rows out"),
    "a slice of all": (slice(None), ValueError, r"names all 13 rows"),
    "a slice beyond": (slice(10, 14), ValueError, r"goes beyond the 13 rows"),
    "a slice with no step": (slice(0, 5, 0), TypeError, r"slice\(0, 5, 0\) is no slice of row"),
    "a slice of floats": (slice(0.0, 2.0), TypeError, r"is no slice of row numbers"),
    "floats": ([1.0, 2.0], TypeError, r"cannot take list as rows"),
    "a float": (1.5, TypeError, r"cannot take float as rows"),
    "two dimensions": (torch.ones(2, 2).long(), TypeError, r"tensor of shape \[2, 2\] and dtype"),
    "a short mask": (torch.ones(12, dtype=torch.bool), ValueError, r"must have the shape \[13\]"),
    "a bool": (True, ValueError, r"mask of shape \[1\] does not fit"),
    "bools among numbers": ([True, 3], TypeError, r"cannot take list as rows"),
    "bytes": (b"ab", TypeError, r"cannot take bytes as rows"),
    "nested lists": ([[1, 2], [3]], TypeError, r"cannot take list as rows"),
    "a nested mapping": ({"embed": {"a": 1}}, TypeError, r"cannot take dict as rows"),
    "an empty mapping": ({}, ValueError, r"nothing is left to name rows of"),
    "an unknown layer": ({"embde": [1]}, ValueError, r"Nearest: 'embed'"),
    "a tensor without values": (torch.ones(2, device="meta"), TypeError, r"cannot take a tensor"),
    "complex": (torch.ones(2) * 1j, TypeError, r"cannot take a tensor of shape \[2\] and dtype"),
    "a token alone": ("<new>", TypeError, r"tokens such as '<new>'; give the tokenizer too"),
    "tokens and numbers": (["<new>", 3], TypeError, r"give the tokenizer too"),
    "two that differ": ({"embed": [1], "head": [2]}, ValueError, r"name all rows in one call"),
    "an object": (object(), TypeError, r"cannot take object as rows"),
}


@pytest.mark.parametrize("caller", [freeze, freeze_except, unfreeze])
@pytest.mark.parametrize("rows", NO_ROWS)
def test_wrong_rows_change_nothing(rows: str, caller: Callable[..., Any]) -> None:
    model = Net()
    if caller is unfreeze:
        freeze(model)
    before = looks(model)
    given, error, says = NO_ROWS[rows]
    what = () if isinstance(given, dict) else ("embed",)
    with pytest.raises(error, match=rf"^{caller.__name__}: .*{says}"):
        caller(model, *what, rows=given)
    assert looks(model) == before


class Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return {"<new>": 12, "other": 3, "far": 13, "odd": "3"}  # type: ignore[dict-item]


def test_tokens() -> None:
    for given in ("<new>", ["<new>"], ("<new>", "<new>"), iter(["<new>"])):
        for vocab in (Tokenizer(), Tokenizer().get_vocab()):
            model = Net()
            rows = iter(["<new>"]) if not isinstance(given, (str, list, tuple)) else given
            freeze_except(model, "embed", rows=rows, vocab=vocab)
            assert model.embed.live_rows.index.tolist() == [12]
    model = Net()
    before = looks(model)
    for wrong, error, says in (
        ("<nwe>", ValueError, r"'<nwe>' .* is not in the vocabulary \(nearest: '<new>'\)"),
        ("far", ValueError, r"names row 13"),
        ("odd", TypeError, r"cannot take list as rows"),
        (["other", 3], ValueError, r"3 of rows=\['other', 3\] is not in the vocabulary"),
    ):
        with pytest.raises(error, match=f"^freeze: .*{says}"):
            freeze(model, "embed", rows=wrong, vocab=Tokenizer())
    with pytest.raises(TypeError, match=r"vocab must be a mapping from token to row or have get_v"):
        freeze(model, "embed", rows="other", vocab=5)  # type: ignore[arg-type]
    assert looks(model) == before


ROWS: dict[str, Any] = {
    "a negative number": -12,
    "a tuple": (1,),
    "a set": {1},
    "duplicates": [1, 1, -12],
    "a backward range": range(1, 0, -1),
    "a generator": lambda: (row for row in [1]),
    "small integers": torch.tensor([1], dtype=torch.int8),
    "a list mask": [False, True] + [False] * 11,
    "tensors": [torch.tensor(1)],
    "an array": lambda: pytest.importorskip("numpy").array([1]),
    "a mask of an array": lambda: pytest.importorskip("numpy").arange(13) == 1,
    "a number of an array": lambda: pytest.importorskip("numpy").int64(1),
}


@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_taken_as(rows: str) -> None:
    given = ROWS[rows]() if callable(ROWS[rows]) else ROWS[rows]
    model = Net()
    freeze_except(model, "embed", rows=given)
    assert model.embed.live_rows.index.tolist() == [1]


def _with_weight(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(WIDTH, VOCAB)
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    return layer


class Own(nn.Parameter):
    """As quantized parameters of other libraries are."""


class OwnTensor(Tensor):
    """As quantized tensors of other libraries are."""


def _taken(name: Any) -> nn.Linear:
    layer = nn.Linear(WIDTH, VOCAB)
    layer.live_rows = name
    return layer


NO_TABLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution": (lambda: nn.Conv2d(3, 4, 3), r"weight belongs to a Conv2d; rows= is for Emb"),
    "norm": (lambda: nn.LayerNorm(4), r"belongs to a LayerNorm"),
    "recurrent": (lambda: nn.LSTM(4, 4), r"belongs to a LSTM"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), r"in_proj_weight belongs to a Multihead"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 13), r"belongs to a Bilinear"),
    "lazy": (lambda: nn.LazyLinear(4), r"weight has no values yet"),
    "meta": (lambda: nn.Linear(4, 13, device="meta"), r"weight has no values yet"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 13)),
        r"belongs to a ParametrizationList",
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 13)),
        r"belongs to a ParametrizationList",
    ),
    "a parameter class": (lambda: _with_weight(Own(torch.randn(VOCAB, WIDTH))), r"weight is a Own"),
    "a tensor class": (
        lambda: _with_weight(nn.Parameter(torch.randn(VOCAB, WIDTH).as_subclass(OwnTensor))),
        r"weight is a OwnTensor",
    ),
    "max_norm": (lambda: nn.Embedding(VOCAB, WIDTH, max_norm=1.0), r"has max_norm=1.0"),
    "nothing": (nn.ReLU, r"nothing is left to name rows of"),
    "its name taken by a module": (lambda: _taken(nn.Linear(1, 1)), r"has an attribute 'live_r"),
    "its name taken": (lambda: _taken(3), r"has an attribute 'live_rows' of its own"),
    "frozen": (
        lambda: nn.Embedding(VOCAB, WIDTH).requires_grad_(False),
        r"weight is frozen as a whole; .* call unfreeze\(model, 'table.weight', rows=...\)",
    ),
    "a norm after it": (
        lambda: nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)),
        r"table.1.weight belongs to a LayerNorm",
    ),
}


@pytest.mark.parametrize("layer", NO_TABLES)
def test_layers_without_such_rows_change_nothing(layer: str) -> None:
    make, says = NO_TABLES[layer]
    model = nn.ModuleDict({"table": make(), "other": nn.Linear(2, 2)})
    plain = layer not in ("lazy", "meta")
    before = looks(model) if plain else list(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=f"^freeze_except: .*{says}"):
        freeze_except(model, "table", rows=[1])
    assert (looks(model) if plain else list(model.state_dict())) == before
    assert all(p.requires_grad for p in model["other"].parameters())


def test_what_is_not_named_is_frozen_also_beside_it_and_in_a_layer_alone() -> None:
    for model, prefix in ((nn.Linear(WIDTH, VOCAB), ""), (nn.Sequential(nn.Linear(4, 13)), "0.")):
        freeze_except(model, f"{prefix}weight", rows=[1])
        trains = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trains == [f"{prefix}live_rows.weight"]


def test_other_rows_of_a_table_are_refused() -> None:
    model = frozen_net()
    before = looks(model)
    for caller in (freeze, freeze_except, unfreeze):
        with pytest.raises(ValueError, match=r"other rows of embed are frozen already; call unfr"):
            caller(model, "embed.weight", rows=[1])
        with pytest.raises(ValueError, match=r"live rows of its table; name the layer itself"):
            caller(model, "embed.live_rows", rows=[1])
    assert looks(model) == before


# --- transforms, tracing and conversion -----------------------------------------------------------


FUNC_LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "embedding": (lambda: nn.Embedding(VOCAB, WIDTH), lambda: IDS.view(1, -1)),
    "padding": (lambda: nn.Embedding(VOCAB, WIDTH, padding_idx=5), lambda: IDS.view(1, -1)),
    "linear": (lambda: nn.Linear(WIDTH, VOCAB), lambda: torch.ones(3, WIDTH).cumsum(0)),
}


def _pair(layer: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer with live rows, a plain one with the same values, and an input."""
    make, given = FUNC_LAYERS[layer]
    plain = make()
    ours = copy.deepcopy(plain)
    freeze_except(nn.ModuleDict({"table": ours}), "table", rows=APART)
    return ours, plain, given()


def _loss(layer: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda params, x: torch.func.functional_call(layer, params, x).square().sum()


def _pick(live: dict[str, Tensor], dim: int = 0) -> dict[str, Tensor]:
    return {key: value.index_select(dim, torch.tensor(APART)) for key, value in live.items()}


@pytest.mark.parametrize("layer", FUNC_LAYERS)
@pytest.mark.parametrize("way", ["grad", "vmap of grad", "vmap of values", "jvp", "dual numbers"])
def test_transforms_with_respect_to_live_rows(layer: str, way: str) -> None:
    func, (ours, plain, x) = torch.func, _pair(layer)
    live = {n: p.detach() for n, p in ours.named_parameters() if p.requires_grad}
    values = {n: p.detach() for n, p in plain.named_parameters()}
    if way in ("grad", "vmap of grad"):
        got, expected = (
            (func.grad(_loss(m)) if way == "grad" else func.vmap(func.grad(_loss(m)), (None, 0)))(
                p, x
            )
            for m, p in ((ours, live), (plain, values))
        )
        got = {name.removeprefix("live_rows."): grad for name, grad in got.items()}
        torch.testing.assert_close(got, _pick(expected, int(way != "grad")))
        return
    rows = torch.tensor(APART)
    if way == "vmap of values":
        stacked = {n: torch.stack([v, v * 2]) for n, v in live.items()}
        out = func.vmap(lambda p: func.functional_call(ours, p, x))(stacked)
        new = {n: v.index_copy(0, rows, live[f"live_rows.{n}"] * 2) for n, v in values.items()}
        torch.testing.assert_close(out[1], func.functional_call(plain, new, x))
        torch.testing.assert_close(out[0], plain(x).detach())
    else:
        slopes = {n: torch.ones_like(v) for n, v in live.items()}
        whole = {
            n: torch.zeros_like(v).index_fill(0, rows, 1.0).detach() for n, v in values.items()
        }
        sides = []
        for module, point, slope in ((ours, live, slopes), (plain, values, whole)):
            if way == "jvp":
                call = lambda p, m=module: func.functional_call(m, p, x)  # noqa: E731
                sides.append(func.jvp(call, (point,), (slope,))[1])
                continue
            with forward_ad.dual_level():
                both = {n: forward_ad.make_dual(v, slope[n]) for n, v in point.items()}
                out = func.functional_call(module, both, x)
                sides.append(forward_ad.unpack_dual(out).tangent)
        torch.testing.assert_close(*sides)
    # The model has its own values again.
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("way", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_transforms_with_respect_to_the_input(way: Callable[..., Any]) -> None:
    ours, plain, x = _pair("linear")
    with torch.no_grad():
        for parameter in ours.live_rows.parameters():
            parameter.add_(1)
    # Nothing else reads the table before, so it is the transform that must be up to date.
    got = way(lambda given: ours(given).square().sum())(x)
    plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(got, way(lambda given: plain(given).square().sum())(x))


def assert_follows(form: Callable[[Tensor], Tensor], model: Net) -> None:
    """Another form of the model has its output, and gives the live rows the same gradient."""
    torch.testing.assert_close(form(IDS), model(IDS))
    grads = []
    for each in (form, model):
        each(IDS).square().sum().backward()
        grads.append(live_of(model).grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("trains", [True, False])
def test_a_trace_follows_the_live_rows(trains: bool) -> None:
    model = frozen_net()
    with torch.set_grad_enabled(trains), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, IDS)
    move_live(model)
    assert_follows(traced, model)


def test_a_script_is_refused() -> None:
    """It would read the table's memory without the live rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match="Tensor"):
            torch.jit.script(frozen_net())


@pytest.mark.parametrize("way", ["symbolic_trace", "export"])
def test_graphs_follow_the_live_rows(way: str) -> None:
    model = frozen_net()
    if way == "export":
        graph: nn.Module = torch.export.export(model, (IDS,)).module()
    else:
        graph = torch.fx.symbolic_trace(model)
    move_live(model)
    assert_follows(graph, model)


@pytest.mark.parametrize("way", ["swap", "overwrite"])
def test_conversions_that_replace_parameters_are_refused(way: str) -> None:
    model = frozen_net()
    before = looks(model.embed)
    switch = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
    switch(True)
    try:
        with pytest.raises(RuntimeError, match=r"cannot be moved or cast where that makes new par"):
            model.double()
    finally:
        switch(False)
    assert looks(model.embed) == before
    model.double()
    assert live_of(model).dtype is torch.float64


@pytest.mark.parametrize("stepped", [False, True])
def test_a_checkpoint_that_is_swapped_in_keeps_the_rows(stepped: bool) -> None:
    model, state = frozen_net(), {k: v + 1 for k, v in Net().state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if stepped:
        optimizer.step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(model.embed.weight.detach(), state["embed.weight"])
    assert torch.equal(live_of(model), state["embed.weight"][APART])
    model.embed(IDS).sum().backward()
    optimizer.step()
    changed = (model.head.weight.detach() != state["embed.weight"]).any(1).nonzero().flatten()
    assert changed.tolist() == APART


def test_the_table_cannot_be_made_trainable_by_its_flag() -> None:
    """Only the live rows would train, and reports would say otherwise."""
    model = frozen_net()
    table = model.embed.weight
    before = looks(model.embed)
    for act in (
        lambda: table.requires_grad_(),
        lambda: table.requires_grad_(True),
        lambda: table.requires_grad_(requires_grad=True),
        lambda: setattr(table, "requires_grad", True),
        lambda: model.embed.requires_grad_(),
    ):
        with pytest.raises(RuntimeError, match=r"table of shape \[13, 4\].*torch_freeze.unfreeze"):
            act()
        assert looks(model.embed) == before
    model.requires_grad_(False)
    model.embed.live_rows.requires_grad_()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["embed.live_rows.weight"]


def _load_assigned(model: Net) -> None:
    state = model.state_dict()
    model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)


# What assigns a parameter of a layer with frozen rows, and whether that ends the live rows.
ASSIGNMENTS: dict[str, tuple[Callable[[Net], Any], bool]] = {
    "another weight": (
        lambda m: setattr(m.embed, "weight", nn.Parameter(torch.zeros(VOCAB, WIDTH))),
        True,
    ),
    "registered": (
        lambda m: m.embed.register_parameter("weight", nn.Parameter(torch.zeros(VOCAB, WIDTH))),
        True,
    ),
    "the table of another": (lambda m: setattr(m.embed, "weight", frozen_net().embed.weight), True),
    "itself": (lambda m: setattr(m.embed, "weight", m.embed.weight), False),
    "the table under another name": (
        lambda m: setattr(m.head, "weight", m.embed.weight),
        False,
    ),
    "a bias that is not frozen by rows": (
        lambda m: setattr(m.embed, "bias", nn.Parameter(torch.zeros(VOCAB))),
        False,
    ),
    "a loaded weight": (_load_assigned, False),
}


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_replaced_table_is_a_warning(assignment: str) -> None:
    act, replaces = ASSIGNMENTS[assignment]
    model = frozen_net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act(model)
    said = [w for w in caught if "with frozen rows (Embedding) was replaced" in str(w.message)]
    assert len(said) == len(caught) == replaces
    own = model.embed.weight
    assert (isinstance(own, RowFrozenParameter) and own._rows is model.embed.live_rows) != replaces


def test_other_modules_take_parameters_as_ever() -> None:
    """All of them are watched for replaced tables, scripted ones too, once there is a table."""
    freeze_except(nn.Sequential(nn.Embedding(3, 1)), "0", rows=[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(1, 1))
    taken = nn.Linear(1, 1)
    taken.live_rows = nn.Linear(1, 1)  # a name of the user's own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (scripted, taken):
            module.register_parameter("weight", nn.Parameter(torch.full((1, 1), 7.0)))
            assert module.weight.item() == 7.0


# --- what else a guard in the code is for ---------------------------------------------------------


def test_a_transform_sees_what_was_written_into_the_table() -> None:
    ours, plain, x = _pair("linear")
    for each in (ours, plain):
        each.weight.data[2] = 7.0
    jacobians = [torch.func.jacrev(each)(x) for each in (ours, plain)]
    torch.testing.assert_close(*jacobians)


def test_a_bag_whose_rows_change_before_backward_is_an_error() -> None:
    bag = nn.EmbeddingBag(VOCAB, WIDTH, mode="sum")
    freeze_except(nn.ModuleDict({"table": bag}), "table", rows=APART)
    weights = torch.ones(1, VOCAB, requires_grad=True)
    out = bag(IDS.view(1, -1), None, weights).sum()
    with torch.no_grad():
        bag.live_rows.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_functional_embedding_with_padding_from_the_end() -> None:
    model, plain = frozen_net(), Net()
    for each in (model, plain):
        torch.nn.functional.embedding(IDS, each.embed.weight, padding_idx=-1).sum().backward()
    assert plain.embed.weight.grad is not None
    assert torch.equal(live_of(model).grad, plain.embed.weight.grad[APART])


def test_second_derivatives_under_autocast() -> None:
    """There the table of a projection is a cast copy, which knows no live rows of its own."""
    ours, plain, x = _pair("linear")
    grads = []
    for each in (ours, plain):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            (slope,) = torch.autograd.grad(each(given).tanh().sum(), given, create_graph=True)
        slope.square().sum().backward()
        grads.append({n: p.grad for n, p in each.named_parameters() if p.requires_grad})
    live = {name.removeprefix("live_rows."): grad for name, grad in grads[0].items()}
    torch.testing.assert_close(live, _pick(grads[1]), rtol=0.05, atol=0.05)


def test_beginning_and_ending_leave_no_gradients() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 2)).eval()
    model(IDS).sum().backward()
    freeze(model, "0", rows=[1])
    table, live = model[0].weight, model[0].live_rows.weight
    assert table.grad is None
    assert not model[0].live_rows.training
    model(IDS).sum().backward()
    unfreeze(model, "0")
    assert live.grad is None
    assert table.grad is None


def test_live_rows_of_a_transposed_table_are_contiguous() -> None:
    """As optimizers' kernels take parameters."""
    model = nn.Sequential(_with_weight(torch.randn(WIDTH, VOCAB).T))
    freeze_except(model, "0", rows=APART)
    assert not model[0].weight.is_contiguous()
    assert model[0].live_rows.weight.is_contiguous()
