"""A step that fails half-way: all tensors are updated or none, and the next step is right.

Faults are put where a step can meet them: in closures and hooks, in Python's and torch's
allocators, in signal handlers and garbage collections that happen to run while buffers are
made. Each runs in a process of its own, since what it guards against is a crash.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.helpers import apart
from tests.helpers import optim_cases as cases

FAMILIES = cases.each_family(cases.UNLIKE_FAMILIES)


class Pair:
    """The same training twice: ours, with faults, and the reference, without any."""

    def __init__(
        self,
        sizes: list[Any],
        groups: int = 2,
        frozen: int = 2,
        device: str = "cpu",
        family: cases.Family = cases.SGD,
    ) -> None:
        self.device = device
        self.exact = family.exact_on(device)
        self.gen = cases.generator(8)
        self.ours = [torch.nn.Parameter(self.values(size)) for size in sizes]
        for p in self.ours[:frozen]:
            p.requires_grad_(False)
        self.theirs = cases.twin(self.ours)
        hyper = family.with_state
        self.optimizer = family.ours(cases.in_groups(self.ours, groups), **hyper)
        self.reference = family.reference(cases.in_groups(self.theirs, groups), **hyper)
        self.give_grads()

    def values(self, size: Any) -> Tensor:
        if isinstance(size, int) and size > 1 << 19:
            return torch.linspace(-1, 1, size, device=self.device)
        return cases.randn(size, self.gen, device=self.device)

    def give_grads(self) -> None:
        for p, q in zip(self.ours, self.theirs, strict=True):
            grad = self.values(p.numel()).reshape(p.shape)
            p.grad, q.grad = grad, grad.clone()

    def compare(self, what: str) -> None:
        cases.assert_same_training(self.optimizer, self.reference, what, exact=self.exact)

    def step_with(self, fault: contextlib.AbstractContextManager[Any]) -> BaseException | None:
        """Make one step of ours under the fault; the reference follows if ours was taken.

        The first trainable tensor shows whether it was; all others then have to agree.
        """
        live = [p for p in self.ours if p.requires_grad]
        before = [p._version for p in live]
        grads = [p.grad for p in self.ours]
        raised = None
        try:
            with fault:
                self.optimizer.step()
        except BaseException as error:
            raised = error
        moved = {p._version - version for p, version in zip(live, before, strict=True)}
        assert moved in ({0}, {1}), f"updated by halves: {moved}"
        if moved == {1}:
            self.reference.step()
        else:
            assert raised is not None
            for p, grad in zip(self.ours, grads, strict=True):
                assert p.grad is grad, "a gradient is gone"
        self.compare(f"after {raised!r}:")
        return raised

    def step(self) -> None:
        """The next step, which has to be right."""
        assert self.step_with(contextlib.nullcontext()) is None
        self.give_grads()
        assert self.step_with(contextlib.nullcontext()) is None


SIZES = [(5, 3)] * 12


# --- what a user's own code raises


class StopError(Exception):
    pass


def _closure(pair: Pair, raised: BaseException) -> Callable[[], None]:
    def closure() -> float:
        pair.optimizer.zero_grad()
        pair.ours[4].sum().backward()
        raise raised

    return lambda: pair.optimizer.step(closure)


def _pre_hook(pair: Pair, raised: BaseException) -> Callable[[], None]:
    def hook(*_: Any) -> None:
        raise raised

    return _with_handle(pair, pair.optimizer.register_step_pre_hook(hook))


def _post_hook(pair: Pair, raised: BaseException) -> Callable[[], None]:
    def hook(*_: Any) -> None:
        raise raised

    return _with_handle(pair, pair.optimizer.register_step_post_hook(hook))


def _global_pre_hook(pair: Pair, raised: BaseException) -> Callable[[], None]:
    def hook(*_: Any) -> None:
        raise raised

    return _with_handle(pair, register_optimizer_step_pre_hook(hook))


def _with_handle(pair: Pair, handle: Any) -> Callable[[], None]:
    def step() -> None:
        try:
            pair.optimizer.step()
        finally:
            handle.remove()

    return step


USERS_CODE: dict[str, tuple[Any, bool]] = {
    "a closure": (_closure, False),
    "a hook before the step": (_pre_hook, False),
    "a hook of all optimizers": (_global_pre_hook, False),
    "a hook after the step": (_post_hook, True),
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("steps_before", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize(("where", "stepped"), cases.ids(USERS_CODE))
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_in_users_code_leaves_all_or_nothing(
    family: cases.Family,
    where: Any,
    stepped: bool,
    error: type[BaseException],
    steps_before: int,
    device: str,
) -> None:
    pair = Pair(SIZES, device=device, family=family)
    for _ in range(steps_before):
        pair.step()
        pair.give_grads()
    step = where(pair, error("fault"))
    versions = [p._version for p in pair.ours]
    with pytest.raises(error, match="fault"):
        step()
    moved = [p._version - version for p, version in zip(pair.ours, versions, strict=True)]
    assert moved == [int(stepped and p.requires_grad) for p in pair.ours]
    if stepped:
        pair.reference.step()
    pair.compare("after the fault:")
    pair.give_grads()
    pair.step()


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("middle", [3, 6, 11], ids=["third", "in the middle", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bad_gradient_in_the_middle_stops_the_whole_step(
    family: cases.Family, middle: int, device: str
) -> None:
    pair = Pair(SIZES, device=device, family=family)
    good = pair.ours[middle].grad
    pair.ours[middle].grad.data = torch.ones(3, device=device)  # type: ignore[union-attr]
    assert isinstance(pair.step_with(contextlib.nullcontext()), ValueError)
    assert not pair.optimizer.state, "a buffer was made for a step that was not taken"
    pair.ours[middle].grad = pair.theirs[middle].grad.clone()  # type: ignore[union-attr]
    assert good is not None
    pair.step()


# --- memory


LARGE = 10 << 20


def _each(function: Callable[[int], Any], numbers: range) -> list[Any]:
    return [function(number) for number in numbers]


def _out_of_memory(name: str, fits: int) -> None:
    """There is memory for `fits` of the large buffers, of which there are four or eight."""
    gc.collect()
    family = cases.FAMILIES[name]
    pair = Pair([3, 3, LARGE, 5, LARGE, LARGE, LARGE], frozen=2, family=family)
    raised = pair.step_with(apart.memory_for(fits, LARGE))
    assert isinstance(raised, RuntimeError | MemoryError), f"not out of memory: {raised!r}"
    assert not pair.optimizer.state, "buffers were kept of a step that was not taken"
    pair.step()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="ASan takes all addresses"
)
@pytest.mark.parametrize(
    ("name", "fits"),
    [
        pytest.param(*values, id=f"{values[0]}: {values[1]} fit")
        for values in (("SGD", 0), ("SGD", 2), ("AdamW", 3))
    ],
)
def test_out_of_memory_making_buffers_writes_nothing(name: str, fits: int) -> None:
    apart.run(_out_of_memory, name, fits)


def _no_python_memory(name: str, device: str) -> tuple[int, int]:
    import _testcapi

    @contextlib.contextmanager
    def fails_at(allocation: int) -> Iterator[None]:
        _testcapi.set_nomemory(allocation, allocation + 1)
        try:
            yield
        finally:
            _testcapi.remove_mem_hooks()

    failed = unharmed = 0
    for allocation in range(120 if name == "SGD" else 240):
        pair = Pair([2] * 8, groups=1, device=device, family=cases.FAMILIES[name])
        # With a buffer of None the state has an entry already.
        for p, q in zip(pair.ours[2:4], pair.theirs[2:4], strict=True) if name == "SGD" else ():
            pair.optimizer.state[p] = {"momentum_buffer": None}
            pair.reference.state[q] = {"momentum_buffer": None}
        raised = pair.step_with(fails_at(allocation))
        assert raised is None or isinstance(raised, MemoryError | RuntimeError), repr(raised)
        failed += raised is not None
        unharmed += raised is None
        pair.step()
    return failed, unharmed


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", list(cases.UNLIKE_FAMILIES))
def test_each_allocation_of_python_may_fail_in_turn(name: str, device: str) -> None:
    """The first, the second, … of a first step's Python allocations fails: all or nothing."""
    pytest.importorskip("_testcapi", reason="this Python was built without its test modules")
    failed, unharmed = apart.run(_no_python_memory, name, device)
    assert failed >= 10, "the faults did not meet the step"
    assert unharmed >= 10, "the faults did not go past the end of the step"


