"""The memory suite: the four ways to freeze, freezing in the middle of a run, blocks by turns."""

from __future__ import annotations

import copy
import gc
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from contestants import Hyper
from measure import Summary, Turn, held_bytes, interleave, ratio, summarise, wait_for
from memory_check import Agreement, Journal
from memory_contestants import (
    CHANGING,
    OURS,
    WITH_MOMENTUM,
    WITHOUT_MOMENTUM,
    MemoryContestant,
    Trainer,
    timed,
)
from memory_measure import (
    GradientProbe,
    Timeline,
    in_child,
    mark,
    peak_rss,
    record,
    require_memory,
    trim,
)
from models import MODELS, ModelSpec, freeze_share
from suites import Setting
from torch import Tensor, nn

MEMORY_MODELS = ("resnet50", "vit_b_16", "bert_base", "decoder_1b")
QUICK_MEMORY_MODELS = ("mobilenet_v3_small",)

_PHASES = ("zero_grad", "forward", "backward", "step")
_COPIES = 6
"""Of the weights: the first ones and those trained, gradients, momentum, temporaries, and what
malloc loses in gaps."""
_ITERATIONS = 2
_WRITTEN_OF_LARGE = 4
"""Of a model that is large for a CPU, one in so many parameters is held against stock."""
_SHARED = ("torchvision", "transformers")
"""Packages of models, that children need not load again; a contestant's is part of its cost."""
_PERIODS = 4
"""Before the first block's turn comes again."""
_PER_PERIOD = 2


@dataclass(frozen=True)
class Case:
    """Which parameters train, and which the optimizer is given."""

    key: str
    title: str
    freezes: bool
    """Whether ``requires_grad`` is False for the part that does not train."""
    parted: bool
    """Whether some part does not train."""
    filtered: bool
    """Whether the optimizer is given what trains alone."""
    momentum: float = 0.9

    @property
    def hyper(self) -> Hyper:
        """A learning rate at which two steps move the weights visibly."""
        return Hyper(lr=0.05, momentum=self.momentum, weight_decay=1e-4)

    @property
    def contestants(self) -> tuple[MemoryContestant, ...]:
        """Who can train so."""
        return WITH_MOMENTUM if self.momentum else WITHOUT_MOMENTUM

    def prepare(self, model: nn.Module, spec: ModelSpec, share: float | str) -> list[nn.Parameter]:
        """Set ``requires_grad`` and return what the optimizer is to be given."""
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
    Case("1, plain", "case 1 without momentum: nothing frozen", False, False, False, 0.0),
)
_ON_LARGE = ("1", "4")
"""The cases of a model that is large for a CPU."""
_TIMED_CASES = ("1", "2")
_RSS_CASES = ("1", "4")


@dataclass(frozen=True)
class Figures:
    """What one contestant's second iteration takes."""

    gradients: int
    """The most bytes of gradients alive at once."""
    state: int
    temporaries: int
    """The most that step() takes for its own duration."""
    peak: int
    """The most that is held above the model at any time of the iteration."""
    bucket: int
    """Of gradients, as far as they are collected before they are applied in backward."""
    curve: list[tuple[float, int]]
    """The same over the iteration: forward from 0 to 1, backward to 2, step to 3."""
    rss: int | None = None
    """The most that a process had resident that did nothing but two iterations."""
    rss_before: int | None = None
    """What it had when the model was built."""


@dataclass
class CaseRow:
    """One contestant."""

    contestant: MemoryContestant
    agreement: Agreement
    figures: Figures


@dataclass(kw_only=True)
class Compared:
    """What all comparisons of one model have."""

    model: str
    title: str
    device: str
    unavailable: dict[str, str] = field(default_factory=dict)
    """Contestants that cannot run here, and why."""
    unequal: dict[str, float] = field(default_factory=dict)
    """Contestants that computed something else than stock, and how far off; not measured."""


