"""The suites of workloads, and what is measured on each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from contestants import OURS, Contestant, Entry, Kind, select
from measure import (
    FLUSHED_BYTES,
    WALKED_BYTES,
    Budget,
    Equality,
    Memory,
    Pass,
    PassStepper,
    Summary,
    Turn,
    check_equality,
    cold_turn,
    device_turn,
    interleave,
    iteration_turn,
    memory,
    ratio,
    reference_passes,
    reference_result,
    summarise,
    warm_turn,
)
from models import (
    LoadedModel,
    Workload,
    many_groups,
    mostly_frozen,
    tiny_trainable,
)

MEASURES = ("warm", "cold", "device", "iteration")
"""Host time of step() with warm and with cold caches, GPU time of it, and a whole iteration."""
_BESIDE = ("warm", "device")
"""Those that are taken of a like workload, too."""


@dataclass(frozen=True)
class Setting:
    """What holds for a whole run of the script."""

    device: torch.device
    budget: Budget
    compiled: bool
    rng: random.Random
    progress: Callable[[str], object]
    """Called with a few words when one part of a workload begins."""
    others: Sequence[Kind] = ()
    """Other packages' SGD that is to be measured, too."""
    computes: bool = True
    """False where kernels do nothing: then nobody's result is looked at, nor the GPU's time."""

    def select(self, *, any_frozen: bool) -> list[Contestant]:
        """The contestants for one workload."""
        return select(any_frozen=any_frozen, compiled=self.compiled, others=self.others)


@dataclass
class Row:
    """One contestant's samples on one workload; a measure that was not taken has none."""

    contestant: Contestant
    equality: Equality | None
    samples: dict[str, list[float]] = field(default_factory=dict)
    memory: Memory | None = None

    def time(self, measure: str) -> Summary | None:
        """Nanoseconds."""
        taken = self.samples.get(measure)
        return summarise(taken) if taken else None


@dataclass
class Outcome:
    """All contestants on one workload."""

    suite: str
    key: str
    title: str
    device: str
    tensors: int
    frozen_tensors: int
    elements: int
    trainable_elements: int
    frozen_percent: float
    step_bytes: int
    momentum: float
    weight_decay: float
    batch: str
    rows: list[Row] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Contestants that cannot be run on it, and what they said."""
    passes: dict[str, tuple[int, list[float]]] = field(default_factory=dict)
    """Bytes and samples of the reference passes."""
    beside: dict[str, list[float]] = field(default_factory=dict)
    """FrozenAwareSGD's samples on a like workload without what makes this one special, by measure,
    in the same rounds."""

    def row(self, key: str) -> Row | None:
        """The row of a contestant, e.g. ``"filter/fused"``; None if it did not run."""
        return next((row for row in self.rows if row.contestant.key == key), None)

    @property
    def ours(self) -> Row:
        """FrozenAwareSGD's row."""
        return next(row for row in self.rows if row.contestant == OURS)

    def times_ours(self, row: Row, measure: str) -> Summary | None:
        """How many times as long as FrozenAwareSGD this contestant takes."""
        taken, reference = row.samples.get(measure), self.ours.samples.get(measure)
        return ratio(taken, reference) if taken and reference else None

    def stock(self, kind: str) -> Row | None:
        """Stock of one kind on the trainable parameters: filtered, if anything is frozen."""
        return self.row(f"filter/{kind}") or self.row(f"all/{kind}")

    def times_beside(self, measure: str) -> Summary | None:
        """How many times as long FrozenAwareSGD takes here as on the like workload."""
        taken, reference = self.ours.samples.get(measure), self.beside.get(measure)
        return ratio(taken, reference) if taken and reference else None

    @property
    def pass_name(self) -> str:
        """The pass that is held to be the limit of this device's memory."""
        return "copy" if self.device == "cuda" else "read-modify-write"

    @property
    def pass_measure(self) -> str:
        """What the passes were timed beside."""
        return "device" if self.device == "cuda" else "warm"

    def share_of_pass(self, row: Row) -> Summary | None:
        """The bytes a second an update moves, over those of the reference pass."""
        taken, reference = row.samples.get(self.pass_measure), self.passes.get(self.pass_name)
        if not taken or reference is None:
            return None
        size, times = reference
        share = ratio(times, taken)
        scale = self.step_bytes / size
        return Summary(share.median * scale, share.low * scale, share.high * scale)


def fastest_other(outcome: Outcome, measure: str) -> tuple[Row, Summary] | None:
    """Who of the others has the least median, and its times over FrozenAwareSGD's."""
    compared = [
        (row, times)
        for row in outcome.rows
        if row.contestant != OURS and (times := outcome.times_ours(row, measure)) is not None
    ]
    return min(compared, key=lambda pair: pair[1].median) if compared else None


