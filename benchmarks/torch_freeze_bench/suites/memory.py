"""The suite `memory`: the four ways to freeze, freezing during training, blocks in rotation."""

from __future__ import annotations

import copy
import functools
import gc
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..contestants import CHANGING, FAMILIES, WITH_STATE, WITHOUT_STATE, Contestant, Trainer, timed
from ..equality import Equality, Journal
from ..memory import (
    GradientProbe,
    held_bytes,
    in_child,
    mark,
    peak_rss,
    record,
    require_memory,
    trim,
)
from ..records import FACTS, Measured
from ..tables import megabytes
from ..timing import Turn, interleave, run_turn, wait_for
from ..workloads import HEAD, MODELS, Hyper, Loss, ModelSpec, freeze_share
from .base import Setting

MEMORY_MODELS = ("resnet50", "vit_b_16", "bert_base", "decoder_1b")
QUICK_MEMORY_MODELS = ("mobilenet_v3_small",)

_PHASES = ("zero_grad", "forward", "backward", "step")
_COPIES = 6
"""Of the weights: the initial and the trained ones, gradients, momentum, temporaries, and what
malloc loses in gaps."""
_PER_PERIOD = 2
"""Iterations with the same frozen set; the second one is steady."""
_PERIODS = 4
"""Blocks that are trained in rotation, before it is the first one's turn again."""
_WRITTEN_OF_LARGE = 4
"""Of a model that is too large for a CPU to check, one in so many parameters is checked."""
_SHARED = ("torchvision", "transformers")
"""Packages of models, which children need not load again; a contestant's is part of its cost."""


@dataclass(frozen=True)
class Case:
    """Which parameters train, and which the optimizer is given."""

    key: str
    title: str
    freezes: bool
    """Whether ``requires_grad`` is False for the part that does not train."""
    parted: bool
    """Whether a part does not train."""
    filtered: bool
    """Whether the optimizer is given only what trains."""
    momentum: float = 0.9

    @property
    def hyper(self) -> Hyper:
        """A learning rate at which two steps move the weights visibly."""
        return Hyper(lr=0.05, momentum=self.momentum, weight_decay=1e-4)

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """Everyone who can train in this way."""
        return WITH_STATE if self.momentum else WITHOUT_STATE

    def prepare(self, model: nn.Module, spec: ModelSpec, share: float | str) -> list[nn.Parameter]:
        """Set ``requires_grad`` and return what the optimizer is given."""
        freeze_share(model.named_parameters(), share if self.parted else 0, spec.head)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not self.freezes:
            model.requires_grad_(True)
        return trained if self.filtered else list(model.parameters())


CASES = (
    Case("1", "case 1: nothing frozen", False, False, False),
    Case("2", "case 2: {} frozen, all parameters handed over", True, True, False),
    Case("3", "case 3: {} not handed over, but not frozen either", False, True, True),
    Case("4", "case 4: {} frozen, the rest handed over", True, True, True),
    Case("1 plain", "case 1 without momentum: nothing frozen", False, False, False, 0.0),
)
_ON_LARGE = _RSS_CASES = ("1", "4")
"""The cases of a model that is large for a CPU; those whose processes' peaks are taken."""
_TIMED_CASES = ("1", "2")


@dataclass(frozen=True)
class Plan:
    """A training run: who trains in each of its periods. Parameters are places in the model."""

    key: str
    title: str
    periods: Sequence[frozenset[int]]
    """The parameters that train."""
    handed: Sequence[int]
    """The parameters that the optimizer is given."""
    contestants: Sequence[Contestant]
    hyper: Hyper
    to_freeze: frozenset[int] = frozenset()
    """Parameters that are watched like frozen ones before they are frozen."""


