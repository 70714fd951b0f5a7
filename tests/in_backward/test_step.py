"""step_in_backward: the same training, while no more than a bucket of gradients is ever held.

On a GPU backward runs in a thread of torch's, so what depends on hooks, errors and results is
tested there too. How much is held is measured on the CPU here and by the allocator in
kernels/test_cuda.py.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import ADAMW, SGD, Family, FrozenAwareSGD, Hyper

KIB = 1 / 1024
"""Of a bucket, in MiB."""


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Convolutions, norms, a tied weight, an unused parameter and one very large gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.wide = nn.Linear(6 * 36, 40)
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(3))
        self.tied = nn.Linear(40, 40)
        self.tied.weight = self.blocks[0].weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(5))
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm(self.stem(x))).flatten(1)
        x = relu(self.wide(x))
        for block in self.blocks:
            x = x + relu(block(x))
        return self.head(self.tied(x) * self.scale) + self.empty.sum()


def network(seed: int = 0, device: str = "cpu") -> Net:
    torch.manual_seed(seed)
    return Net().to(device)


def batch(step: int) -> tuple[Tensor, Tensor]:
    gen = cases.generator(step)
    return torch.randn(8, 1, 8, 8, generator=gen), torch.randint(3, (8,), generator=gen)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    device = next(model.parameters()).device
    x, y = (part.to(device) for part in batch(step))
    return cross_entropy(model(x), y)


def in_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:5]}, {"params": params[5:], "lr": 0.02}]


def nothing(model: nn.Module, step: int) -> None:
    del model, step


def rolling(model: nn.Module, step: int) -> None:
    """Every parameter is frozen now and then, some for several steps."""
    for i, p in enumerate(model.parameters()):
        p.requires_grad_((i + step // 2) % 3 != 0)


def last_block(model: nn.Module, step: int) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(step >= 3 or name.startswith("head"))


FREEZING: dict[str, Callable[[nn.Module, int], None]] = {
    "nothing frozen": nothing,
    "frozen in turns": rolling,
    "unfrozen later": last_block,
}
BUCKETS: dict[str, dict[str, Any]] = {
    "default bucket": {},
    "no bucket": {"bucket_mb": 0},
    "2 KiB": {"bucket_mb": 2 * KIB},
    "20 KiB": {"bucket_mb": 20 * KIB},
    "larger than all": {"bucket_mb": 1000},
}


def train(
    freezing: Callable[[nn.Module, int], None],
    steps: int = 7,
    device: str = "cpu",
    family: Family = SGD,
    **options: Any,
) -> tuple[Net, Any, int]:
    """The model, the optimizer, and the most gradient bytes held when any gradient arrived."""
    model = network(device=device)
    optimizer = family.ours(in_groups(model), **({"lr": 0.05} | options))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    peak = 0

    def look(_: Tensor) -> None:
        nonlocal peak
        held = (p.grad for p in model.parameters())
        peak = max(peak, sum(g.untyped_storage().nbytes() for g in held if g is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    for step in range(steps):
        freezing(model, step)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, peak


def assert_same(a: tuple[Net, Any, int], b: tuple[Net, Any, int]) -> None:
    for (name, p), q in zip(a[0].state_dict().items(), b[0].state_dict().values(), strict=True):
        if p.is_floating_point():
            cases.assert_same_bits(p, q, name)
    for (name, p), q in zip(a[0].named_parameters(), b[0].parameters(), strict=True):
        ours, theirs = a[1].state.get(p, {}), b[1].state.get(q, {})
        assert ours.keys() == theirs.keys(), name
        for key, value in ours.items():
            if isinstance(value, Tensor):
                cases.assert_same_bits(value, theirs[key], f"{key} of {name}")


# --------------------------------------------------------------------------------- the same results


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize(
    ("family", "hyper"),
    cases.per_family(lambda family: {} if family is cases.ADAM else family.some_hypers),
)
@pytest.mark.parametrize(
    ("bucket", "freezing"),
    cases.ids(
        {
            f"{a}, {b}": (BUCKETS[a], FREEZING[b])
            for a, b in (
                ("default bucket", "nothing frozen"),
                ("2 KiB", "frozen in turns"),
                ("20 KiB", "unfrozen later"),
                ("no bucket", "frozen in turns"),
                ("larger than all", "unfrozen later"),
            )
        }
    ),
)
def test_results_equal_those_of_the_ordinary_step(
    bucket: dict[str, Any],
    freezing: Callable[[nn.Module, int], None],
    family: Family,
    hyper: Hyper,
    device: str,
) -> None:
    how = {"device": device, "family": family} | hyper
    ordinary = train(freezing, **how)
    ours = train(freezing, step_in_backward=True, **bucket, **how)
    assert_same(ours, ordinary)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize(
    "options",
    cases.ids(
        {
            "stock's loop": {"foreach": False},
            "stock's foreach": {"foreach": True},
            "momentum reset": {"frozen_momentum": "reset", "dampening": 0.5},
            "momentum dropped": {"frozen_momentum": "drop"},
            "bfloat16 momentum": {"momentum_dtype": torch.bfloat16, "momentum_seed": 7},
            "a tensor lr": {"lr": torch.tensor(0.05)},
            "AdamW, stock's loop": {"family": ADAMW, "foreach": False},
            "AdamW, stock's foreach": {"family": ADAMW, "foreach": True},
            "AdamW, counts on the device": {"family": ADAMW, "fused": True},
            "AdamW, moments reset": {"family": ADAMW, "frozen_state": "reset", "amsgrad": True},
            "AdamW, moments dropped": {"family": ADAMW, "frozen_state": "drop"},
            "AdamW, bfloat16 moments": {
                "family": ADAMW,
                "amsgrad": True,
                "moment_dtype": torch.bfloat16,
                "moment_seed": 7,
            },
            "AdamW, a tensor lr": {"family": ADAMW, "lr": torch.tensor(0.05)},
            "AdamW, tensor betas": {
                "family": ADAMW,
                "betas": (torch.tensor(0.8), torch.tensor(0.9)),
            },
        }
    ),
)
def test_every_option_gives_the_same(options: dict[str, Any], device: str) -> None:
    usual = {} if "family" in options else {"momentum": 0.9}
    options = usual | {"device": device} | options
    ordinary = train(rolling, **copy.deepcopy(options))
    assert_same(train(rolling, step_in_backward=True, bucket_mb=2 * KIB, **options), ordinary)


def test_a_version_counter_that_parameters_share_is_no_write() -> None:
    """The parameters were views of one tensor; the first has its own memory by now."""
    flat = torch.zeros(2)
    first, second = (nn.Parameter(flat[i : i + 1]) for i in range(2))
    first.data = first.data.double()
    optimizer = FrozenAwareSGD([first, second], 0.1, step_in_backward=True, bucket_mb=0)
    (first.sum() + second.sum().double()).backward()
    optimizer.step()
    assert float(first.detach()) == -0.1 and torch.equal(flat, torch.tensor([0.0, -0.1]))


def test_counts_advance_once_per_step_whatever_the_buckets() -> None:
    for bucket in BUCKETS.values():
        model, optimizer, _ = train(nothing, 3, step_in_backward=True, family=ADAMW, **bucket)
        counts = {float(entry["step"]) for entry in optimizer.state.values()}
        assert counts == {3.0}
        model.wide.requires_grad_(False)
        loss_of(model).backward()
        optimizer.step()
        assert optimizer.state[model.wide.weight]["step"] == 3
        assert optimizer.state[model.head.weight]["step"] == 4


def test_it_trains_at_all() -> None:
    before = dict(network().named_parameters())
    after = train(nothing, step_in_backward=True)[0].named_parameters()
    still = {name for name, p in after if torch.equal(p, before[name])}
    # A bias before a batch norm has no effect, so its gradient is rounding error.
    assert still - {"stem.bias"} == {"unused", "empty"}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("bound", [0.001, 0.05])
def test_clipping_by_value_is_exact(bound: float, device: str) -> None:
    def clipped() -> tuple[Net, Any, int]:
        model = network(device=device)
        optimizer = FrozenAwareSGD(in_groups(model), 0.05, 0.9)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            assert any(
                (p.grad.abs() > bound).any() for p in model.parameters() if p.grad is not None
            )
            nn.utils.clip_grad_value_(model.parameters(), bound)
            optimizer.step()
        return model, optimizer, 0

    def in_backward() -> tuple[Net, Any, int]:
        model = network(device=device)
        optimizer = FrozenAwareSGD(
            in_groups(model),
            0.05,
            0.9,
            step_in_backward=True,
            bucket_mb=4 * KIB,
            clip_value=bound,
        )
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        return model, optimizer, 0

    assert_same(in_backward(), clipped())


@pytest.mark.parametrize("device", cases.DEVICES)
def test_a_closure_runs_forward_backward_and_the_step(device: str) -> None:
    def run(**options: Any) -> tuple[Net, Any, int]:
        model = network(device=device)
        optimizer = FrozenAwareSGD(in_groups(model), 0.05, 0.9, **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(4)]
        assert losses[-1] < losses[0]
        return model, optimizer, 0

    assert_same(run(step_in_backward=True), run())


# --------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize("freezing", cases.ids(FREEZING))
@pytest.mark.parametrize("bucket", cases.ids(BUCKETS))
def test_no_more_than_a_bucket_and_the_largest_gradient(
    bucket: dict[str, Any], freezing: Callable[[nn.Module, int], None]
) -> None:
    model, optimizer, peak = train(freezing, step_in_backward=True, **bucket)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    mib = bucket.get("bucket_mb")
    bound = sum(sizes) / 10 if mib is None else mib * 2**20
    placeholder = 4  # one number stands for the gradients, none of which is left after backward
    assert 0 < peak <= bound + max(sizes) + placeholder
    if bucket.get("bucket_mb") != 1000:
        assert peak < train(freezing)[2]
    if not bucket:
        assert optimizer.bucket_bytes <= bound


@pytest.mark.parametrize("device", cases.DEVICES)
def test_gradients_are_gone_after_backward_and_after_step(device: str) -> None:
    model = network(device=device)
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True, bucket_mb=2 * KIB)
    loss_of(model).backward()
    held = [name for name, p in model.named_parameters() if p.grad is not None]
    sizes = {name: p.numel() * 4 for name, p in model.named_parameters()}
    assert 0 < sum(sizes[name] for name in held) <= 2 * 1024
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_have_no_hook_run() -> None:
    """A frozen parameter's gradient is never accumulated, so nothing can run for it."""
    model = network()
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True)
    ran: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: ran.append(name))
    model.blocks.requires_grad_(False)
    loss_of(model).backward()
    optimizer.step()
    assert ran and not [name for name in ran if name.startswith("blocks")]


