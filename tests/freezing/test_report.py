"""report and FreezeReport."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import optim_cases as cases
from tests.helpers.models import Recurrent
from torch_freeze import FreezeReport, FrozenAwareSGD, freeze, freeze_except, report, unfreeze


class ShortCut(nn.Module):
    """Its layers are registered in another order than they are used: the first is used last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Linear(4, 4)
        self.stem = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(self.stem(x)).relu())
        return out


class Marked(nn.Module):
    """Marks the output of its first layer, like transformers' `enable_input_require_grads`."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers[1:](self.layers[0](x).requires_grad_(True))
        return out


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.left(x) * self.right(y)).sum()


def three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))


def deep(width: int = 4, layers: int = 12) -> nn.ModuleDict:
    def block() -> nn.Module:
        inside = {"attention": nn.Linear(width, width), "norm": nn.BatchNorm1d(width)}
        return nn.ModuleDict({"first": nn.ModuleDict(inside), "mlp": nn.Linear(width, width)})

    body = nn.ModuleList([block() for _ in range(layers)])
    return nn.ModuleDict({"encoder": nn.ModuleDict({"layer": body}), "head": nn.Linear(width, 2)})


# --- counts and sizes --------------------------------------------------------------------------


def test_the_report_counts_what_is_frozen() -> None:
    model = three()
    freeze(model, "1")
    result = report(model)
    assert isinstance(result, FreezeReport)
    assert result.frozen_names == ("1.weight", "1.bias")
    assert result.trainable_names == ("0.weight", "0.bias", "2.weight", "2.bias")
    total = result.total
    assert (total.parameters, total.frozen, total.trainable) == (53, 25, 28)
    assert (total.bytes, total.gradient_bytes, total.state_bytes) == (4 * 53, 0, None)
    assert [(row.name, row.parameters, row.frozen) for row in result.rows] == [
        ("0", 16, 0),
        ("1", 25, 25),
        ("2", 12, 0),
    ]


@pytest.mark.parametrize(
    ("kind", "buffers", "count"), [("SGD", 1, 0), ("AdamW", 2, 4)], ids=["SGD", "AdamW"]
)
def test_gradient_and_state_bytes_are_those_held_now(kind: str, buffers: int, count: int) -> None:
    model = three().to(torch.bfloat16)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = cases.FAMILIES[kind].ours(model.parameters(), lr=0.1, **options)
    model(torch.randn(2, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    result = report(model, optimizer)
    held = [2 * buffers * numel + 2 * count for numel in (16, 25, 12)]
    assert (result.total.gradient_bytes, result.total.state_bytes) == (2 * 53, sum(held))
    freeze(model, "1")
    result = report(model, [optimizer])
    assert [row.gradient_bytes for row in result.rows] == [32, 0, 24]
    # The optimizer keeps the state of what is frozen; the report shows it.
    assert [row.state_bytes for row in result.rows] == held


@pytest.mark.parametrize("kind", ["SGD without momentum", "Adam", "SGD with momentum"])
def test_the_state_of_any_optimizer_is_shown(kind: str) -> None:
    model = three()
    makers: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], int]] = {
        "SGD without momentum": (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        "SGD with momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4 * 25),
        # Two moments and a step count per parameter.
        "Adam": (lambda p: torch.optim.Adam(p, lr=0.1), 2 * 4 * 25 + 2 * 4),
    }
    make, expected = makers[kind]
    optimizer = make(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    freeze(model, "1")
    row = report(model, optimizer).rows[1]
    assert row.state_bytes == expected
    with pytest.warns(DeprecationWarning, match="Row.state_bytes"):
        assert row.momentum_bytes == expected
    assert (f"{expected} B" if expected else "  -  ") in str(report(model, optimizer))
    assert len(optimizer.state) == (0 if kind == "SGD without momentum" else 6)


def test_a_tied_parameter_counts_once_and_shows_all_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    result = report(model)
    assert result.total.parameters == 24
    assert [(row.name, row.parameters) for row in result.rows] == [("embed", 24)]
    assert result.tied == (("embed.weight", "head.weight"),)
    assert "embed.weight = head.weight is one tensor" in str(result)


def test_norm_state_distinguishes_held_train_and_eval() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.LayerNorm(2))
    freeze(model, "0")
    model.get_submodule("1").eval()
    result = report(model)
    assert [row.norm for row in result.rows] == ["1 held", "1 eval", "1 train", "-"]
    assert result.total.norm == "1 held, 1 train, 1 eval"


def test_lazy_parameters_count_as_nothing_and_are_noted() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    result = freeze(model, "0")
    assert (result.total.parameters, result.total.frozen) == (10, 0)
    assert any("2 lazy parameters" in note for note in report(model).notes)
    assert "frozen" not in trainable_states(report(model))
    model(torch.randn(2, 3))
    assert report(model).total.frozen == 16


def trainable_states(result: FreezeReport) -> list[str]:
    return [line.split()[1] for line in str(result).splitlines() if line[:1].isdigit()]


def test_sparse_gradients_count_what_they_store() -> None:
    model = nn.Embedding(100, 4, sparse=True)
    model(torch.tensor([1, 2])).sum().backward()
    assert report(model).total.gradient_bytes == 2 * 8 + 2 * 4 * 4


@pytest.mark.compiled
def test_a_gradient_applied_in_backward_counts_what_stands_for_it() -> None:
    model = three()
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, step_in_backward=True, bucket_mb=0)
    model(torch.randn(2, 3)).sum().backward()
    there = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(0 in grad.stride() for grad in there), "nothing stands for a gradient"
    held = {grad.untyped_storage().data_ptr(): grad.untyped_storage().nbytes() for grad in there}
    assert report(model, optimizer).total.gradient_bytes == sum(held.values()) < 4 * 53
    optimizer.step()


# --- depth ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0, []),
        (1, ["encoder", "head"]),
        (2, ["encoder", "encoder.layer", "head"]),
        (3, ["encoder", "encoder.layer", "encoder.layer.0", "encoder.layer.1", "head"]),
    ],
)
def test_depth_chooses_the_levels_listed(depth: int, expected: list[str]) -> None:
    assert [row.name for row in report(deep(layers=2), depth=depth).rows] == expected


def test_the_default_depth_opens_what_is_partly_frozen() -> None:
    model = deep(layers=3)
    assert [row.name for row in report(model).rows] == ["encoder", "head"]
    freeze(model, "encoder.layer.0", "encoder.layer.1.mlp")
    names = [row.name for row in report(model).rows]
    assert names == [
        "encoder",
        "encoder.layer",
        "encoder.layer.0",
        "encoder.layer.1",
        "encoder.layer.1.first",
        "encoder.layer.1.mlp",
        "encoder.layer.2",
        "head",
    ]


def test_the_default_depth_stays_readable_on_a_large_model() -> None:
    model = deep(layers=200)
    freeze(model, "*.bias")
    result = report(model)
    assert len(result.rows) <= 40
    assert len(report(model, depth=9).rows) > 400


WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a negative depth": (lambda f: f(three(), depth=-1), ValueError, "depth=-1 is negative"),
    "a str for the model": (lambda f: f("net"), TypeError, r"report\(model, 'net'\)"),
    "a str for the optimizer": (lambda f: f(three(), "sgd"), TypeError, "got str"),
    "a class for the optimizer": (lambda f: f(three(), torch.optim.SGD), TypeError, "got type"),
    "a scheduler among optimizers": (lambda f: f(three(), [3]), TypeError, "got int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise(case: str) -> None:
    call, error, said = WRONG[case]
    with pytest.raises(error, match=said):
        call(report)


# --- where the freeze sits -----------------------------------------------------------------------

# name: (model, what is frozen, example, kind, skipped, crossed, kind when estimated)
FLOWS: dict[str, tuple[Callable[[], nn.Module], list[str], Any, str, int, int, str]] = {
    "nothing frozen": (three, [], torch.ones(2, 3), "nothing frozen", 0, 0, "nothing frozen"),
    "everything frozen": (
        three,
        ["*"],
        torch.ones(2, 3),
        "everything frozen",
        53,
        0,
        "everything frozen",
    ),
    "a frozen prefix": (three, ["0", "1"], torch.ones(2, 3), "stops early", 41, 0, "stops early"),
    "a frozen tail": (three, ["1", "2"], torch.ones(2, 3), "runs through", 0, 37, "runs through"),
    "a frozen middle": (three, ["1"], torch.ones(2, 3), "runs through", 0, 25, "runs through"),
    "both ends frozen": (three, ["0", "2"], torch.ones(2, 3), "mixed", 16, 12, "mixed"),
    "a weight beside its trainable bias": (
        three,
        ["0", "1.weight"],
        torch.ones(2, 3),
        "stops early",
        36,
        0,
        "stops early",
    ),
    "an order of registration that misleads": (
        ShortCut,
        ["stem", "body"],
        torch.ones(2, 3),
        "stops early",
        36,
        0,
        "runs through",
    ),
    "an input that wants a gradient": (
        three,
        ["0", "1"],
        torch.ones(2, 3, requires_grad=True),
        "runs through",
        0,
        41,
        "stops early",
    ),
    "everything frozen, an input that wants a gradient": (
        three,
        ["*"],
        torch.ones(2, 3, requires_grad=True),
        "runs through",
        0,
        53,
        "everything frozen",
    ),
    "everything frozen, an activation that wants a gradient": (
        lambda: Marked(three()),
        ["*"],
        torch.ones(2, 3),
        "mixed",
        16,
        37,
        "everything frozen",
    ),
    "two towers, the frozen one fed what wants a gradient": (
        Towers,
        ["right"],
        {"x": torch.ones(2, 3), "y": torch.ones(2, 3, requires_grad=True)},
        "runs through",
        0,
        16,
        "runs through",
    ),
}


def _skipped_and_crossed(result: FreezeReport) -> tuple[int, int]:
    return result.flow.skipped, result.flow.crossed


@pytest.mark.parametrize("case", FLOWS)
def test_measured_flow_of(case: str) -> None:
    make, what, example, kind, skipped, crossed, _ = FLOWS[case]
    model = make()
    for name in what:
        freeze(model, name)
    result = report(model, example=example)
    assert result.flow.measured and result.flow.kind == kind
    if kind != "everything frozen":
        assert _skipped_and_crossed(result) == (skipped, crossed)
    assert result.flow.stops_early == (kind in ("stops early", "mixed", "everything frozen"))
    # What autograd does: backward raises exactly where the report says so,
    output = model(**example) if isinstance(example, dict) else model(example)
    assert output.requires_grad == (kind != "everything frozen")
    assert ("raises" in result.flow.sentence) == (kind == "everything frozen")
    # and hooks on the layers' outputs show which layers it runs through.
    if kind == "stops early":
        reached: set[str] = set()

        def tell(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: (
                reached.add(name) if any(i.requires_grad for i in inputs) else None
            )

        handles = [m.register_forward_hook(tell(n)) for n, m in model.named_modules() if n]
        model(example)
        for handle in handles:
            handle.remove()
        frozen_modules = {n.rpartition(".")[0] for n in result.frozen_names}
        assert not frozen_modules & reached


@pytest.mark.parametrize("case", FLOWS)
def test_estimated_flow_of(case: str) -> None:
    make, what, _, _, _, _, kind = FLOWS[case]
    model = make()
    for name in what:
        freeze(model, name)
    result = report(model)
    assert not result.flow.measured and result.flow.kind == kind
    if kind not in ("nothing frozen", "everything frozen"):
        assert "Estimated" in str(result) and "Measured" not in str(result)


# name: (model, what is frozen, example, what backward is said to come after)
REASONS: dict[str, tuple[Callable[[], nn.Module], list[str], Any, str]] = {
    "a trainable one": (three, ["1", "2"], torch.ones(2, 3), "a trainable one (0.weight), so"),
    "the example": (
        three,
        ["0", "1"],
        torch.ones(2, 3, requires_grad=True),
        "the example, which requires grad, so",
    ),
    "an activation": (
        lambda: Marked(three()),
        ["layers.0", "layers.1"],
        torch.ones(2, 3),
        "an activation that requires grad (the input of layers.1): there",
    ),
    "the example, though a trainable one is used first": (
        Towers,
        ["right"],
        {"x": torch.ones(2, 3), "y": torch.ones(2, 3, requires_grad=True)},
        "the example, which requires grad, so",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_report_says_what_keeps_backward_running(case: str) -> None:
    make, what, example, said = REASONS[case]
    model = make()
    freeze(model, *what)
    assert f"come after {said}" in report(model, example=example).flow.sentence


def test_trainable_parameters_that_gradients_do_not_reach_are_named() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.neck, self.head = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.backbone(x)
            out: torch.Tensor = self.head(self.neck(x).detach())
            return out

    model = Cut()
    flow = report(model, example=torch.ones(2, 3)).flow
    assert "no gradient to 4 trainable parameters" in flow.sentence
    assert "such as backbone.weight" in flow.sentence
    # Freezing saves no work that no_grad() has saved already.
    freeze(model, "backbone")
    assert report(model, example=torch.ones(2, 3)).flow.weight_gradient_saved == 0


def test_a_parameter_used_inside_an_autograd_function_is_seen() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, weight = ctx.saved_tensors
            return grads[0] @ weight.T, x.T @ grads[0]

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.weight = nn.Parameter(torch.ones(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = Product.apply(self.first(x), self.weight)
            return out

    model = Custom()
    freeze(model, "weight")
    flow = report(model, example=torch.ones(2, 3)).flow
    assert (flow.kind, flow.crossed) == ("runs through", 8)
    assert flow.backward_saved == pytest.approx(8 / (8 + 8 + 12))


def test_the_report_says_why_a_frozen_tail_saves_little() -> None:
    model = three()
    freeze(model, "1", "2")
    said = " ".join(str(report(model, example=torch.ones(2, 3))).split())
    assert "does not stop early" in said
    assert "come after a trainable one (0.weight)" in said
    assert "Weight-gradient work saved: 71.4 %" in said and "Measured on the example" in said
    assert report(model).flow.weight_gradient_saved == pytest.approx(37 / 53)


def test_tied_weights_are_crossed_where_they_are_used_last() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.body(self.embed(x)))
            return out

    model = Language()
    freeze(model, "embed")
    for result in (report(model), report(model, example=torch.tensor([[1, 2]]))):
        assert result.flow.kind == "runs through" and result.flow.crossed == 24


def test_attention_is_measured_though_its_projection_is_never_called() -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0)
    freeze_except(model, "self_attn.out_proj")
    result = report(model.eval(), example=torch.randn(2, 3, 8))
    in_proj = 3 * 8 * 8 + 3 * 8
    assert result.flow.skipped == in_proj
    assert result.flow.crossed == result.total.frozen - in_proj


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_count_by_their_weights(kind: Any) -> None:
    model = Recurrent(kind)
    freeze(model, "cell.weight*")
    flow = report(model, example=torch.randint(0, 9, (2, 5))).flow
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    weights = gates * 8 * (4 + 8)
    assert flow.kind == "runs through"
    assert flow.weight_gradient_saved == pytest.approx(weights / (weights + 8 * 2))


def test_parameters_that_share_one_storage_are_distinguished() -> None:
    model = three()
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    freeze(model, "0", "1")
    flow = report(model, example=torch.ones(2, 3)).flow
    assert (flow.kind, flow.skipped, flow.first_trainable) == ("stops early", 41, "2.weight")


def test_casts_of_parameters_count_as_the_parameters() -> None:
    model = three()
    freeze(model, "1")
    plain = report(model, example=torch.ones(2, 3)).flow
    with torch.autocast("cpu", torch.bfloat16):
        cast = report(model, example=torch.ones(2, 3)).flow
    assert cast == plain and plain.weight_gradient_saved == pytest.approx(20 / 42)


CONVS: dict[str, list[str]] = {
    "a frozen prefix": ["0", "1", "2"],
    "a frozen tail": ["4", "5"],
    "a frozen middle": ["2", "4"],
    "nothing": [],
}


@pytest.mark.parametrize("case", CONVS)
def test_the_work_saved_agrees_with_counted_flops(case: str) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 4, 1),
        )

    x = torch.randn(2, 3, 8, 8)

    def backward_flops(model: nn.Module) -> int:
        loss = model(x).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return int(counter.get_total_flops())

    model = make()
    everything = backward_flops(model)
    for name in CONVS[case]:
        freeze(model, name)
    saved = report(model, example=x).flow.backward_saved
    assert saved == pytest.approx(1 - backward_flops(model) / everything, abs=1e-6)


def test_measuring_changes_nothing() -> None:
    torch.manual_seed(0)
    weight_norm: Any = torch.nn.utils.weight_norm
    last = weight_norm(nn.Linear(4, 2))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), last)
    freeze(model, "0", "3")
    computed, flags = last.weight, [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = {name: value._version for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report(model, example=torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert {name: value._version for name, value in model.state_dict().items()} == versions
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    # weight_norm's hook would leave a tensor with a history here, which cannot be deep-copied.
    assert last.weight is computed
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("form", ["a tensor", "a tuple", "a dict"])
def test_an_example_can_be(form: str) -> None:
    x = torch.ones(2, 3)
    example = {"a tensor": x, "a tuple": (x,), "a dict": {"input": x}}[form]
    assert report(three(), example=example).flow.measured


def test_an_example_that_does_not_fit_raises_the_models_own_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        report(three(), example=torch.ones(2, 7))
    assert torch.backends.mha.get_fastpath_enabled()


def test_flags_are_restored_when_the_pass_without_freezing_fails() -> None:
    class Picky(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.requires_grad:
                raise KeyError("frozen models only")
            return super().forward(x)

    model = nn.Sequential(Picky(3, 2), nn.Linear(2, 2))
    freeze(model, "0")
    with pytest.raises(KeyError, match="frozen models only"):
        report(model, example=torch.ones(2, 3))
    assert not any(p.requires_grad for p in model[0].parameters())


def test_trainable_parameters_the_example_never_uses_are_named() -> None:
    model = three()
    model.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    assert "never uses 1 trainable parameter, such as spare" in " ".join(
        str(report(model, example=torch.ones(2, 3))).split()
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_measured_without_compiling(backend: str) -> None:
    model = three()
    freeze(model, "0")
    compiled: Any = torch.compile(model, backend=backend)
    assert report(compiled, example=torch.ones(2, 3)).flow.kind == "stops early"


# --- forms ---------------------------------------------------------------------------------


def large() -> tuple[nn.Module, torch.optim.Optimizer]:
    layers = {f"a_rather_long_name_of_a_module_{i}": nn.Linear(40, 40) for i in range(4)}
    inner = nn.ModuleDict({"another_name_that_is_long_too": nn.ModuleDict(layers)})
    model = nn.ModuleDict({"the_outermost_of_all_those_modules": inner, "bn": nn.BatchNorm1d(40)})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    freeze(model, "*_module_[12]", "bn")
    return model, optimizer


@pytest.mark.parametrize("form", ["report", "freeze", "unfreeze", "deep", "many norms"])
def test_printing_fits_120_columns(form: str) -> None:
    model, optimizer = large()
    if form == "many norms":
        model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(30)), model)
        freeze(model, "[0-9]")
        model.get_submodule("12").eval()
    result = {
        "report": lambda: report(model, optimizer),
        "freeze": lambda: freeze(model, "*_module_3"),
        "unfreeze": lambda: unfreeze(model),
        "deep": lambda: report(model, optimizer, depth=9),
        "many norms": lambda: report(model, optimizer),
    }[form]()
    lines = str(result).splitlines()
    assert max(map(len, lines)) <= 120
    assert str(result).isascii()


def test_the_printed_table_lines_up() -> None:
    model, optimizer = large()
    lines = str(report(model, optimizer)).splitlines()
    header = next(line for line in lines if line.startswith("module"))
    rule = lines[lines.index(header) + 1]
    assert header.split() == [
        "module",
        "state",
        "parameters",
        "trainable",
        "frozen",
        "bytes",
        "gradients",
        "optimizer",
        "norms",
    ]
    table = lines[lines.index(header) + 2 :]
    total = next(line for line in table if line.startswith("total"))
    gaps = [i for i, char in enumerate(rule) if char == " "]
    for line in (*table[: table.index(total) - 1], total):
        assert all(line[i] == " " for i in gaps if i < len(line))
    assert "  a_rather_long_name_of_a_module_1" in str(report(model, optimizer))


def test_a_freeze_prints_what_it_did() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    freeze(model, "0")
    first = str(freeze(model, "0", "1")).splitlines()[0]
    assert first == "freeze: 4 parameters named, 2 changed, 1 norm held"
    assert str(unfreeze(model)).startswith("unfreeze: 6 parameters named, 4 changed, 1 norm rel")


def test_to_dict_is_plain_and_complete() -> None:
    model, optimizer = large()
    result = report(model, optimizer)
    plain = result.to_dict()
    again = json.loads(json.dumps(plain))
    assert again == plain
    assert plain["total"]["frozen"] == result.total.frozen
    assert plain["flow"]["kind"] == result.flow.kind
    assert len(plain["rows"]) == len(result.rows)


def test_the_repr_is_one_short_line() -> None:
    model, _ = large()
    assert repr(report(model)) == (
        "<FreezeReport of ModuleDict: 6640 parameters, 3360 frozen (50.6 %)>"
    )


class _Table(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_notebook_form_is_well_formed_and_escaped() -> None:
    model = nn.ModuleDict({"<script>": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    result = freeze(model, "<script>")
    made = result._repr_html_()
    parser = _Table()
    parser.feed(made)
    assert not parser.open and len(set(parser.cells)) == 1 and len(parser.cells) == 4
    assert "<script>" not in made and html.escape("<script>") in made
    assert "stops early" in made


def test_a_ddp_free_model_without_parameters_is_reported() -> None:
    result = report(nn.Sequential(nn.ReLU()))
    assert result.total.parameters == 0 and result.rows == ()
    assert "0 parameters" in str(result)