# --- whatever runs while buffers are made


def _interrupt_in_hash(number: int, name: str, device: str) -> bool:
    """KeyboardInterrupt in the `number`th hash of a parameter, which is a Python function."""
    pair = Pair(SIZES, device=device, family=cases.FAMILIES[name])
    seen = 0

    def tracer(frame: Any, event: str, arg: Any) -> None:
        nonlocal seen
        if frame.f_code.co_name == "__hash__":
            seen += 1
            if seen == number:
                raise KeyboardInterrupt

    @contextlib.contextmanager
    def traced() -> Iterator[None]:
        sys.settrace(tracer)
        try:
            yield
        finally:
            sys.settrace(None)

    raised = pair.step_with(traced())
    pair.step()
    return isinstance(raised, KeyboardInterrupt)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", list(cases.UNLIKE_FAMILIES))
def test_an_interrupt_while_buffers_enter_the_state_removes_them_again(
    name: str, device: str
) -> None:
    interrupt = functools.partial(_interrupt_in_hash, name=name, device=device)
    hit = apart.run(_each, interrupt, range(1, 14))
    assert hit[0] and hit[9], hit
    assert not hit[-1], "more hashes than trainable parameters"


def _interrupt_at_any_time(name: str, steps: int) -> int:
    """A timer, whose handler raises, goes off somewhere in or around a first step."""
    caught = 0

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)

    @contextlib.contextmanager
    def timed(seconds: float) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    for step in range(steps):
        pair = Pair([3] * 40, family=cases.FAMILIES[name])
        try:
            error = pair.step_with(timed(1e-6 + 1e-6 * (step % 200)))
            caught += isinstance(error, KeyboardInterrupt)
        except KeyboardInterrupt:  # late: in this test's own code
            signal.setitimer(signal.ITIMER_REAL, 0)
            continue
    return caught