# ----------------------------------------------------------------------- other hooks and optimizers


@pytest.mark.parametrize("device", cases.DEVICES)
def test_users_hooks_run_first_and_keep_running(device: str) -> None:
    model = network(device=device)
    seen: dict[str, list[float]] = {"before": [], "after": []}
    weight = model.head.weight
    weight.register_post_accumulate_grad_hook(lambda p: seen["before"].append(float(p.grad.sum())))
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True, bucket_mb=0)
    later = weight.register_post_accumulate_grad_hook(
        lambda p: seen["after"].append(float(p.grad.sum()))
    )
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
    assert seen["before"] == seen["after"] and len(set(seen["before"])) == 2
    later.remove()
    optimizer.close()
    loss_of(model).backward()
    assert len(seen["before"]) == 3 and len(seen["after"]) == 2


def halve(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(0.5)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_a_users_hook_may_change_the_gradient(device: str) -> None:
    def run(**options: Any) -> tuple[Net, Any, int]:
        model = network(device=device)
        model.head.weight.register_hook(lambda grad: grad * 2)
        model.wide.weight.register_post_accumulate_grad_hook(halve)
        optimizer = FrozenAwareSGD(in_groups(model), 0.05, 0.9, **options)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        return model, optimizer, 0

    assert_same(run(step_in_backward=True, bucket_mb=0), run())


def test_step_hooks_run_around_step() -> None:
    model = network()
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True)
    ran: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("pre"))
    optimizer.register_step_post_hook(lambda *_: ran.append("post"))
    loss_of(model).backward()
    assert ran == []
    optimizer.step()
    assert ran == ["pre", "post"]


