"""The suite `speed`: what a step costs, and a whole training iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from ..checks import HEAD, Share
from ..contestants import FROZEN_AWARE, REFERENCE, Trainer
from ..equality import check_equality, some_steps
from ..records import FACTS, Measured
from ..timing import (
    FLUSHED_BYTES,
    WALKED_BYTES,
    Step,
    Turn,
    cold_turn,
    device_turn,
    interleave,
    iteration_turn,
    reference_passes,
    warm_turn,
)
from ..workloads import (
    GROUPS,
    MANY_SINGLES,
    MODELS,
    MOSTLY_FROZEN,
    TINY,
    WITHOUT_FROZEN,
    Network,
    Tensors,
    Workload,
    describe_share,
)
from .base import Setting, Suite, Task

BESIDE = "reference/beside"
"""The record of our optimizer on a similar workload, measured in the same rounds."""
MODELS_USUAL, MODELS_QUICK = ("resnet50", "mobilenet_v3_small"), ("mobilenet_v3_small",)
SHARES_USUAL, SHARES_QUICK = (0.0, 50.0, HEAD), (0.0, HEAD)


def suite(setting: Setting) -> Suite:
    """Tiny tensors, and networks at each frozen share."""
    tasks = tiny_tasks("speed", setting)
    if setting.computes:
        models = setting.usable_models(MODELS_QUICK if setting.quick else MODELS_USUAL)
        shares = setting.shares or (SHARES_QUICK if setting.quick else SHARES_USUAL)
        tasks += network_tasks("speed", models, shares, setting, ("warm", "device", "iteration"))
    return Suite("speed", tasks)


def tiny_tasks(suite: str, setting: Setting) -> list[Task]:
    """What a step costs before any arithmetic, with warm and with cold caches."""
    measures = ("warm", "cold", *(["device"] * setting.computes))
    sets = ([TINY], [MOSTLY_FROZEN, WITHOUT_FROZEN], [GROUPS], [MANY_SINGLES])
    return [tensors_task(suite, setting, measures, *each) for each in sets]


def tensors_task(
    suite: str, setting: Setting, measures: Sequence[str], *tensors: Tensors, scale: float = 1.0
) -> Task:
    """Measure a set of tensors, and ours on a second one beside it."""

    def run() -> Measured:
        made = [each.build(setting.device, setting.family, scale) for each in tensors]
        return run_workload(suite, made[0], setting, measures, *made[1:])

    return tensors[0].title, run


def network_tasks(
    suite: str,
    models: Sequence[str],
    shares: Sequence[Share],
    setting: Setting,
    measures: Sequence[str],
) -> list[Task]:
    """Real networks at each frozen share."""
    network = lru_cache(maxsize=1)(partial(Network, device=setting.device))

    def run(key: str, share: Share) -> Measured:
        return run_workload(suite, network(key).workload(share, setting.family), setting, measures)

    return [
        (f"{MODELS[key].title}, {describe_share(share)} frozen", partial(run, key, share))
        for key in models
        for share in shares
    ]


def run_workload(
    suite: str,
    workload: Workload,
    setting: Setting,
    measures: Sequence[str],
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
    trainers = _admit(found, workload, setting)
    device, loss = setting.device, workload.loss
    if "iteration" in measures and loss is not None:
        turns = {k: iteration_turn(trainer, loss, device) for k, trainer in trainers.items()}
        for key, taken in interleave(turns, setting.budget, setting.rng).items():
            found.add(key, iteration=taken)
    workload.fill_gradients()
    _measure_steps(found, workload, trainers, setting, measures, beside)
    return found


def _described(suite: str, workload: Workload, setting: Setting) -> Measured:
    parameters, trainable, hyper = workload.parameters, workload.trainable, workload.hyper
    elements, frozen = sum(p.numel() for p in parameters), len(parameters) - len(trainable)
    details = ""
    if frozen and workload.loss:
        share = 1 - sum(p.numel() for p in trainable) / elements
        details = f" ({100 * share:.1f} % of the elements)"
    details += f"; {len(parameters)} tensors; {elements:,} elements"
    values = {k: f"{v:g}" if isinstance(v, float) else v for k, v in hyper.items() if k != "lr"}
    shown = (f"; {name} {value}" for name, value in values.items())
    details += "".join(shown).replace("_", " ")
    found = Measured(suite, workload.key, workload.title, details)
    size = setting.family.step_bytes(workload.trainable, hyper)
    found.add(
        FACTS, tensors=len(parameters), frozen_tensors=frozen, elements=elements, step_bytes=size
    )
    return found


def _admit(found: Measured, workload: Workload, setting: Setting) -> dict[str, Trainer]:
    """Everyone who can run here; whoever computes something else is recorded as such."""
    workload.fill_gradients()
    family, trainers = setting.family, {}
    expected = some_steps(REFERENCE, family, workload) if setting.computes else None
    for contestant in setting.select(any_frozen=workload.any_frozen):
        try:
            equality = expected and check_equality(contestant, family, workload, expected)
            trainer = contestant.build(family, workload.groups, workload.hyper)
        except Exception as error:  # whatever a package that does not fit may raise
            found.leave_out(contestant.key, error)
            continue
        trainers[contestant.key] = trainer
        found.add(contestant.key)
        if equality:
            found.compare(contestant.key, *equality)
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
    makers: dict[str, Callable[[Step], Turn]] = {}
    if "warm" in measures:
        makers["warm"] = partial(warm_turn, device=device)
    if "cold" in measures:
        makers["cold"] = partial(cold_turn, device=device, walked=torch.zeros(WALKED_BYTES // 4))
    if "device" in measures and device.type == "cuda":
        flushed = torch.empty(FLUSHED_BYTES // 4, device=device)
        makers["device"] = partial(device_turn, device=device, flushed=flushed)
    passes = reference_passes(workload, device, setting.family) if workload.bandwidth else {}
    for measure, make in makers.items():
        steps = {key: trainer.step for key, trainer in trainers.items()}
        if beside is not None and measure != "cold":
            steps[BESIDE] = steady(beside, setting).step
        if measure == ("device" if device.type == "cuda" else "warm"):
            for name, (step, size) in passes.items():
                steps[name] = step
                found.add(name, bytes=size)
        turns = {key: make(step) for key, step in steps.items()}
        for key, taken in interleave(turns, setting.budget, setting.rng).items():
            found.add(key, **{measure: taken})


def steady(workload: Workload, setting: Setting) -> Trainer:
    """Our optimizer after some steps."""
    trainer = FROZEN_AWARE.build(setting.family, workload.groups, workload.hyper)
    workload.fill_gradients()
    for _ in range(3):
        trainer.step()
    return trainer
