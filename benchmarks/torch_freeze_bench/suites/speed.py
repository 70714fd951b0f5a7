"""The suites `synthetic` and `models`: what a step costs, and a whole training iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..contestants import Contestant, Trainer
from ..equality import check_equality, reference_result
from ..memory import iteration_memory
from ..records import FACTS, Measured
from ..timing import (
    FLUSHED_BYTES,
    WALKED_BYTES,
    Pass,
    Stepper,
    Turn,
    cold_turn,
    device_turn,
    interleave,
    one_iteration,
    reference_passes,
    run_turn,
    warm_turn,
)
from ..workloads import LoadedModel, Workload, many_groups, mostly_frozen, tiny_trainable
from .base import Setting

BESIDE = "reference/beside"
"""The record of our optimizer on a similar workload, measured in the same rounds."""


def run_workload(
    suite: str,
    workload: Workload,
    setting: Setting,
    measures: Sequence[str],
    *,
    beside: Workload | None = None,
) -> Measured:
    """Check that everyone computes the same, then measure everyone in interleaved turns.

    All contestants step the same parameters with the same gradients, each with a state of its own,
    so that nobody has the better place in memory.

    Args:
        suite: the suite's name, for the records.
        workload: what is stepped.
        setting: device, time budget and the like.
        measures: any of ``"warm"`` and ``"cold"``, the host time of step() with warm and with cold
            caches, ``"device"``, its GPU time, and ``"iteration"``, a whole training iteration.
            ``"device"`` is skipped on a CPU.
        beside: the same without what makes it special, such as the trainable parameters without
            the frozen ones; our optimizer is timed on this too, in the same rounds.
    """
    found = _described(suite, workload, setting)
    setting.progress(f"{workload.title}: equality")
    trainers = _admit(found, workload, setting)
    device = setting.device
    if "iteration" in measures:
        setting.progress(f"{workload.title}: iterations")
        turns = {k: run_turn(one_iteration(workload, t), device) for k, t in trainers.items()}
        for key, taken in interleave(turns, setting.budget, setting.rng).items():
            found.add(key, iteration=taken)
            found.add(key, **iteration_memory(workload, trainers[key], device))
    setting.progress(f"{workload.title}: steps")
    workload.fill_gradients()
    _measure_steps(found, workload, trainers, setting, measures, beside)
    return found


def _described(suite: str, workload: Workload, setting: Setting) -> Measured:
    parameters, hyper = workload.parameters, workload.hyper
    elements = sum(p.numel() for p in parameters)
    frozen = len(parameters) - len(workload.trainable)
    details = f" ({workload.frozen_percent:.1f} % of the elements)" * bool(frozen)
    details = details if workload.batch else ""
    details += f"; {len(parameters)} tensors; {elements:,} elements"
    for name, value in setting.family.arguments(hyper).items():
        details += f"; {name.replace('_', ' ')} {value:g}" if name != "lr" else ""
    found = Measured(suite, workload.key, workload.title, details, batch=workload.batch)
    found.add(
        FACTS,
        tensors=len(parameters),
        frozen_tensors=frozen,
        elements=elements,
        step_bytes=setting.family.step_bytes(workload.trainable, hyper),
    )
    return found


def _admit(found: Measured, workload: Workload, setting: Setting) -> dict[str, Trainer]:
    workload.fill_gradients()
    expected = reference_result(workload, setting.family) if setting.computes else None
    trainers = {}
    for contestant in setting.select(any_frozen=workload.any_frozen):
        try:
            equality = compiling = None
            if expected is not None:
                equality, compiling = check_equality(contestant, workload, expected)
            trainers[contestant.key] = contestant.build(workload.groups, workload.hyper)
        except Exception as error:
            if contestant.ours:
                raise
            found.unavailable[contestant.key] = f"{error}".strip().partition("\n")[0]
            continue
        found.add(contestant.key)
        if equality is not None:
            found.compare(contestant.key, equality.gap, equality.tolerance)
        if compiling is not None:
            found.add(contestant.key, compiling=compiling * 1e9)
    return trainers


def _measure_steps(
    found: Measured,
    workload: Workload,
    trainers: dict[str, Trainer],
    setting: Setting,
    measures: Sequence[str],
    beside: Workload | None,
) -> None:
    device = setting.device
    makers: dict[str, Callable[[Stepper], Turn]] = {}
    if "warm" in measures:
        makers["warm"] = lambda stepper: warm_turn(stepper, device)
    if "cold" in measures:
        walked = torch.zeros(WALKED_BYTES // 4)
        makers["cold"] = lambda stepper: cold_turn(stepper, device, walked)
    if "device" in measures and device.type == "cuda":
        flushed = torch.empty(FLUSHED_BYTES // 4, device=device)
        makers["device"] = lambda stepper: device_turn(stepper, device, flushed)
    passes: dict[str, Pass] = {}
    if workload.bandwidth:
        passes = reference_passes(workload, device, setting.family)
    extra: dict[str, Stepper] = {}
    if beside is not None:
        beside.fill_gradients()
        extra[BESIDE] = _ours(setting).build(beside.groups, beside.hyper)
    for measure, make in makers.items():
        steppers: dict[str, Stepper] = dict(trainers)
        if measure != "cold":
            steppers |= extra
        if measure == ("device" if device.type == "cuda" else "warm"):
            steppers |= passes
            for name, reference in passes.items():
                found.add(name, bytes=reference.size)
        turns = {key: make(stepper) for key, stepper in steppers.items()}
        for key, taken in interleave(turns, setting.budget, setting.rng).items():
            found.add(key, **{measure: taken})


def _ours(setting: Setting) -> Contestant:
    return setting.select(any_frozen=False)[0]


def steady(workload: Workload, setting: Setting) -> Trainer:
    """Our optimizer after some steps."""
    trainer = _ours(setting).build(workload.groups, workload.hyper)
    workload.fill_gradients()
    for _ in range(3):
        trainer.step()
    return trainer


def run_synthetic(setting: Setting, suite: str = "synthetic") -> Iterator[Measured]:
    """Tiny tensors: what a step costs before any arithmetic, with warm and with cold caches."""
    device = setting.device
    measures = ("warm", "cold", "device") if setting.computes else ("warm", "cold")
    without = mostly_frozen(device, frozen=0)
    yield run_workload(suite, tiny_trainable(device), setting, measures)
    yield run_workload(suite, mostly_frozen(device), setting, measures, beside=without)
    yield run_workload(suite, many_groups(device), setting, measures)


def run_models(
    keys: Sequence[str],
    shares: Sequence[float | str],
    setting: Setting,
    measures: Sequence[str] = ("warm", "device", "iteration"),
    suite: str = "models",
) -> Iterator[Measured]:
    """Real networks at each frozen share."""
    for key in keys:
        loaded = LoadedModel(key, setting.device)
        for share in shares:
            yield run_workload(suite, loaded.workload(share), setting, measures)