def test_add_param_group() -> None:
    model = network()
    optimizer = FrozenAwareSGD(model.head.parameters(), 0.1, step_in_backward=True, bucket_mb=0)
    optimizer.add_param_group({"params": model.wide.parameters(), "lr": 0.01})
    before = model.wide.weight.detach().clone()
    loss_of(model).backward()
    assert not torch.equal(model.wide.weight, before), "it is stepped in backward too"
    optimizer.step()


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("copying", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_step_in_backward_on_their_own(copying: Callable[[Any], Any], device: str) -> None:
    model = network(device=device)
    optimizer = FrozenAwareSGD(
        model.parameters(), 0.1, 0.9, step_in_backward=True, bucket_mb=0, clip_value=0.01
    )
    model2, optimizer2 = copying((model, optimizer))
    assert optimizer2.step_in_backward
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        loss_of(model2, step).backward()
        assert all(p.grad is None for p in model2.parameters() if p.numel() > 3)
        optimizer2.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
    assert_same((model, optimizer, 0), (model2, optimizer2, 0))


def test_checkpoints_load_both_ways() -> None:
    model, optimizer, _ = train(rolling, step_in_backward=True, momentum=0.9)
    other = network(1)
    stock = torch.optim.SGD(in_groups(other), 0.1, 0.9)
    assert optimizer.param_groups[0].keys() - {"initial_lr"} == stock.param_groups[0].keys()
    stock.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(stock.state_dict()))
    for p in (*model.parameters(), *other.parameters()):
        p.requires_grad_(True)
    for step in range(2):
        for each, by in ((model, optimizer), (other, stock)):
            by.zero_grad()
            loss_of(each, step).backward()
            by.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        cases.assert_same_bits(p, q, "parameter")