class Subject:
    """A model built once, of which every contestant gets a copy of its own.

    A copy, because some contestants leave hooks behind that cannot be removed.
    """

    def __init__(self, key: str, device: torch.device) -> None:
        self.key, self.device = key, device
        self.spec = MODELS[key]
        self.written = written(key, device)
        torch.manual_seed(0)
        self.model = self.spec.build().to(device).train()

    def copy(self) -> tuple[nn.Module, Loss]:
        """The model with its initial weights, and the loss of the same batch for everyone."""
        trim()
        model = copy.deepcopy(self.model)
        torch.manual_seed(1)
        return model, self.spec.make_loss(model, self.device)

    def case(self, case: Case, share: float | str) -> Plan:
        """One of the four ways to freeze."""
        handed = {id(p) for p in case.prepare(self.model, self.spec, share)}
        parameters = list(self.model.parameters())
        trains = frozenset(i for i, p in enumerate(parameters) if p.requires_grad)
        places = [i for i, p in enumerate(parameters) if id(p) in handed]
        title = case.title.format(_part(share))
        return Plan(case.key, title, [trains], places, case.contestants, case.hyper)

    def midway(self, share: float | str) -> Plan:
        """Train everything, freeze a part between two iterations, and train on."""
        freeze_share(self.model.named_parameters(), share, self.spec.head)
        trains = [p.requires_grad for p in self.model.parameters()]
        every = frozenset(range(len(trains)))
        kept = frozenset(i for i in every if trains[i])
        title = f"{_part(share)} frozen in the middle of a run"
        hyper = CASES[0].hyper
        return Plan("midway", title, [every, kept], sorted(every), CHANGING, hyper, every - kept)

    def rotation(self) -> Plan:
        """Train one block at a time, as LISA does.

        Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
        Model Fine-Tuning", 2024 (arXiv 2403.17919).
        """
        names = [name for name, _ in self.model.named_parameters()]
        blocks: dict[str, set[int]] = {}
        for place, name in enumerate(names):
            if found := re.match(self.spec.blocks, name):
                blocks.setdefault(found.group(), set()).add(place)
        every = [frozenset(block) for block in blocks.values()]
        count = min(_PERIODS, len(every))
        chosen = [every[i * (len(every) - 1) // max(1, count - 1)] for i in range(count)]
        periods = [*chosen, chosen[0]]
        title = f"one block at a time, {len(periods)} periods, the last as the first"
        handed = range(len(names))
        return Plan("rotation", title, periods, handed, CHANGING, CASES[0].hyper)


def _part(share: float | str) -> str:
    return "all but the head" if share == HEAD else f"{float(share):g} %"


def written(key: str, device: torch.device) -> int:
    """One in how many parameters is compared with stock."""
    return _WRITTEN_OF_LARGE if MODELS[key].large and device.type == "cpu" else 1


def size_of_model(key: str) -> int:
    """Bytes of a model's parameters, without allocating them."""
    with torch.device("meta"):
        return sum(p.nbytes for p in MODELS[key].build().parameters())


def require_memory_for(key: str, device: torch.device) -> None:
    """Check that package and memory for a model are there.

    Raises:
        workloads.MissingPackageError: the package the model comes from is not installed.
        memory.NotEnoughMemoryError: the device has too little memory to give.
    """
    copies = _COPIES + _PER_PERIOD / written(key, device)
    require_memory(int(copies * size_of_model(key)) + 2 * 10**9, device, key)


def iterate(
    trainer: Trainer, loss: Loss, index: int, device: torch.device, journal: Journal | None = None
) -> int | None:
    """One training iteration, marked on the timeline; dropout is the same for everyone.

    Returns:
        The most that was allocated on a GPU during it.
    """
    torch.manual_seed(index)
    if journal:
        journal.begin_iteration()
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
    with mark(f"{index} zero_grad"):
        trainer.zero_grad()
    with mark(f"{index} forward"):
        value = loss()
    with mark(f"{index} backward"):
        trainer.backward(value)
        del value
    with mark(f"{index} step"):
        trainer.step()
        wait_for(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


Figures = Mapping[str, Sequence[float]]


def train(
    subject: Subject, plan: Plan, contestant: Contestant, *, write: bool
) -> tuple[Figures, Equality | None]:
    """Train a copy of the model and measure every iteration.

    Returns:
        By measure one value per iteration. ``gradients``: the most bytes of gradients alive at
        once. ``state``: held after it. ``frozen gradients`` and ``frozen state``: held after it for
        frozen parameters. ``temporaries``: the most that step() takes for its own duration.
        ``peak``: the most held above the model at any time. Once ``bucket``: gradients that are
        collected before they are applied in backward. And with ``write``, whether stock agrees.
    """
    device = subject.device
    model, loss = subject.copy()
    parameters = list(model.parameters())
    probe = GradientProbe(parameters)
    journal = Journal(model, subject.written) if write else None
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    handed = [parameters[place] for place in plan.handed]
    kept: list[Trainer] = []
    allocated: list[int | None] = []
    found: dict[str, list[float]] = defaultdict(list)

    def run() -> None:
        for number, trains in enumerate(plan.periods):
            for place, p in enumerate(parameters):
                p.requires_grad_(place in trains)
            if number == 0:
                kept.append(contestant.build([handed], plan.hyper, model))
            else:
                kept[0].frozen_set_changed()
                if journal:
                    journal.note_change()
            (trainer,) = kept
            frozen = [p for i, p in enumerate(parameters) if i in plan.to_freeze or i not in trains]
            for _ in range(_PER_PERIOD):
                probe.restart()
                allocated.append(iterate(trainer, loss, len(allocated), device, journal))
                found["gradients"].append(probe.peak)
                found["state"].append(held_bytes(trainer.state()))
                if len(plan.periods) > 1:
                    states = (t for p in frozen for t in trainer.held(p).values())
                    found["frozen gradients"].append(held_bytes(p.grad for p in frozen))
                    found["frozen state"].append(held_bytes(states))

    timeline = record(run, device)
    (trainer,) = kept
    for index, most in enumerate(allocated):
        found["temporaries"].append(timeline.temporaries(f"{index} step"))
        peak = timeline.peak(*(f"{index} {phase}" for phase in _PHASES))
        found["peak"].append(peak if most is None else most - base)  # on a GPU the allocator's own
    found["bucket"].append(trainer.bucket)
    start, equality = list(subject.model.parameters()), None
    if journal:
        equality = journal.check(start, handed, trainer, contestant, plan.hyper)
    trainer.close()
    return found, equality


def run_plan(subject: Subject, plan: Plan, setting: Setting) -> Measured:
    """Let everyone train, and measure those who agree with stock.

    On a GPU the check waits for every gradient, so there the figures come from a second run.
    """
    found = _described(subject, plan)
    for known in plan.contestants:
        contestant = replace(known, family=setting.family)
        try:
            figures, equality = train(subject, plan, contestant, write=True)
            assert equality is not None  # with a journal it is there
            if equality.holds and subject.device.type == "cuda":
                figures, _ = train(subject, plan, contestant, write=False)
        except (RuntimeError, NotImplementedError) as error:
            if contestant.key == "ours":
                raise
            found.unavailable[contestant.label] = _first_line(error)
            continue
        finally:
            if contestant.cyclic:
                gc.collect()
        found.compare(contestant.key, equality.gap, equality.tolerance)
        if equality.holds:
            found.add(contestant.key, **figures)
    return found


def _described(subject: Subject, plan: Plan) -> Measured:
    parameters = list(subject.model.parameters())
    handed, trains = set(plan.handed), plan.periods[0]
    trained = [p.nbytes for i, p in enumerate(parameters) if i in handed and i in trains]
    every, sizes = held_bytes(parameters), (sum(trained), max(trained))
    details = ""
    if len(plan.periods) == 1:
        details = (
            f"; parameters {megabytes(every)} MB, of which {megabytes(sizes[0])} train, the "
            f"largest {megabytes(sizes[1])}; momentum {plan.hyper.momentum:g}"
        )
    title = f"{subject.spec.title}, {plan.title}"
    found = Measured("memory", f"{subject.key}/{plan.key}", title, details)
    found.add(FACTS, parameters=every, trained=sizes[0], largest=sizes[1])
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _train_for_rss(
    key: str, case_key: str, contestant_key: str, share: float | str, family: str
) -> tuple[int, int]:
    """Alone in a process: resident bytes with the model built, and at most in two iterations."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    case = next(case for case in CASES if case.key == case_key)
    contestant = next(c for c in case.contestants if c.key == contestant_key)
    spec = MODELS[key]
    model = spec.build().train()
    loss = spec.make_loss(model, cpu)
    handed = case.prepare(model, spec, share)
    before = peak_rss()
    trainer = replace(contestant, family=FAMILIES[family]).build([handed], case.hyper, model)
    for index in range(_PER_PERIOD):
        iterate(trainer, loss, index, cpu)
    return before, peak_rss()


def add_rss(found: Measured, share: float | str, setting: Setting) -> None:
    """Let everyone train in a process of its own and record the most it had resident."""
    imports = [name for name in _SHARED if name in sys.modules]
    model, case = found.key.split("/")
    everyone = [key for key in found.contestants if found.of(key, "peak")]

    def measure(key: str) -> tuple[int, int]:
        given = (model, case, key, share, setting.family.key)
        taken: tuple[int, int] = in_child(_train_for_rss, *given, imports=imports)
        return taken

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for key, (before, peak) in zip(everyone, pool.map(measure, everyone), strict=True):
            found.add(key, rss=peak, rss_before=before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Count bytes on one thread, because a kernel's scratch memory may depend on their number.

    This is faster, too, on a machine with other work, where threads wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_times(subject: Subject, case: Case, share: float | str, setting: Setting) -> Measured:
    """Whole iterations in interleaved turns, each contestant on a copy of the model."""
    device = subject.device
    title = f"{subject.spec.title}, {case.title.format(_part(share))}"
    found = Measured("memory", f"{subject.key}/{case.key} time", title, ": time")
    trainers: list[Trainer] = []

    def make(contestant: Contestant) -> Turn:
        model, loss = subject.copy()
        handed = case.prepare(model, subject.spec, share)
        trainer = contestant.build([handed], case.hyper, model)
        trainers.append(trainer)

        def iteration() -> None:
            trainer.zero_grad()
            trainer.backward(loss())
            trainer.step()

        return run_turn(iteration, device)

    turns: dict[str, Turn] = {}
    for known in timed(device.type):
        contestant = replace(known, family=setting.family)
        try:
            turns[contestant.key] = make(contestant)
        except RuntimeError as error:
            if contestant.key == "ours":
                raise
            found.unavailable[contestant.label] = _first_line(error)
    for key, taken in interleave(turns, setting.budget, setting.rng).items():
        found.add(key, iteration=taken)
    for trainer in trainers:
        trainer.close()
    return found


def parts(keys: Sequence[str], device: torch.device) -> int:
    """One for each table."""
    usual = len(CASES) + 2 + len(_TIMED_CASES)
    return sum(len(_ON_LARGE) if written(key, device) > 1 else usual for key in keys)


def run(
    keys: Sequence[str], share: float | str, quick: bool, setting: Setting
) -> Iterator[Measured]:
    """Every case, freezing midway, blocks in rotation, and times, model by model."""
    for key in keys:
        subject = Subject(key, setting.device)
        large, title = subject.written > 1, subject.spec.title
        cases = [case for case in CASES if not large or case.key in _ON_LARGE]
        plans: dict[str, Callable[[], Plan]] = {}
        for case in cases:
            name = case.title.partition(":")[0]
            plans[name] = functools.partial(subject.case, case, share)
        if not large:
            plans["freezing"] = functools.partial(subject.midway, share)
            plans["blocks in rotation"] = subject.rotation
        for name, make in plans.items():
            setting.progress(f"{title}: {name}")
            plan = make()
            with _one_thread():
                found = run_plan(subject, plan, setting)
            on_cpu = setting.device.type == "cpu"
            if on_cpu and plan.key in _RSS_CASES and not (large or quick):
                add_rss(found, share, setting)
            yield found
        for case in CASES:
            if case.key in _TIMED_CASES and not large:
                setting.progress(f"{title}: times")
                yield run_times(subject, case, share, setting)