@dataclass(kw_only=True)
class CaseOutcome(Compared):
    """All contestants on one model in one of the four cases."""

    case: str
    momentum: float
    parameters: int
    """Bytes of all parameters, as those below."""
    trained: int
    """Of the parameters that train, which is also what their gradients take."""
    largest: int
    """Of the largest parameter that trains."""
    rows: list[CaseRow] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What is kept between two iterations."""

    frozen_gradients: int
    """On the parameters that are frozen, or are about to be."""
    frozen_momentum: int
    state: int


@dataclass
class FreezeRow:
    """One contestant around a freeze in the middle of its run."""

    contestant: MemoryContestant
    agreement: Agreement
    before: Held
    after: Held
    """After one iteration."""
    peak_before: int
    peak_after: int
    """In the second iteration after the freeze."""


@dataclass(kw_only=True)
class FreezeOutcome(Compared):
    """All contestants on one model that is frozen in part while it trains."""

    rows: list[FreezeRow] = field(default_factory=list)


@dataclass
class RotationRow:
    """One contestant over the periods."""

    contestant: MemoryContestant
    agreement: Agreement
    state: list[int]
    """Bytes after each period."""
    stale: list[int]
    """Gradient bytes on frozen parameters after each period."""
    peaks: list[int]

    @property
    def peak(self) -> int:
        """Over all periods."""
        return max(self.peaks)


@dataclass(kw_only=True)
class RotationOutcome(Compared):
    """All contestants on one model of which one block trains at a time."""

    rows: list[RotationRow] = field(default_factory=list)


@dataclass(kw_only=True)
class TimeOutcome(Compared):
    """Nanoseconds of whole iterations, in interleaved turns."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def time(self, key: str) -> Summary:
        """Of one contestant."""
        return summarise(self.samples[key])

    def times_ordinary(self, key: str) -> Summary:
        """How many times as long as FrozenAwareSGD with an ordinary step."""
        return ratio(self.samples[key], self.samples[OURS.key])


MemoryOutcome = CaseOutcome | FreezeOutcome | RotationOutcome | TimeOutcome


class Subject:
    """A model built once, of which every contestant gets a copy of its own.

    A copy, since some contestants leave hooks behind that cannot be taken off.
    """

    def __init__(self, key: str, device: torch.device) -> None:
        self.key, self.device = key, device
        self.spec = MODELS[key]
        self.written = written(key, device)
        torch.manual_seed(0)
        self.model = self.spec.build().to(device).train()

    def copy(self) -> tuple[nn.Module, Callable[[], Tensor]]:
        """The model with its first weights, and the loss of the same batch for everyone."""
        trim()
        model = copy.deepcopy(self.model)
        torch.manual_seed(1)
        return model, self.spec.make_loss(model, self.device)


def written(key: str, device: torch.device) -> int:
    """One in how many parameters is held against stock."""
    return _WRITTEN_OF_LARGE if MODELS[key].large and device.type == "cpu" else 1


def size_of_model(key: str) -> int:
    """Bytes of a model's parameters, without making them.

    Raises:
        models.MissingPackageError: the package the model comes from is not installed.
    """
    with torch.device("meta"):
        return sum(p.nbytes for p in MODELS[key].build().parameters())


def require_memory_for(key: str, device: torch.device) -> None:
    """Check that package and memory for a model are there.

    Raises:
        models.MissingPackageError: the package the model comes from is not installed.
        models.NotEnoughMemoryError: the device has too little memory to give.
    """
    copies = _COPIES + _ITERATIONS / written(key, device)
    require_memory(int(copies * size_of_model(key)) + 2 * 10**9, device, key)