# --------------------------------------------------------------------------------------- closing it


def hooks_of(model: nn.Module) -> int:
    """How many of the model's parameters are stepped in backward."""
    for p in model.parameters():
        p.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model).backward()
    moved = sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for p in model.parameters():
        p.grad = None
    return moved


def test_close_takes_the_hooks_off() -> None:
    model = network()
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True, bucket_mb=0)
    assert hooks_of(model) > 5
    optimizer.close()
    optimizer.close()
    assert not optimizer.step_in_backward and hooks_of(model) == 0
    before = model.head.weight.detach().clone()
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, before), "it goes on as an ordinary one"
    again = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True, bucket_mb=0)
    assert hooks_of(model) > 5
    again.close()


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("family", cases.ids({"SGD": (SGD,), "AdamW": (ADAMW,)}))
def test_closing_in_mid_step_leaves_the_rest_to_step(family: Family, device: str) -> None:
    hyper = {"momentum": 0.9} if family is SGD else {}
    options: dict[str, Any] = {"device": device, "family": family} | hyper
    model, optimizer, _ = train(nothing, **options)
    other, closed, _ = train(nothing, step_in_backward=True, bucket_mb=2 * KIB, **options)
    for each, by in ((model, optimizer), (other, closed)):
        by.zero_grad()
        loss_of(each).backward()
    closed.close()
    closed.step()
    optimizer.step()
    assert_same((other, closed, 0), (model, optimizer, 0))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_a_collected_optimizer_takes_its_hooks_with_it(device: str) -> None:
    model = network(device=device)
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True, bucket_mb=0)
    loss_of(model).backward()
    del optimizer
    gc.collect()
    assert hooks_of(model) == 0


def test_collected_between_backward_and_step_it_leaves_no_placeholder() -> None:
    """Where every gradient has been applied, one parameter carries a NaN for step() to find."""
    layer = nn.Linear(4, 4, bias=False)
    optimizer = FrozenAwareSGD(layer.parameters(), 0.1, step_in_backward=True, bucket_mb=0)
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isnan().all()
    assert layer.weight.grad.untyped_storage().nbytes() == 4
    del optimizer
    gc.collect()
    assert layer.weight.grad is None


def test_the_optimizer_is_not_kept_alive_by_its_hooks() -> None:
    import weakref

    model = network()
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True)
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


def test_a_second_optimizer_on_the_same_parameters_is_refused() -> None:
    model = network()
    first = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True)
    with pytest.raises(RuntimeError, match=r"already stepped in backward.*close\(\)"):
        FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True)
    assert hooks_of(model) > 0
    first.zero_grad = None  # type: ignore[assignment,method-assign]
    second = FrozenAwareSGD(network(1).parameters(), 0.1, step_in_backward=True)
    with pytest.raises(RuntimeError, match="already stepped"):
        second.add_param_group({"params": model.parameters()})
    assert len(second.param_groups) == 1


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=["fused", "stock's form"])
def test_an_ordinary_optimizer_does_not_take_over_what_is_stepped_in_backward(
    options: dict[str, Any],
) -> None:
    model = network()
    first: Any = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True)
    scheduler = torch.optim.lr_scheduler.StepLR(first, 1)  # keeps it alive
    with pytest.raises(RuntimeError, match=r"another optimizer, which is still alive.*close\(\)"):
        FrozenAwareSGD(model.parameters(), 0.1, **options)
    second = FrozenAwareSGD(network(1).parameters(), 0.1, **options)
    with pytest.raises(RuntimeError, match="still alive"):
        second.add_param_group({"params": model.parameters()})
    assert len(second.param_groups) == 1
    scheduler.optimizer.close()
    second.add_param_group({"params": model.parameters()})


