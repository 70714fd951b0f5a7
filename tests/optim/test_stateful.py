"""Any interleaving of steps, freezing and edits gives what stock would have given, bit for bit.

A hypothesis state machine drives each optimizer and its plain reference (stock's for-loop plus
"frozen does not move" and the policies for the state of what is frozen) through the same random
rules over the same random tensors and compares everything after every rule.
`TORCH_FREEZE_STATEFUL_STEPS=200000` asks for a long run, new seeds.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import optim_cases as cases
from torch_freeze import rotate

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

WANTED_STEPS = int(os.environ.get("TORCH_FREEZE_STATEFUL_STEPS", "5000"))
IS_LONG = "TORCH_FREEZE_STATEFUL_STEPS" in os.environ
RULES_PER_EXAMPLE = 40

SHAPES = ((), (0,), (1,), (3,), (17,), (4, 6), (2, 3, 2, 5), (1, 7, 1), (3, 0, 2), (129,))
LAYOUTS = ("contiguous", "transposed", "offset", "flat view", "flat view that overlaps")
SEEDS = st.integers(0, 2**16)
PLACES = st.integers(0, 2**10)

GROUP_EDITS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "SGD": {
        "lr": st.sampled_from((0.0, 1e-3, 0.1, 1, torch.tensor(0.05), torch.tensor([0.05]))),
        "momentum": st.sampled_from((0, 0.5, 0.9, 1.0)),
        "dampening": st.sampled_from((0, 0.3, 1)),
        "weight_decay": st.sampled_from((0, 1e-2, 0.5)),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
    },
    "AdamW": {
        # No tensors, whose precision stock's own arithmetic with the rate has.
        "lr": st.sampled_from((0.0, 1e-3, 0.1, 1)),
        "betas": st.sampled_from(((0.9, 0.999), (0.8, 0.95), (0.1, 0.5))),
        "eps": st.sampled_from((1e-8, 1e-3)),
        "weight_decay": st.sampled_from((0, 1e-2, 0.5)),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    },
}
GROUP_EDITS["Adam"] = GROUP_EDITS["AdamW"] | {"decoupled_weight_decay": st.booleans()}

POLICIES = st.sampled_from((None, None, "keep", "reset", "drop"))
# MiB; None for an optimizer that does not step in backward.
BUCKETS = st.sampled_from((None, None, 0, 1e-4, 1))


class Policies(torch.optim.Optimizer):
    """Also decides about the state of whatever is frozen at a step or at zero_grad()."""

    family: cases.Family

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                trains = p.requires_grad and p.grad is not None and self.family.buffers(group)
                if trains and self.state.get(p, {}).pop(self.family.state.stale, False):
                    self.start_over(self.state[p])
        loss = super().step(closure)
        self.settle()
        return loss

    def start_over(self, state: dict[str, Any]) -> None:
        for name in self.family.state.all:
            if self.family.state.counter is None:
                state[name] = None  # SGD's first momentum is no sum with zero
            elif name in state:
                state[name] = torch.zeros_like(state[name])

    def settle(self) -> None:
        self.let_go("reset", "drop")

    def let_go(self, *policies: str) -> None:
        names = self.family.state
        for group in self.param_groups:
            policy = group.get(names.policy, "keep")
            for p in group["params"]:
                state = self.state.get(p)
                if p.requires_grad or state is None or policy not in policies:
                    continue
                if policy == "reset" and any(state.get(name) is not None for name in names.all):
                    state[names.stale] = True
                elif policy == "drop":
                    for name in (*names.all, names.stale):
                        state.pop(name, None)
                    if not state:
                        del self.state[p]


class SGDReference(Policies, cases.Reference):
    family = cases.SGD


class AdamReference(Policies, cases.AdamReference):
    family = cases.ADAM


class AdamWReference(Policies, cases.AdamWReference):
    family = cases.ADAMW


REFERENCES = {"SGD": SGDReference, "Adam": AdamReference, "AdamW": AdamWReference}


def _copy_value(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Training(RuleBasedStateMachine):
    """Two optimizers over twin tensors; `self.flats` are the twin storages of the flat views."""

    name = ""  # of the family
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.family = cases.FAMILIES[self.name]
        self.edits = GROUP_EDITS[self.name]
        # What a group may be made with: stock refuses nesterov without momentum.
        self.hypers = st.fixed_dictionaries(
            {key: values for key, values in self.edits.items() if key != "nesterov"}
        )
        self.gen = cases.generator(0)
        self.optimizer: Any = None
        self.reference: Any = None
        self.scale = 8.0

    # ---- building

    def _value(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.gen).to(dtype)

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Any]:
        value = self._value(shape, dtype)
        pair = []
        for flat in self.flats[dtype]:
            if layout == "transposed":
                tensor = torch.empty(shape[::-1], dtype=dtype).permute(
                    tuple(range(len(shape)))[::-1]
                )
            elif layout == "offset":
                tensor = torch.empty(math.prod(shape) + 1, dtype=dtype)[1:].view(shape)
            elif layout.startswith("flat view"):
                start = 0 if "overlaps" in layout else self.used[dtype]
                tensor = flat[start : start + math.prod(shape)].view(shape)
            else:
                tensor = torch.empty(shape, dtype=dtype)
            pair.append(torch.nn.Parameter(tensor.copy_(value)))
        if layout == "flat view":
            self.used[dtype] += math.prod(shape)
        return pair

    @initialize(
        seed=SEEDS,
        bucket=BUCKETS,
        data=st.data(),
        groups=st.lists(
            st.tuples(
                POLICIES,
                st.lists(
                    st.tuples(
                        st.sampled_from(SHAPES),
                        st.sampled_from(list(cases.DTYPES.values())),
                        st.sampled_from(LAYOUTS),
                    ),
                    min_size=1,
                    max_size=5,
                ),
            ),
            min_size=1,
            max_size=3,
        ),
    )
    def build(self, seed: int, bucket: float | None, data: Any, groups: Any) -> None:
        self.gen = cases.generator(seed)
        self.flats = {
            dtype: (torch.zeros(4096, dtype=dtype), torch.zeros(4096, dtype=dtype))
            for dtype in cases.DTYPES.values()
        }
        self.used = dict.fromkeys(self.flats, 256)
        ours, theirs = [], []
        for policy, tensors in groups:
            hyper = data.draw(self.hypers)
            if policy is not None:
                hyper = hyper | {self.family.state.policy: policy}
            pairs = [self._make(*spec) for spec in tensors]
            ours.append({k: _copy_value(v) for k, v in hyper.items()})
            theirs.append({k: _copy_value(v) for k, v in hyper.items()})
            ours[-1]["params"] = [p for p, _ in pairs]
            theirs[-1]["params"] = [q for _, q in pairs]
        self.optimizer = self.family.ours(ours, **self._in_backward(bucket))
        self.reference = REFERENCES[self.name](theirs)

    # ---- helpers

    @staticmethod
    def _in_backward(bucket: float | None) -> dict[str, Any]:
        return {} if bucket is None else {"step_in_backward": True, "bucket_mb": bucket}

    def _both(self) -> tuple[Any, Any]:
        return self.optimizer, self.reference

    def _params(self, optimizer: Any) -> list[Any]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def _pairs(self) -> list[tuple[Any, Any]]:
        return list(zip(self._params(self.optimizer), self._params(self.reference), strict=True))

    def _pair(self, place: int) -> tuple[Any, Any]:
        pairs = self._pairs()
        return pairs[place % len(pairs)]

    def _backward(self, mask: int, scale: float = 1.0) -> None:
        """New gradients where the mask has a bit, frozen ones included; none elsewhere."""
        for i, (p, q) in enumerate(self._pairs()):
            p.grad = q.grad = None
            if mask >> i % 16 & 1:
                grad = torch.empty_like(p).detach().copy_(self._value(p.shape, p.dtype))
                p.grad, q.grad = grad * scale, grad.clone()

    def _step(self) -> None:
        self.optimizer.step()
        self.reference.step()
        type(self).steps += 1
        for p, q in self._pairs():
            if self.optimizer.step_in_backward:
                assert p.grad is None
                q.grad = None
            assert p.requires_grad or p.grad is None

    def _train(self, mask: int, times: int = 1) -> None:
        for _ in range(times):
            self._backward(mask)
            self._step()

    # ---- rules

    @rule(masks=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=4))
    def backward_and_step(self, masks: list[int]) -> None:
        for mask in masks:
            self._train(mask)

    @rule(mask=st.integers(1, 2**16 - 1), times=st.integers(1, 3))
    def run_backward_and_step(self, mask: int, times: int) -> None:
        """Autograd adds its gradients to `.grad`; they may be applied as they come."""
        for _ in range(times):
            losses: list[list[Tensor]] = [[], []]
            for i, (p, q) in enumerate(self._pairs()):
                factor = self._value(p.shape, p.dtype)
                if mask >> i % 16 & 1 and p.requires_grad:
                    for loss, x in zip(losses, (p, q), strict=True):
                        loss.append((x * factor).sum().double())
            if losses[0]:
                for loss in losses:
                    torch.stack(loss).sum().backward()
            self._step()

    @rule()
    def stop_stepping_in_backward(self) -> None:
        self.optimizer.close()
        assert not self.optimizer.step_in_backward

    @rule(seed=SEEDS, steps=st.integers(1, 4), k=st.integers(1, 3))
    def a_schedule_freezes(self, seed: int, steps: int, k: int) -> None:
        schedules = []
        for optimizer in self._both():
            model = torch.nn.Module()
            model.layers = torch.nn.ModuleList()
            seen: set[int] = set()
            for p in self._params(optimizer):
                if id(p) not in seen:
                    seen.add(id(p))
                    model.layers.append(torch.nn.ParameterList([p]))
            if len(model.layers) < k:
                return
            schedules.append(rotate(model, "layers.*", k, 1, seed=seed))
        for _ in range(steps):
            self._train(seed | 1)
            for schedule in schedules:
                schedule.step()

    @rule()
    def step_again_with_the_same_gradients(self) -> None:
        self._step()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        set_to_none |= self.optimizer.step_in_backward  # which keeps no gradient's memory
        self.optimizer.zero_grad(set_to_none=set_to_none)
        for _, q in self._pairs():
            if q.grad is not None:
                q.grad = None if set_to_none else torch.zeros_like(q.grad)
        self.reference.let_go("drop")

    @rule(place=PLACES)
    def freeze_or_unfreeze_one(self, place: int) -> None:
        for p in self._pair(place):
            p.requires_grad_(not p.requires_grad)

    @rule(mask=st.integers(0, 2**16 - 1))
    def freeze_many(self, mask: int) -> None:
        for i, pair in enumerate(self._pairs()):
            for p in pair:
                p.requires_grad_(bool(mask >> i % 16 & 1))

    @rule(data=st.data(), group=PLACES)
    def edit_a_hyper_parameter(self, data: Any, group: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.edits)))
        value = data.draw(self.edits[key])
        for optimizer in self._both():
            edited = optimizer.param_groups[group % len(optimizer.param_groups)]
            states = [optimizer.state.get(p, {}) for p in edited["params"]]
            if key == "amsgrad" and any(self.family.state.stale in state for state in states):
                return  # stock has no such state; test_state_policies.py has it
            edited[key] = _copy_value(value)
            if key == "amsgrad" and value:  # stock raises where the state has no maximum yet
                for p, state in zip(edited["params"], states, strict=True):
                    if "exp_avg_sq" in state:
                        state.setdefault("max_exp_avg_sq", torch.zeros_like(p))

    @precondition(lambda self: len(self.optimizer.param_groups) < 6)
    @rule(
        data=st.data(),
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(list(cases.DTYPES.values())),
        layout=st.sampled_from(LAYOUTS),
    )
    def add_param_group(self, data: Any, shape: Any, dtype: Any, layout: str) -> None:
        hyper = data.draw(self.hypers)
        pair = self._make(shape, dtype, layout)
        for optimizer, p in zip(self._both(), pair, strict=True):
            group = {k: _copy_value(v) for k, v in hyper.items()}
            optimizer.add_param_group(group | {"params": [p]})

    @rule()
    def clear_the_state(self) -> None:
        for optimizer in self._both():
            optimizer.state.clear()

    @rule(place=PLACES)
    def delete_one_state(self, place: int) -> None:
        for optimizer, p in zip(self._both(), self._pair(place), strict=True):
            optimizer.state.pop(p, None)

    @precondition(lambda self: self.family is cases.SGD)
    @rule(place=PLACES)
    def set_one_buffer_to_none(self, place: int) -> None:
        for optimizer, p in zip(self._both(), self._pair(place), strict=True):
            optimizer.state[p]["momentum_buffer"] = None

    @rule(place=PLACES)
    def replace_the_buffers_of_one(self, place: int) -> None:
        p, q = self._pair(place)
        if p not in self.optimizer.state and self.family is not cases.SGD:
            return  # a part of the state is not enough for them
        for name in self.optimizer.state[p] or self.family.state.buffers:
            if name not in self.family.state.buffers:
                continue
            value = self._value(p.shape, p.dtype)
            value = value.abs() if name.endswith("_sq") else value
            for optimizer, x in ((self.optimizer, p), (self.reference, q)):
                optimizer.state[x][name] = torch.empty_like(x).detach().copy_(value)

    @precondition(lambda self: self.family.state.counter is not None)
    @rule(place=PLACES, count=st.integers(0, 2**20))
    def set_ones_count(self, place: int, count: int) -> None:
        for optimizer, p in zip(self._both(), self._pair(place), strict=True):
            if "step" in optimizer.state.get(p, {}):
                optimizer.state[p]["step"] = torch.tensor(float(count))

    @rule(place=PLACES)
    def replace_one_parameter(self, place: int) -> None:
        for optimizer in self._both():
            spots = [(g, i) for g in optimizer.param_groups for i in range(len(g["params"]))]
            group, i = spots[place % len(spots)]
            old = group["params"][i]
            group["params"][i] = torch.nn.Parameter(old.detach().clone(), old.requires_grad)
            optimizer.state.pop(old, None)

    @rule(place=PLACES)
    def replace_ones_data(self, place: int) -> None:
        """The layout stays: with a buffer of other strides, stock's bits are no reference."""
        p, q = self._pair(place)
        value = self._value(p.shape, p.dtype)
        for x in (p, q):
            x.grad = None
            x.data = torch.empty_like(x).detach().copy_(value)

    @rule(place=PLACES, dtype=st.sampled_from(list(cases.DTYPES.values())))
    def change_ones_dtype(self, place: int, dtype: torch.dtype) -> None:
        """Between fp32 and fp64 SGD's buffer stays as it is, as after `model.double()`.

        With bf16 or fp16 it is cast too: stock's rounding of such a mixture is no reference, and
        its Adam refuses every mixture.
        """
        for optimizer, p in zip(self._both(), self._pair(place), strict=True):
            narrow = {p.dtype, dtype} & set(cases.NARROW_DTYPES.values())
            casts = bool(narrow) or self.family is not cases.SGD
            p.grad = None
            p.data = p.data.to(dtype)
            for name in self.family.state.buffers:
                buffer = cases.buffer_of(optimizer, p, name)
                if buffer is not None and (casts or buffer.dtype not in cases.WIDE_DTYPES.values()):
                    optimizer.state[p][name] = buffer.to(dtype)

    @precondition(lambda self: not self.optimizer.step_in_backward)
    @rule(
        mask=st.integers(1, 2**16 - 1),
        bad=st.sampled_from((None, math.inf, math.nan)),
        place=PLACES,
    )
    def step_with_a_grad_scaler(self, mask: int, bad: float | None, place: int) -> None:
        """Except with fp16 gradients, which GradScaler refuses to unscale for the reference."""
        self._backward(mask, self.scale)
        pairs = [(p, q) for p, q in self._pairs() if p.grad is not None and p.numel()]
        if bad is not None and pairs:
            grad = pairs[place % len(pairs)][0].grad
            grad[(0,) * grad.dim()] = bad
        overflow = bad is not None and bool(pairs)
        if not pairs:
            return
        # A zero scaled is a zero; anything else scaled by 8 stays finite in every dtype.
        scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
        scaler.scale(torch.ones(()))
        scaler.step(self.optimizer)
        type(self).steps += 1
        if overflow:
            self.reference.settle()
            for p, q in self._pairs():
                p.grad = q.grad = None
        else:
            self.reference.step()

    @rule(bucket=BUCKETS)
    def save_and_load(self, bucket: float | None) -> None:
        """Through torch.save into a new stock-shaped reference, and the reference's into ours."""
        loaded = []
        for optimizer in self._both():
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            loaded.append(torch.load(file, weights_only=True))
        empty = [
            [{"params": list(group["params"])} for group in optimizer.param_groups]
            for optimizer in self._both()
        ]
        self.optimizer.close()
        self.optimizer = self.family.ours(empty[0], **self._in_backward(bucket))
        self.reference = REFERENCES[self.name](empty[1])
        self.optimizer.load_state_dict(loaded[1])
        self.reference.load_state_dict(loaded[0])

    @rule(how=st.sampled_from(("deepcopy", "pickle")))
    def remake(self, how: str) -> None:
        """Views of one storage are separated by deepcopy and pickle, in both alike."""
        for p in (*self._params(self.optimizer), *self._params(self.reference)):
            p.grad = None
        if how == "deepcopy":
            self.optimizer = copy.deepcopy(self.optimizer)
            self.reference = copy.deepcopy(self.reference)
        else:
            self.optimizer = pickle.loads(pickle.dumps(self.optimizer))
            self.reference = pickle.loads(pickle.dumps(self.reference))

    @rule(place=PLACES, kind=st.sampled_from(("shape", "not a tensor")))
    def a_refused_step_changes_nothing(self, place: int, kind: str) -> None:
        p, _ = self._pair(place)
        group = next(g for g in self.optimizer.param_groups if any(x is p for x in g["params"]))
        if not p.requires_grad or not self.family.buffers(group) or not p.numel():
            return
        name = self.family.state.buffers[0]
        had = p in self.optimizer.state
        kept = cases.buffer_of(self.optimizer, p, name)
        grad = p.grad
        if grad is None:
            p.grad = torch.zeros_like(p)
        self.optimizer.state[p][name] = torch.ones(2, 2, 77) if kind == "shape" else "x"
        before = cases.Snapshot(self.optimizer)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            self.optimizer.step()
        before.assert_unchanged()
        p.grad = grad
        self.optimizer.state[p][name] = kept
        if kept is None and had is False:
            del self.optimizer.state[p]

    @rule(place=PLACES)
    def a_hook_or_a_profiler_listens(self, place: int) -> None:
        heard: list[int] = []
        handle = self.optimizer.register_step_post_hook(lambda *_: heard.append(1))
        self._train(place)
        handle.remove()
        assert heard == [1]

    def teardown(self) -> None:
        self.optimizer = self.reference = None

    @invariant()
    def equals_stock(self) -> None:
        cases.assert_same_training(self.optimizer, self.reference)


@pytest.mark.parametrize(("name", "share"), [("SGD", 1.0), ("Adam", 0.2), ("AdamW", 0.6)])
def test_any_interleaving_equals_stock(name: str, share: float) -> None:
    """`share` of the wanted steps: the optimizers have most of the code in common."""
    wanted = int(WANTED_STEPS * share)
    machine = type(f"{name}Training", (Training,), {"name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, wanted // 7),
            stateful_step_count=RULES_PER_EXAMPLE,
            deadline=None,
            derandomize=not IS_LONG,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert machine.steps >= wanted, f"only {machine.steps} optimizer steps were taken"
