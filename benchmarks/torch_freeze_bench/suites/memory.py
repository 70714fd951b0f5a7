"""The suite `memory`: the four ways to freeze, freezing during training, blocks in rotation."""

from __future__ import annotations

import gc
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from ..checks import NotEnoughMemoryError, Share
from ..contestants import DEFAULT, FOREACH, FUSED, IN_BACKWARD, Contestant, Family, Trainer
from ..equality import Equality, Journal
from ..machine import available_bytes
from ..memory import GradientProbe, held_bytes, mark, record, trim
from ..records import FACTS, OURS, Measured
from ..report import by_model, peak_of
from ..tables import Reached, judge, megabytes, times
from ..timing import Turn, interleave, iteration_turn, wait_for
from ..workloads import MODELS, Loss, Network, describe_share, freeze_share
from .base import Setting, Suite, Task

MEMORY_MODELS = ("resnet50", "vit_b_16", "bert_base", "decoder_1b")
QUICK_MEMORY_MODELS = ("mobilenet_v3_small",)
SLOWER = 1.02
"""How much longer an iteration may take that steps in backward."""

_PHASES = ("zero_grad", "forward", "backward", "step")
_PER_PERIOD = 2
"""Iterations with the same frozen set; the second one is steady."""
_PERIODS = 4
"""Blocks that are trained in rotation, before it is the first one's turn again."""


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
    stateful: bool = True
    """Whether the optimizer has a state."""
    on_large: bool = False
    """Whether a model that is large for a CPU is measured too."""
    timed: bool = False
    """Whether iterations are timed too."""


CASES = (
    Case("1", "case 1: nothing frozen", False, False, False, on_large=True, timed=True),
    Case("2", "case 2: {} frozen, all parameters handed over", True, True, False, timed=True),
    Case("3", "case 3: {} not handed over, but not frozen either", False, True, True),
    Case("4", "case 4: {} frozen, the rest handed over", True, True, True, on_large=True),
    Case("1 plain", "case 1 without momentum: nothing frozen", False, False, False, stateful=False),
)


@dataclass(frozen=True)
class Plan:
    """A training run: who trains in each of its periods. Parameters are places in the model."""

    kind: str
    key: str
    title: str
    periods: Sequence[frozenset[int]]
    """The parameters that train."""
    handed: Sequence[int]
    """The parameters that the optimizer is given."""
    runs: str
    """The contestants that take part, as ``Contestant.plans`` names them."""
    hyper: str = "memory"


def _part(network: Network, share: Share) -> frozenset[int]:
    """The places of the parameters that train when a share is frozen."""
    freeze_share(network.model.named_parameters(), share, network.spec.head)
    found = (place for place, p in enumerate(network.model.parameters()) if p.requires_grad)
    return frozenset(found)


def case_plan(case: Case, network: Network, share: Share) -> Plan:
    """One of the four ways to freeze."""
    every = _part(network, 0)
    part = _part(network, share) if case.parted else every
    trains, handed = part if case.freezes else every, part if case.filtered else every
    title = case.title.format(describe_share(share))
    chosen = ("state", "memory") if case.stateful else ("plain", "plain")
    return Plan("case", case.key, title, [trains], sorted(handed), *chosen)


def midway_plan(network: Network, share: Share) -> Plan:
    """Train everything, freeze a part between two iterations, and train on."""
    every, kept = _part(network, 0), _part(network, share)
    title = f"{describe_share(share)} frozen in the middle of a run"
    return Plan("midway", "midway", title, [every, kept], sorted(every), "changes")