def test_a_second_backward_names_a_stock_optimizer_that_stepped() -> None:
    model = network()
    first = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True)
    second = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model).backward()
    second.step()
    second.zero_grad()
    with pytest.raises(RuntimeError, match=r"another optimizer has taken .* over, call close\(\)"):
        loss_of(model).backward()
    first.close()


# ----------------------------------------------------------------------------- errors of other code


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("bucket_mb", [0, 4 * KIB, None], ids=["no bucket", "4 KiB", "the usual"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("family", cases.ids({"SGD": (SGD,), "AdamW": (ADAMW,)}))
def test_zero_grad_gives_up_a_backward_that_other_code_interrupted(
    family: Family, kind: type[BaseException], bucket_mb: float | None, device: str
) -> None:
    """As in a loop that skips a batch: what was applied before the error stays."""
    model = network(device=device)
    hyper = {"momentum": 0.9} if family is SGD else {}
    optimizer = family.ours(
        model.parameters(), 0.1, step_in_backward=True, bucket_mb=bucket_mb, **hyper
    )
    train_once = functools.partial(_iterate, model, optimizer)
    train_once(0)

    def fail(grad: Tensor) -> None:
        raise kind("stop here")

    handle = model.wide.weight.register_hook(fail)
    with pytest.raises(kind, match="stop here"):
        train_once(1)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"step\(\) first, or zero_grad\(\) to give"):
        optimizer.state_dict()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    # From here on it trains like an optimizer that starts from the same weights and momentum.
    twin = copy.deepcopy(model)
    ordinary = family.ours(twin.parameters(), 0.1, **hyper)
    ordinary.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 5):
        train_once(step)
        _iterate(twin, ordinary, step)
    assert_same((model, optimizer, 0), (twin, ordinary, 0))
    # A backward that ended without an error is not given up.
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"Call step\(\) first: it makes the rest"):
        optimizer.zero_grad()