@pytest.mark.parametrize("name", list(cases.UNLIKE_FAMILIES))
def test_an_interrupt_at_any_time_leaves_all_or_nothing(name: str) -> None:
    assert apart.run(_interrupt_at_any_time, name, 300) > 0


class _Finalized:
    """Drops the gradients and buffers that it knows when it is collected."""

    def __init__(self, pair: Pair) -> None:
        self.me = self
        self.pair = pair

    def __del__(self) -> None:
        for p in self.pair.ours:
            p.grad = None
        self.pair.optimizer.state.clear()


def _collected_in_a_first_step(threshold: int, name: str) -> int:
    """A collection during a step drops every gradient and buffer; those found are still stepped."""
    pair = Pair([60_000] * 12, family=cases.FAMILIES[name])
    _Finalized(pair)
    before = [p.detach().clone() for p in pair.ours]
    gc.disable()
    gc.set_threshold(threshold, 1, 1)
    gc.enable()
    pair.optimizer.step()
    gc.set_threshold(700, 10, 10)
    grads = sum(p.grad is not None for p in pair.ours)
    for p, was in zip(pair.ours, before, strict=True):
        assert bool(torch.isfinite(p).all())
        if not p.requires_grad:
            cases.assert_same_bits(p, was, "frozen")
    return grads


@pytest.mark.parametrize("name", list(cases.UNLIKE_FAMILIES))
def test_a_garbage_collection_in_a_first_step_may_drop_the_gradients(name: str) -> None:
    collected = functools.partial(_collected_in_a_first_step, name=name)
    grads = apart.run(_each, collected, range(1, 40))
    assert 0 in grads, "no collection met the step"


def _reentrant_step(name: str) -> None:
    """Dropping a frozen parameter's gradient runs code that steps again."""
    pair = Pair(SIZES, frozen=3, family=cases.FAMILIES[name])
    calls = []

    class Loud(Tensor):
        def __del__(self) -> None:
            calls.append(1)
            if len(calls) == 1:
                pair.optimizer.step()

    pair.ours[0].grad = torch.ones(5, 3).as_subclass(Loud)
    pair.optimizer.step()
    pair.reference.step()
    pair.reference.step()
    assert calls
    pair.compare("after a step in a step:")


@pytest.mark.parametrize("name", list(cases.UNLIKE_FAMILIES))
def test_a_step_within_a_step_is_one_more_step(name: str) -> None:
    apart.run(_reentrant_step, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_stocks_form_are_all_or_nothing_for_the_kernels(family: cases.Family) -> None:
    """Stock's form raises before the kernels run, so none of their tensors is written."""
    pair = Pair(SIZES, family=family)

    class Refuses(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (Tensor.add_, Tensor.add, torch.add, torch.clone, Tensor.mul_):
                raise StopError("refused")
            return super().__torch_function__(func, kinds, args, kwargs or {})

    refuses = torch.ones(2).as_subclass(Refuses).requires_grad_()
    refuses.grad = torch.ones(2)
    pair.optimizer.add_param_group({"params": [refuses]})
    with pytest.raises(StopError):
        pair.optimizer.step()
    assert all(p._version == 0 for p in pair.ours if p.requires_grad)
    pair.optimizer.param_groups.pop()
    pair.optimizer.state.pop(refuses, None)
    pair.step()