def iterate(
    trainer: Trainer,
    loss: Callable[[], Tensor],
    index: int,
    device: torch.device,
    journal: Journal | None = None,
) -> int | None:
    """One training iteration, marked on the timeline; the same dropout for everyone.

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


def _peak(timeline: Timeline, index: int, allocated: int | None, base: int) -> int:
    """Above the model; on a GPU as its allocator counts."""
    if allocated is not None:
        return allocated - base
    return timeline.peak(*(f"{index} {phase}" for phase in _PHASES))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def curve(timeline: Timeline, index: int, points: int = 80) -> list[tuple[float, int]]:
    """The levels of one iteration, each phase one unit long, thinned out but for the peaks."""
    found: list[tuple[float, int]] = []
    for place, phase in enumerate(("forward", "backward", "step")):
        levels = timeline.inside(f"{index} {phase}")
        width = max(1, -(-len(levels) // points))
        parts = [levels[i : i + width] for i in range(0, len(levels), width)]
        found += [(round(place + i / len(parts), 3), max(part)) for i, part in enumerate(parts)]
        found.append((place + 1.0, levels[-1]))
    return found


def _title(subject: Subject, text: str) -> str:
    return f"{subject.spec.title}, {text}"


def _part(share: float | str) -> str:
    return "all but the head" if share == "head" else f"{float(share):g} %"


Found = TypeVar("Found")


@dataclass
class Trained(Generic[Found]):
    """A run that is over."""

    found: Found
    trainer: Trainer
    owned: Sequence[nn.Parameter]
    hyper: Hyper
    journal: Journal | None


def _judge(
    outcome: Compared,
    contestants: Iterable[MemoryContestant],
    subject: Subject,
    train: Callable[[MemoryContestant, bool], Trained[Found]],
) -> Iterator[tuple[MemoryContestant, Agreement, Found]]:
    """Let all train, and let through who agrees with stock.

    ``train`` takes a contestant and whether to write down its gradients. On a GPU that waits for
    every gradient, so the figures there are of another run than the check's.
    """
    start = list(subject.model.parameters())
    for contestant in contestants:
        try:
            trained = train(contestant, True)
            if trained.journal is None:
                raise ValueError(f"{contestant.label} trained without a journal")
            agreement = trained.journal.check(
                start, trained.owned, trained.trainer, contestant, trained.hyper
            )
            found = trained.found
            trained.trainer.close()
            del trained  # else its model lives through the next one's training
            if agreement.holds and subject.device.type == "cuda":
                trained = train(contestant, False)
                found = trained.found
                trained.trainer.close()
                del trained
        except (RuntimeError, NotImplementedError) as error:
            if contestant == OURS:
                raise
            outcome.unavailable[contestant.label] = _first_line(error)
            continue
        finally:
            if contestant.cyclic:
                gc.collect()
        if agreement.holds:
            yield contestant, agreement, found
        else:
            outcome.unequal[contestant.label] = agreement.gap


def run_case(subject: Subject, case: Case, share: float | str) -> CaseOutcome:
    """Let everyone train two iterations and measure the second one."""
    device = subject.device

    def train(contestant: MemoryContestant, write: bool) -> Trained[Figures]:
        model, loss = subject.copy()
        handed = case.prepare(model, subject.spec, share)
        probe = GradientProbe(model.parameters())
        journal = Journal(model, subject.written) if write else None
        base = _allocated(device)
        kept: list[Trainer] = []
        peaks: list[int | None] = []

        def run() -> None:
            trainer = contestant.make(model, handed, case.hyper)
            kept.append(trainer)
            for index in range(_ITERATIONS):
                probe.restart()
                peaks.append(iterate(trainer, loss, index, device, journal))

        timeline = record(run, device)
        (trainer,) = kept
        figures = Figures(
            gradients=probe.peak,
            state=held_bytes(trainer.state()),
            temporaries=timeline.temporaries("1 step"),
            peak=_peak(timeline, 1, peaks[1], base),
            bucket=trainer.bucket(),
            curve=curve(timeline, 1),
        )
        return Trained(figures, trainer, handed, case.hyper, journal)

    trained = [p for p in case.prepare(subject.model, subject.spec, share) if p.requires_grad]
    outcome = CaseOutcome(
        model=subject.key,
        case=case.key,
        title=_title(subject, case.title.format(_part(share))),
        device=device.type,
        momentum=case.momentum,
        parameters=held_bytes(subject.model.parameters()),
        trained=held_bytes(trained),
        largest=max(p.nbytes for p in trained),
    )
    judged = _judge(outcome, case.contestants, subject, train)
    outcome.rows = [CaseRow(*found) for found in judged]
    return outcome


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _train_for_rss(
    key: str, case_key: str, contestant_key: str, share: float | str
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
    trainer = contestant.make(model, handed, case.hyper)
    for index in range(_ITERATIONS):
        iterate(trainer, loss, index, cpu)
    return before, peak_rss()


def add_rss(outcome: CaseOutcome, share: float | str) -> None:
    """Let everyone train in a process of its own and note the most it had resident."""
    imports = [name for name in _SHARED if name in sys.modules]

    def train(row: CaseRow) -> tuple[int, int]:
        arguments = outcome.model, outcome.case, row.contestant.key, share
        found: tuple[int, int] = in_child(_train_for_rss, *arguments, imports=imports)
        return found

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for row, (before, peak) in zip(outcome.rows, pool.map(train, outcome.rows), strict=True):
            row.figures = replace(row.figures, rss=peak, rss_before=before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Count bytes on one thread: how many there are must not decide what a kernel puts aside.

    It is faster, too, where the machine has other work and threads wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_freeze(subject: Subject, share: float | str) -> FreezeOutcome:
    """Train all, freeze a part between two iterations, and train on."""
    device = subject.device
    outcome = FreezeOutcome(
        model=subject.key,
        title=_title(subject, f"{_part(share)} frozen in the middle of a run"),
        device=device.type,
    )

    def train(contestant: MemoryContestant, write: bool) -> Trained[tuple[Held, Held, int, int]]:
        model, loss = subject.copy()
        journal = Journal(model, subject.written) if write else None
        base = _allocated(device)
        freeze_share(model.named_parameters(), share, subject.spec.head)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        model.requires_grad_(True)
        parameters = list(model.parameters())
        kept: list[Trainer] = []
        held: list[Held] = []
        peaks: list[int | None] = []

        def look(trainer: Trainer) -> Held:
            return Held(
                frozen_gradients=held_bytes(p.grad for p in frozen),
                frozen_momentum=held_bytes(t for p in frozen for t in trainer.held(p)),
                state=held_bytes(trainer.state()),
            )

        def run() -> None:
            trainer = contestant.make(model, parameters, CASES[0].hyper)
            kept.append(trainer)
            for index in range(4):
                if index == 2:
                    held.append(look(trainer))
                    for p in frozen:
                        p.requires_grad_(False)
                    trainer.frozen_set_changed()
                    if journal:
                        journal.note_change()
                peaks.append(iterate(trainer, loss, index, device, journal))
                if index == 2:
                    held.append(look(trainer))

        timeline = record(run, device)
        before, after = (_peak(timeline, index, peaks[index], base) for index in (1, 3))
        found = held[0], held[1], before, after
        return Trained(found, kept[0], parameters, CASES[0].hyper, journal)

    outcome.rows = [
        FreezeRow(contestant, agreement, *found)
        for contestant, agreement, found in _judge(outcome, CHANGING, subject, train)
    ]
    return outcome


def blocks_by_turns(model: nn.Module, spec: ModelSpec) -> list[list[nn.Parameter]]:
    """The parameters of some blocks, spread over the depth of the model, and the first again."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        found = re.match(spec.blocks, name)
        if found:
            blocks.setdefault(found.group(), []).append(p)
    every = list(blocks.values())
    count = min(_PERIODS, len(every))
    places = [i * (len(every) - 1) // max(1, count - 1) for i in range(count)]
    return [every[place] for place in [*places, places[0]]]


def run_rotation(subject: Subject) -> RotationOutcome:
    """Train one block at a time, as LISA does, and nothing else.

    Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
    Model Fine-Tuning", 2024 (arXiv 2403.17919).
    """
    device = subject.device
    count = len(blocks_by_turns(subject.model, subject.spec))
    outcome = RotationOutcome(
        model=subject.key,
        title=_title(subject, f"one block at a time, {count} periods, the last as the first"),
        device=device.type,
    )

    def train(
        contestant: MemoryContestant, write: bool
    ) -> Trained[tuple[list[int], list[int], list[int]]]:
        model, loss = subject.copy()
        journal = Journal(model, subject.written) if write else None
        base = _allocated(device)
        parameters = list(model.parameters())
        blocks = blocks_by_turns(model, subject.spec)
        kept: list[Trainer] = []
        state: list[int] = []
        stale: list[int] = []
        allocated: list[int | None] = []

        def run() -> None:
            for period, block in enumerate(blocks):
                model.requires_grad_(False)
                for p in block:
                    p.requires_grad_(True)
                if period == 0:
                    kept.append(contestant.make(model, parameters, CASES[0].hyper))
                else:
                    kept[0].frozen_set_changed()
                    if journal:
                        journal.note_change()
                for turn in range(_PER_PERIOD):
                    index = period * _PER_PERIOD + turn
                    allocated.append(iterate(kept[0], loss, index, device, journal))
                state.append(held_bytes(kept[0].state()))
                stale.append(held_bytes(p.grad for p in parameters if not p.requires_grad))

        timeline = record(run, device)
        peaks = [_peak(timeline, i, allocated[i], base) for i in range(len(allocated))]
        by_period = [max(peaks[i : i + _PER_PERIOD]) for i in range(0, len(peaks), _PER_PERIOD)]
        found = state, stale, by_period
        return Trained(found, kept[0], parameters, CASES[0].hyper, journal)

    outcome.rows = [
        RotationRow(contestant, agreement, *found)
        for contestant, agreement, found in _judge(outcome, CHANGING, subject, train)
    ]
    return outcome


def run_times(subject: Subject, case: Case, share: float | str, setting: Setting) -> TimeOutcome:
    """Whole iterations in interleaved turns, each contestant on a copy of the model."""
    device = subject.device
    title = _title(subject, case.title.format(_part(share)))
    outcome = TimeOutcome(model=subject.key, title=title, device=device.type)

    trainers: list[Trainer] = []

    def make(contestant: MemoryContestant) -> Turn:
        model, loss = subject.copy()
        handed = case.prepare(model, subject.spec, share)
        trainer = contestant.make(model, handed, case.hyper)
        trainers.append(trainer)

        def turn() -> float:
            wait_for(device)
            begin = time.perf_counter_ns()
            trainer.zero_grad()
            trainer.backward(loss())
            trainer.step()
            wait_for(device)
            return time.perf_counter_ns() - begin

        turn()
        return turn

    turns: dict[str, Turn] = {}
    for contestant in timed(device.type):
        try:
            turns[contestant.key] = make(contestant)
        except RuntimeError as error:
            if contestant == OURS:
                raise
            outcome.unavailable[contestant.label] = _first_line(error)
        else:
            outcome.labels[contestant.key] = contestant.label
    outcome.samples = interleave(turns, setting.budget, setting.rng)
    for trainer in trainers:
        trainer.close()
    return outcome


def run_memory(
    keys: Sequence[str], share: float | str, setting: Setting, *, quick: bool
) -> Iterator[MemoryOutcome]:
    """Everything of the suite, model by model.

    Raises:
        models.MissingPackageError: the package a model comes from is not installed.
    """
    device = setting.device
    for key in keys:
        subject = Subject(key, device)
        large = subject.written > 1
        for case in CASES:
            if large and case.key not in _ON_LARGE:
                continue
            setting.progress(f"{subject.spec.title}: {case.title.partition(':')[0]}")
            with _one_thread():
                outcome = run_case(subject, case, share)
            if device.type == "cpu" and case.key in _RSS_CASES and not (large or quick):
                add_rss(outcome, share)
            yield outcome
        if large:
            continue
        setting.progress(f"{subject.spec.title}: freezing")
        with _one_thread():
            freeze = run_freeze(subject, share)
        yield freeze
        setting.progress(f"{subject.spec.title}: blocks by turns")
        with _one_thread():
            rotation = run_rotation(subject)
        yield rotation
        for case in CASES:
            if case.key in _TIMED_CASES:
                setting.progress(f"{subject.spec.title}: times")
                yield run_times(subject, case, share, setting)


def parts(keys: Iterable[str], device: torch.device) -> int:
    """How often the suite tells its progress."""
    found = 0
    for key in keys:
        large = written(key, device) > 1
        found += len(_ON_LARGE) if large else len(CASES) + 2 + len(_TIMED_CASES)
    return found