def run_workload(
    suite: str,
    workload: Workload,
    setting: Setting,
    measures: Sequence[str],
    *,
    beside: Workload | None = None,
) -> Outcome:
    """Check that everyone computes the same, then measure everyone in interleaved turns.

    All contestants step the same parameters with the same gradients, each with a momentum of its
    own, so that none has the better place in memory.

    Args:
        suite: the suite's name, for the report.
        workload: what is stepped.
        setting: device, time budget and the like.
        measures: which of ``MEASURES`` to take. ``"device"`` is skipped on a CPU, which has no time
            of its own beside the host's.
        beside: the same without what makes it special, such as the trainable parameters without
            the frozen ones; FrozenAwareSGD is timed on these too, in the same rounds.
    """
    parameters = workload.parameters
    outcome = Outcome(
        suite=suite,
        key=workload.key,
        title=workload.title,
        device=setting.device.type,
        tensors=len(parameters),
        frozen_tensors=len(parameters) - len(workload.trainable),
        elements=sum(p.numel() for p in parameters),
        trainable_elements=sum(p.numel() for p in workload.trainable),
        frozen_percent=workload.frozen_percent,
        step_bytes=workload.step_bytes,
        momentum=workload.hyper.momentum,
        weight_decay=workload.hyper.weight_decay,
        batch=workload.batch,
    )
    setting.progress(f"{workload.title}: equality")
    entries = _admit(outcome, workload, setting)
    if "iteration" in measures:
        setting.progress(f"{workload.title}: iterations")
        _measure_iterations(outcome, workload, entries, setting)
    setting.progress(f"{workload.title}: steps")
    workload.fill_gradients()
    _measure_steps(outcome, workload, entries, setting, measures, beside)
    return outcome


def _admit(outcome: Outcome, workload: Workload, setting: Setting) -> list[Entry]:
    workload.fill_gradients()
    expected = reference_result(workload) if setting.computes else None
    entries = []
    for contestant in setting.select(any_frozen=workload.any_frozen):
        try:
            equality = None
            if expected is not None:
                equality = check_equality(contestant, workload, expected)
            entries.append(contestant.build(workload.groups, workload.hyper))
        except Exception as error:
            if contestant == OURS:
                raise
            outcome.unavailable[contestant.key] = f"{error}".strip().partition("\n")[0]
        else:
            outcome.rows.append(Row(contestant, equality))
    return entries


def _measure_iterations(
    outcome: Outcome, workload: Workload, entries: Sequence[Entry], setting: Setting
) -> None:
    turns: dict[str, Turn] = {
        e.contestant.key: iteration_turn(workload, e.optimizer, e.stepper, setting.device)
        for e in entries
    }
    samples = interleave(turns, setting.budget, setting.rng)
    for row, entry in zip(outcome.rows, entries, strict=True):
        row.samples["iteration"] = samples[row.contestant.key]
        row.memory = memory(workload, entry.optimizer, entry.stepper, setting.device)


def _measure_steps(
    outcome: Outcome,
    workload: Workload,
    entries: Sequence[Entry],
    setting: Setting,
    measures: Sequence[str],
    beside: Workload | None,
) -> None:
    device = setting.device
    makers: dict[str, Callable[[Entry], Turn]] = {}
    if "warm" in measures:
        makers["warm"] = lambda entry: warm_turn(entry.stepper, device)
    if "cold" in measures:
        walked = torch.zeros(WALKED_BYTES // 4)
        makers["cold"] = lambda entry: cold_turn(entry.stepper, device, walked)
    if "device" in measures and device.type == "cuda":
        flushed = torch.empty(FLUSHED_BYTES // 4, device=device)
        makers["device"] = lambda entry: device_turn(entry.stepper, device, flushed)
    passes: dict[str, Pass] = {}
    if workload.bandwidth:
        passes = reference_passes(workload, device)
    likewise: Entry | None = None
    if beside is not None:
        beside.fill_gradients()
        likewise = OURS.build(beside.groups, beside.hyper)
    for measure, make in makers.items():
        turns = {entry.contestant.key: make(entry) for entry in entries}
        extra: dict[str, Turn] = {}
        if measure == outcome.pass_measure:
            for name, reference in passes.items():
                stepper = PassStepper(reference)
                extra[name] = (
                    device_turn(stepper, device, flushed)
                    if measure == "device"
                    else warm_turn(stepper, device)
                )
        if likewise is not None and measure in _BESIDE:
            extra["beside"] = make(likewise)
        samples = interleave(turns | extra, setting.budget, setting.rng)
        for row in outcome.rows:
            row.samples[measure] = samples[row.contestant.key]
        if measure == outcome.pass_measure:
            outcome.passes = {n: (p.size, samples[n]) for n, p in passes.items()}
        if "beside" in samples:
            outcome.beside[measure] = samples["beside"]


def run_synthetic(setting: Setting) -> Iterator[Outcome]:
    """Tiny tensors: what a step costs before any arithmetic, with warm and with cold caches."""
    device = setting.device
    measures = ("warm", "cold", "device") if setting.computes else ("warm", "cold")
    yield run_workload("synthetic", tiny_trainable(device), setting, measures)
    yield run_workload(
        "synthetic",
        mostly_frozen(device),
        setting,
        measures,
        beside=mostly_frozen(device, frozen=0),
    )
    yield run_workload("synthetic", many_groups(device), setting, measures)


def run_models(
    keys: Sequence[str],
    shares: Sequence[float | str],
    setting: Setting,
    measures: Sequence[str] = ("warm", "device", "iteration"),
) -> Iterator[Outcome]:
    """Real networks at each frozen share.

    Raises:
        models.MissingPackageError: the package a network comes from is not installed.
    """
    for key in keys:
        loaded = LoadedModel(key, setting.device)
        for share in shares:
            yield run_workload("models", loaded.workload(share), setting, measures)