def _iterate(model: Net, optimizer: FrozenAwareSGD, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


# ----------------------------------------------------------------------------------------- refusals


def accumulate(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()


def create_graph(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model).backward(create_graph=True)


def clip_norm(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def scaler(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss = loss_of(model)
    scaler = torch.amp.GradScaler(loss.device.type)
    scaler.scale(loss).backward()
    scaler.step(optimizer)


def taken(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model).backward()
    model.zero_grad()
    optimizer.step()


def replaced(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad = p.grad.clone()
    optimizer.step()


def discarded(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model).backward()
    optimizer.zero_grad()


def new_lr(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model).backward()
    optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.step()


def new_momentum(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model).backward()
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step()


def set_between(key: str, value: Any) -> Callable[[Net, Any], None]:
    def misuse(model: Net, optimizer: Any) -> None:
        loss_of(model).backward()
        optimizer.param_groups[0][key] = value
        optimizer.step()

    return misuse


def frozen_after(model: Net, optimizer: FrozenAwareSGD) -> None:
    loss_of(model).backward()
    model.wide.requires_grad_(False)
    optimizer.step()


def sparse(model: Net, optimizer: FrozenAwareSGD) -> None:
    device = model.scale.device
    table = nn.Embedding(10, 4, sparse=True, device=device)
    optimizer.add_param_group({"params": table.parameters()})
    table(torch.tensor([1, 2], device=device)).sum().backward()


def reentrant(model: Net, optimizer: FrozenAwareSGD) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(2, 40, requires_grad=True, device=model.scale.device)
    layer = model.blocks[0]
    once = checkpoint(layer, x, use_reentrant=True)
    checkpoint(layer, once, use_reentrant=True).sum().backward()


REFUSED: dict[str, tuple[Callable[[Net, FrozenAwareSGD], None], str]] = {
    "a second backward before step": (accumulate, "for the second time since the last step"),
    "create_graph": (create_graph, "create_graph=True"),
    "clipping by norm": (clip_norm, "was changed between backward and step"),
    "a GradScaler": (scaler, "a GradScaler scales the gradients"),
    "model.zero_grad between": (taken, "was taken away between backward and step"),
    "gradients replaced between": (replaced, "was changed between backward and step"),
    "optimizer.zero_grad between": (discarded, r"Call step\(\) first"),
    "a new lr between": (new_lr, r"lr of param_groups\[0\] was changed"),
    "a new momentum between": (new_momentum, r"momentum of param_groups\[0\] was changed"),
    "frozen between": (frozen_after, "was frozen between backward and step"),
    "sparse gradients": (sparse, "layout Sparse"),
    "reentrant checkpoints of one layer": (reentrant, "for the second time"),
}
REFUSED_OF_ADAMW: dict[str, tuple[Callable[[Net, Any], None], str]] = {
    key: (set_between(key, value), rf"{key} of param_groups\[0\] was changed")
    for key, value in {
        "betas": (0.5, 0.5),
        "eps": 1.0,
        "weight_decay": 0.5,
        "amsgrad": True,
        "maximize": True,
        "decoupled_weight_decay": False,
    }.items()
}
REFUSED_OF_ADAMW |= {name: REFUSED[name] for name in ("clipping by norm", "a GradScaler")}
REFUSED_OF_ANY = [
    pytest.param(family, *case, id=f"{family_name}: {name}")
    for family_name, family, table in (("SGD", SGD, REFUSED), ("AdamW", ADAMW, REFUSED_OF_ADAMW))
    for name, case in table.items()
]


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("bucket_mb", [0, 4 * KIB], ids=["no bucket", "4 KiB"])
@pytest.mark.parametrize(("family", "misuse", "message"), REFUSED_OF_ANY)
def test_what_cannot_be_one_step_is_refused(
    family: Family,
    misuse: Callable[[Net, Any], None],
    message: str,
    bucket_mb: float,
    device: str,
) -> None:
    model = network(device=device)
    hyper = {"momentum": 0.9} if family is SGD else {}
    optimizer = family.ours(
        model.parameters(), 0.1, step_in_backward=True, bucket_mb=bucket_mb, **hyper
    )
    if misuse is clip_norm and bucket_mb == 0:
        message += "|more than one element"  # torch's error: the placeholder cannot be written to
    with pytest.raises(RuntimeError, match=message):
        misuse(model, optimizer)
    # After zero_grad() the next iteration works as usual.
    for p in model.parameters():
        p.requires_grad_(True)
    if misuse is discarded:
        optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = model.head.weight.detach().clone()
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_a_refused_backward_makes_no_step(device: str) -> None:
    model = network(device=device)
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True)
    with pytest.raises(RuntimeError):
        accumulate(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="the last backward was refused"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="second time"):
        loss_of(model).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_step_succeeds_once_an_edit_is_undone() -> None:
    ordinary = train(nothing, steps=1)
    model = network()
    optimizer = FrozenAwareSGD(in_groups(model), 0.05, step_in_backward=True, bucket_mb=2 * KIB)
    loss_of(model).backward()
    optimizer.param_groups[0]["lr"] = 1.0
    model.head.requires_grad_(False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="frozen between"):
            optimizer.step()
    model.head.requires_grad_(True)
    with pytest.raises(RuntimeError, match="lr of"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    assert_same((model, optimizer, 0), ordinary)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_retained_graph_makes_one_step_and_no_second(device: str) -> None:
    ordinary = train(nothing, steps=1, device=device)
    model = network(device=device)
    optimizer = FrozenAwareSGD(in_groups(model), 0.05, step_in_backward=True)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    optimizer.step()
    assert_same((model, optimizer, 0), ordinary)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_accumulate_grad_hooks_are_refused_before_anything_moves() -> None:
    """As DistributedDataParallel's."""
    model = network()
    optimizer = FrozenAwareSGD(model.parameters(), 0.1, step_in_backward=True, bucket_mb=0)
    nodes = []
    for p in model.parameters():
        edge = p.view_as(p).grad_fn
        assert edge is not None
        nodes.append(edge.next_functions[0][0])
        nodes[-1].register_hook(lambda *_: None)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        loss_of(model).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    cases.ids(
        {
            "a negative bucket": ({"bucket_mb": -1}, "Invalid bucket_mb value: -1"),
            "an infinite bucket": ({"bucket_mb": float("inf")}, "Invalid bucket_mb value: inf"),
            "a NaN clip": ({"clip_value": float("nan")}, "Invalid clip_value value: nan"),
            "differentiable": ({"differentiable": True}, "cannot be differentiable"),
            "a bucket without": ({"step_in_backward": False, "bucket_mb": 1}, "needs step_in_back"),
            "a clip without": ({"step_in_backward": False, "clip_value": 1}, "clip_grad_value_"),
        }
    ),
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenAwareSGD(network().parameters(), 0.1, **({"step_in_backward": True} | options))