def rotation_plan(network: Network, share: Share) -> Plan:
    """Train one block at a time, as LISA does.

    Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
    Model Fine-Tuning", 2024 (arXiv 2403.17919).
    """
    blocks: dict[str, set[int]] = {}
    names = [name for name, _ in network.model.named_parameters()]
    for place, name in enumerate(names):
        if found := re.match(network.spec.blocks, name):
            blocks.setdefault(found.group(), set()).add(place)
    every = [frozenset(block) for block in blocks.values()]
    count = min(_PERIODS, len(every))
    chosen = [every[i * (len(every) - 1) // max(1, count - 1)] for i in range(count)]
    periods = [*chosen, chosen[0]]
    title = f"one block at a time, {len(periods)} periods, the last as the first"
    return Plan("rotation", "rotation", title, periods, range(len(names)), "changes")


def _written(key: str, device: torch.device) -> int:
    """One in how many parameters is compared with stock: not all of what is too large."""
    return 4 if MODELS[key].large and device.type == "cpu" else 1


def require_memory_for(key: str, device: torch.device, family: Family) -> None:
    """Check that package and memory for a model are there, or raise a RequestError."""
    with torch.device("meta"):
        size = sum(p.nbytes for p in MODELS[key].build().parameters())
    # The initial and the trained weights, gradients, temporaries, what malloc loses in gaps, the
    # state, and the gradients in the journal.
    kept = 5 + len(family.buffers(family.hyper["memory"]))
    wanted = int((kept + _PER_PERIOD / _written(key, device)) * size) + 2 * 10**9
    found = available_bytes(device)
    if found is not None and found < wanted:
        where = "the GPU" if device.type == "cuda" else "this machine"
        sizes = f"{wanted / 1e9:.1f} GB of memory and {where} has {found / 1e9:.1f} GB to give"
        raise NotEnoughMemoryError(f"{key} needs {sizes}")


def _iterate(trainer: Trainer, loss: Loss, index: int, device: torch.device) -> None:
    """One training iteration, marked on the timeline; dropout is the same for everyone."""
    torch.manual_seed(index)
    wait_for(device)
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


def train(
    network: Network, plan: Plan, contestant: Contestant, family: Family, *, write: bool
) -> tuple[dict[str, list[float]], Equality | None]:
    """Train a copy of the model, because some contestants leave hooks behind.

    Returns:
        By measure one value per iteration. ``gradients``: the most bytes of gradients alive at
        once. ``state``: held after it. ``frozen gradients`` and ``frozen state``: held after it for
        frozen parameters. ``temporaries``: the most that step() takes for its own duration.
        ``peak``: the most held above the model at any time. Once ``bucket``: bytes that are
        collected before they are applied in backward. And with ``write``, whether stock agrees.
    """
    trim()
    device, hyper = network.device, family.hyper[plan.hyper]
    model, loss = network.copy()
    parameters = list(model.parameters())
    probe = GradientProbe(parameters)
    journal = Journal(model, _written(network.key, device)) if write else None
    handed = [parameters[place] for place in plan.handed]
    kept: list[Trainer] = []
    found: dict[str, list[float]] = defaultdict(list)

    def run() -> None:
        for number, trains in enumerate(plan.periods):
            for place, p in enumerate(parameters):
                p.requires_grad_(place in trains)
            if number == 0:
                kept.append(contestant.build(family, [handed], hyper, model))
            else:
                kept[0].frozen_set_changed()
                if journal:
                    journal.note_change()
            (trainer,) = kept
            # Midway those that will be frozen are watched before they are.
            watched = plan.periods[-1] if plan.kind == "midway" else trains
            frozen = [p for i, p in enumerate(parameters) if i not in watched]
            for _ in range(_PER_PERIOD):
                probe.restart()
                if journal:
                    journal.begin_iteration()
                _iterate(trainer, loss, len(found["state"]), device)
                found["gradients"].append(probe.peak)
                found["state"].append(held_bytes(trainer.state()))
                if len(plan.periods) > 1:
                    states = (t for p in frozen for t in trainer.held(p).values())
                    found["frozen gradients"].append(held_bytes(p.grad for p in frozen))
                    found["frozen state"].append(held_bytes(states))

    timeline = record(run, device)
    (trainer,) = kept
    for index in range(len(found["state"])):
        found["temporaries"].append(timeline.temporaries(f"{index} step"))
        found["peak"].append(timeline.peak(*(f"{index} {phase}" for phase in _PHASES)))
    found["bucket"].append(getattr(trainer.optimizer, "bucket_bytes", 0))
    start, equality = list(network.model.parameters()), None
    if journal:
        equality = journal.check(start, handed, trainer, contestant, family, hyper)
    trainer.close()
    return found, equality


def run_plan(network: Network, plan: Plan, setting: Setting) -> Measured:
    """Let everyone train, and measure those who agree with stock.

    On a GPU the check waits for every gradient, so there the figures come from a second run.
    """
    found, family = _described(network, plan), setting.family
    for contestant in family.memory(plan.runs):
        try:
            figures, equality = train(network, plan, contestant, family, write=True)
            assert equality is not None  # with a journal it is there
            if equality.holds and network.device.type == "cuda":
                figures, _ = train(network, plan, contestant, family, write=False)
        except (RuntimeError, NotImplementedError) as error:
            found.leave_out(contestant.key, error)
            continue
        finally:
            gc.collect()  # LOMO's hooks hold the model
        found.compare(contestant.key, *equality)
        if equality.holds:
            found.add(contestant.key, **figures)
    return found


def _described(network: Network, plan: Plan) -> Measured:
    parameters = list(network.model.parameters())
    trained = [parameters[place].nbytes for place in plan.handed if place in plan.periods[0]]
    sizes = (sum(p.nbytes for p in parameters), sum(trained), max(trained))
    details = ""
    if plan.kind == "case":
        every, part, largest = map(megabytes, sizes)
        details = f"; parameters {every} MB, of which {part} train, the largest {largest}"
    title = f"{network.spec.title}, {plan.title}"
    found = Measured("memory", f"{network.key}/{plan.key}", title, details, plan.kind)
    found.add(FACTS, **dict(zip(("parameters", "trained", "largest"), sizes, strict=True)))
    return found


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


def run_times(network: Network, case: Case, share: Share, setting: Setting) -> Measured:
    """Whole iterations in interleaved turns, each contestant on a copy of the model."""
    device, family = network.device, setting.family
    plan = case_plan(case, network, share)
    title = f"{network.spec.title}, {plan.title}"
    found = Measured("memory", f"{network.key}/{case.key} time", title, ": time", "time")
    trainers: list[Trainer] = []
    turns: dict[str, Turn] = {}
    for contestant in family.memory("time"):
        model, loss = network.copy()
        parameters = list(model.parameters())
        for place, p in enumerate(parameters):
            p.requires_grad_(place in plan.periods[0])
        handed = [parameters[place] for place in plan.handed]
        try:
            trainers.append(contestant.build(family, [handed], family.hyper[plan.hyper], model))
            turns[contestant.key] = iteration_turn(trainers[-1], loss, device)
        except RuntimeError as error:
            found.leave_out(contestant.key, error)
    for key, taken in interleave(turns, setting.budget, setting.rng).items():
        found.add(key, iteration=taken)
    for trainer in trainers:
        trainer.close()
    return found


def suite(setting: Setting) -> Suite:
    """Every case, freezing midway, blocks in rotation, and times, model by model."""
    usual = QUICK_MEMORY_MODELS if setting.quick else MEMORY_MODELS
    needs = partial(require_memory_for, device=setting.device, family=setting.family)
    models = setting.usable_models(usual, needs)
    share = next((share for share in setting.shares or [] if share), 50.0)
    network = lru_cache(maxsize=1)(partial(Network, device=setting.device))

    def counted(key: str, make: Callable[[Network, Share], Plan]) -> Measured:
        with _one_thread():
            return run_plan(network(key), make(network(key), share), setting)

    def clocked(key: str, case: Case) -> Measured:
        return run_times(network(key), case, share, setting)

    tasks: list[Task] = []
    for key in models:
        title, large = MODELS[key].title, _written(key, setting.device) > 1
        cases = [case for case in CASES if case.on_large or not large]
        for case in cases:
            if case.stateful or "plain" in setting.family.hyper:
                name = f"{title}: {case.title.partition(':')[0]}"
                tasks.append((name, partial(counted, key, partial(case_plan, case))))
        if not large:
            tasks.append((f"{title}: freezing", partial(counted, key, midway_plan)))
            tasks.append((f"{title}: blocks in rotation", partial(counted, key, rotation_plan)))
            timed = [case for case in cases if case.timed]
            tasks += [(f"{title}: times", partial(clocked, key, case)) for case in timed]
    return Suite("memory", tasks, partial(reached, family=setting.family), "memory to reach")


Chosen = Callable[[Contestant], bool]
_COMPARISONS: tuple[tuple[str, Chosen, Chosen], ...] = (
    (
        "peak of an ordinary step vs stock's",
        lambda c: c.key == OURS,
        lambda c: c in (DEFAULT, FOREACH, FUSED),
    ),
    (
        "least peak vs all others'",
        lambda c: c.ours and c.precision.itemsize == 4,
        lambda c: not c.ours and c.precision.itemsize == 4,
    ),
    ("least peak vs 8 bits of state", lambda c: c.ours, lambda c: c.precision.itemsize == 1),
)


def reached(found: Sequence[Measured], family: Family) -> Iterator[Reached]:
    """Every target of the suite with the figure of this run."""
    for model, records in by_model(found):
        lines = [line for of in records if of.kind == "case" if (line := _gradients(of))]
        worst = max(lines, default=None)
        live, bound, text = worst[1:] if worst else (0.0, 0.0, "")
        figure = (live, text) if worst else None
        yield judge(f"{model}: gradients in backward", figure, f"<= {megabytes(bound)} MB", bound)
        for what, ours, others in _COMPARISONS:
            kept = (of for of in records if of.kind != "time")
            ratios = [r for of in kept if (r := _peaks(of, family, ours, others))]
            yield judge(f"{model}: {what}", max(ratios, default=None), "<= 1x")
        for of in records:
            if of.kind == "midway":
                mine = [c for c in family.memory("changes") if c.ours and of.of(c.key, "peak")]
                gradients = [of.of(c.key, "frozen gradients")[2] for c in mine]
                state = [of.of(c.key, "frozen state")[2] for c in mine if c.drops]
                for what, left in (("gradients of it", gradients), ('state of it, "drop"', state)):
                    figure = (max(left), f"{max(left):.0f} B") if left else None
                    yield judge(f"{model}, frozen midway: {what}", figure, "<= 0 B")
            elif of.kind == "time":
                ratio = of.ratio(IN_BACKWARD.key, "iteration")
                case = f"{of.title.partition(':')[0]}: time in backward vs ordinary"
                yield judge(case, ratio and (ratio.median, times(ratio)), f"<= {SLOWER:g}x")


def _gradients(of: Measured) -> tuple[float, float, float, str] | None:
    """What is alive in backward, over its bound: one bucket and the largest gradient.

    A bucket is at most a tenth of all. In case 3 most gradients are not the optimizer's to free.
    """
    case = of.key.partition("/")[2]
    if case == "3" or not of.of(IN_BACKWARD.key, "peak"):
        return None
    trained, largest = (of.one(FACTS, name) or 0 for name in ("trained", "largest"))
    bound = min(of.of(IN_BACKWARD.key, "bucket")[0], trained // 10) + largest
    live = of.of(IN_BACKWARD.key, "gradients")[-1]
    text = f"{megabytes(live)} of {megabytes(trained)} MB, case {case}"
    return live / bound, live, bound, text


def _peaks(of: Measured, family: Family, ours: Chosen, others: Chosen) -> tuple[float, str] | None:
    """The least peak of ours over the least of the others.

    To a thousandth: in backward ours keeps one element to detect a second backward.
    """
    everyone = [c for c in family.everyone if of.of(c.key, "peak")]
    mine = [peak_of(of, c.key) for c in everyone if ours(c)]
    theirs = [peak_of(of, c.key) for c in everyone if others(c)]
    if not mine or not theirs:
        return None
    best, least, case = min(mine), min(theirs), of.key.partition("/")[2]
    where = f"{megabytes(best)} of {megabytes(least)} MB, {'case ' * (of.kind == 'case')}{case}"
    return round(best / least, 3), f"{best / least:.3f}x, {where}"
