"""Measure FrozenAwareSGD against every form of stock SGD.

Run ``python benchmarks/compare.py --help`` for the options. Ends with status 0, with 1 if a
contestant computed something else than stock does, with 2 if asked for what cannot be done, and
with 130 after Ctrl-C; what was measured until then is saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import random
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# Imports take seconds; until they are done, Ctrl-C ends this without a traceback.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from check import missing
from contestants import Kind, other_packages
from digits import DigitsOutcome, run_digits
from load import LOAD_MODELS, QUICK_RUNS, RUNS, LoadOutcome, load_table, load_targets, run_load
from machine import company, describe, granted_share, headline, is_simulated, slug
from measure import Budget
from memory_plot import draw_memory
from memory_report import memory_legend, memory_table, memory_targets
from memory_suite import (
    MEMORY_MODELS,
    QUICK_MEMORY_MODELS,
    MemoryOutcome,
    parts,
    require_memory_for,
    run_memory,
)
from models import ALL_MODELS, MODELS, MissingPackageError, NotEnoughMemoryError, require
from plots import draw, picture_kinds
from saving import NowhereToWriteError, as_json, as_markdown, make_room, write
from suites import Outcome, Setting, run_models, run_synthetic
from tables import WIDTH, digits_table, indented, legend, outcome_table, targets_table
from targets import Reached, networks, target_lines, target_outcomes
from targets import parts as target_parts
from verdict import unequal, verdict

import torch_freeze

SUITES = ("synthetic", "models", "digits", "targets", "memory", "load")
TARGET_OF = {"cpu": "a CPU of 2 cores", "cuda": "a GPU"}
DEFAULT_SUITES = ("synthetic", "models", "digits")


HERE = Path(__file__).resolve().parent
RECORDED = HERE / "results"
SIMULATION = HERE.parent / "tests" / "cuda_on_cpu" / "run.py"
"""In a clone alone: the tests are not a part of the package."""
SCHEDULE = "CUDA_ON_CPU_SCHEDULE"
NO_WORK = "never"
HOST_TIME_FILE = "simulated_cuda_host_time"
SIMULATED_MODELS = ("mobilenet_v3_small",)
SIMULATED_SCALE = 1e-3
"""Of the targets' flat sets, whose elements a CPU works through."""
SIMULATED_WARNINGS = {
    True: "Simulated CUDA: no GPU was there, and no kernel ran. The times are of the host alone, "
    "until step() returns, with launches that return at once.",
    False: "Simulated CUDA: no GPU was there. The CPU ran the kernels, so the times show that the "
    "benchmark runs and say nothing about a GPU's speed. The targets' flat sets have a thousandth "
    "of the elements that their names say.",
}

FOLDER = Path("compare-results")
"""Where results go, in the current folder, with the time in their names."""


@dataclass(frozen=True)
class Extent:
    """How much a run covers where the options do not say it."""

    models: tuple[str, ...]
    frozen: str
    budget: Budget


QUICK = Extent(("mobilenet_v3_small",), "0,head", Budget(0.2, least=3))
USUAL = Extent(("resnet50", "mobilenet_v3_small"), "0,50,head", Budget(0.5, least=3))
FULL = Extent(ALL_MODELS, "0,50,90,head", Budget(1.5))


class NoGpuError(RuntimeError):
    """A GPU was asked for and there is none."""


class NoPictureError(RuntimeError):
    """A picture was asked for that cannot be drawn."""


class SimulatedError(RuntimeError):
    """Simulated CUDA cannot be used so."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Write the message and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _list(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {unknown[0] if unknown else text!r}; known: {', '.join(known)}"
            )
        return names

    return parse


def _shares(text: str) -> list[float | str]:
    shares: list[float | str] = []
    for part in text.split(","):
        name = part.strip()
        try:
            share = name if name == "head" else float(name)
        except ValueError:
            share = -1.0
        if isinstance(share, float) and not 0 <= share < 100:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no share to freeze; give percents from 0 to below 100, or head"
            )
        shares.append(share)
    return shares


def _above_zero(kind: type[int] | type[float]) -> Callable[[str], Any]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} above 0")
        return value

    return parse


def make_parser() -> Parser:
    """The command line's options."""
    parser = Parser(
        prog="compare.py",
        description="Measure FrozenAwareSGD against every form of stock SGD, in turns.",
    )
    add = parser.add_argument
    add(
        "--device",
        choices=["auto", "cpu", "cuda", "simulated"],
        default="auto",
        help="auto: a GPU if there is one; simulated: host time of step() on simulated CUDA, whose "
        "launches do nothing (in a clone of the repository)",
    )
    add(
        "--suite",
        type=_list([*SUITES, "all"], "suite"),
        help=f"of {','.join(SUITES)}, or all (default: {','.join(DEFAULT_SUITES)})",
    )
    add("--models", type=_list(list(MODELS), "model"), help=f"of {','.join(MODELS)}")
    add(
        "--frozen",
        type=_shares,
        help=f"percents of the elements, or head for all but it (default: {USUAL.frozen})",
    )
    add("--quick", action="store_true", help="one network and fewer rounds: a look")
    add("--full", action="store_true", help="more networks, shares and rounds")
    add(
        "--steps",
        type=_above_zero(int),
        help="rounds per measure, instead of as many as the time allows",
    )
    add("--seconds", type=_above_zero(float), help="time per measure and workload")
    add("--threads", type=_above_zero(int), help="threads torch may use on the CPU")
    add("--compiled", action="store_true", help="also a stock step through torch.compile")
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="save the results there, named after the GPU or the CPU; by default they go to "
        f"{FOLDER}, with the time in their names",
    )
    add("--json", type=Path, metavar="FILE", help="all samples, the machine and versions, there")
    add("--plot", type=Path, metavar="FILE", help="the picture there; its ending says what kind")
    add("--markdown", type=Path, metavar="FILE", help="what is printed, and the machine, there")
    return parser


def simulate(arguments: Sequence[str]) -> None:
    """Start again on simulated CUDA, unless this process already runs there.

    Raises:
        SimulatedError: the simulation is not there.
    """
    if os.environ.get(SCHEDULE) == NO_WORK:
        return
    if not SIMULATION.is_file():
        raise SimulatedError(
            f"--device simulated: there is no {SIMULATION}; the simulation comes with a clone of "
            "the repository, not with the package. Run it there, after `USE_CUDA=1 make build`"
        )
    own = os.path.relpath(__file__)
    command = [str(SIMULATION), "--schedule", NO_WORK, "--run", sys.executable, own]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command, *arguments])


def choose_device(name: str) -> torch.device:
    """The device asked for.

    Raises:
        NoGpuError: a GPU was asked for and torch sees none.
    """
    found = torch.cuda.is_available()
    if name in ("cuda", "simulated") and not found:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        raise NoGpuError(
            f"torch {torch.__version__} ({built}) sees no CUDA GPU; use --device cpu or auto"
        )
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def plan(options: argparse.Namespace) -> tuple[list[str], list[str], list[float | str], Budget]:
    """Suites, models, frozen shares and time budget that follow from the options."""
    only_host = options.device == "simulated"
    asked = options.suite or (["synthetic"] if only_host else list(DEFAULT_SUITES))
    if only_host and asked != ["synthetic"]:
        raise SimulatedError(
            "--device simulated: measures host time on the suite synthetic alone; use --device cpu "
            "or cuda for the others"
        )
    suites = [suite for suite in SUITES if suite in asked or "all" in asked]
    extent = QUICK if options.quick else FULL if options.full else USUAL
    models = options.models or list(extent.models)
    shares = options.frozen or _shares(extent.frozen)
    budget = extent.budget
    if options.seconds is not None:
        budget = dataclasses.replace(budget, seconds=options.seconds, most=10_000)
    if options.steps is not None:
        budget = dataclasses.replace(budget, least=options.steps, most=options.steps)
    return suites, models, shares, budget


def usable(
    wanted: Sequence[str], needs: Callable[[str], object], *, explicit: bool
) -> Iterator[str]:
    """Those of ``wanted`` whose needs are met; others are skipped with a line on stderr.

    Raises:
        MissingPackageError, NotEnoughMemoryError: one is not usable and was asked for by name.
    """
    for name in wanted:
        try:
            needs(name)
        except (MissingPackageError, NotEnoughMemoryError) as missing:
            if explicit:
                raise
            print(f"skipped {name}: {missing}", file=sys.stderr)
        else:
            yield name


def _needs_of_model(key: str) -> None:
    package = MODELS[key].needs
    if package is not None:
        require(package, package, key)


def _needs_of_suite(suite: str) -> None:
    if suite == "digits":
        require("sklearn", "scikit-learn", "the digits suite")


def _memory_plan(options: argparse.Namespace) -> tuple[list[str], float | str]:
    """Models and frozen share of the memory suite; its share is the first that freezes anything."""
    usual = QUICK_MEMORY_MODELS if options.quick else MEMORY_MODELS
    shares = [share for share in options.frozen or [] if share]
    return options.models or list(usual), shares[0] if shares else 50.0


def _files(options: argparse.Namespace, described: dict[str, Any], suites: list[str]) -> list[Path]:
    """Where the JSON, the Markdown and the picture of this run go.

    Raises:
        NoPictureError: the picture asked for is of no kind, or there is nothing to draw.
        SimulatedError: what simulated CUDA measured would lie among the recorded results.
    """
    only_host = options.device == "simulated"
    stem = slug(described) + (f"_{suites[0]}" if suites in (["memory"], ["load"]) else "")
    stem = HOST_TIME_FILE if only_host else stem
    if options.results is None:
        stem = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{stem}"
    folder = options.results or FOLDER
    known = picture_kinds()
    if options.plot and options.plot.suffix[1:].lower() not in known:
        raise NoPictureError(
            f"--plot: cannot draw {options.plot.name!r}; known endings: {', '.join(known)}"
        )
    if options.plot and suites == ["load"]:
        raise NoPictureError("--plot: the load suite draws no picture")
    files = [
        options.json or folder / f"{stem}.json",
        options.markdown or folder / f"{stem}.md",
        options.plot or folder / f"{stem}.png",
    ]
    for file in files if described.get("simulated") else []:
        recorded = RECORDED in file.resolve().parents
        if recorded and not (only_host and file.stem == HOST_TIME_FILE):
            raise SimulatedError(
                f"{file}: results of simulated CUDA are not kept in {RECORDED}, where a GPU's "
                "belong; name another folder with --results, as in --results build/simulated"
            )
    return files


@dataclass
class Job:
    """What a run will do, once all of it is known to be possible."""

    device: torch.device
    suites: list[str]
    models: list[str]
    shares: list[float | str]
    target_models: list[str]
    memory_models: list[str]
    memory_share: float | str
    load_models: list[str]
    budget: Budget
    simulated: str | None
    """What a reader must know of simulated CUDA, where this is it."""
    computes: bool
    quick: bool
    compiled: bool
    others: list[Kind]
    left_out: dict[str, str]
    described: dict[str, Any]
    files: list[Path]

    def parts(self) -> dict[str, int]:
        """How often each suite tells its progress."""
        told = {
            "synthetic": 3 * 2,
            "models": 3 * len(self.models) * len(self.shares),
            "digits": 2,
            "targets": target_parts(self.target_models, self.device),
            "memory": parts(self.memory_models, self.device),
            "load": 2 * len(self.load_models),
        }
        return {suite: told[suite] for suite in self.suites}

    def seconds(self) -> dict[str, float]:
        """Roughly how long each part of a suite takes on two idle cores."""
        each = self.budget.seconds
        rounds = RUNS if not self.quick else QUICK_RUNS
        return {
            "synthetic": 0.3 + 1.2 * each,
            "models": 2.2 + each,
            "digits": 3.0,
            "targets": 1.5 + 1.5 * each,
            "memory": 3.0 if self.quick else 15.0,
            "load": sum(rounds.values()) / 2 * (6.9 + each),
        }


def prepare(options: argparse.Namespace) -> Job:
    """Find out what will be done, and that it can be.

    Raises:
        MissingPackageError: something asked for by name needs a package that is not installed.
        NotEnoughMemoryError: a model asked for by name does not fit.
        NoGpuError: a GPU was asked for and there is none.
        NoPictureError: a picture was asked for that cannot be drawn.
        NowhereToWriteError: the results could not be saved.
        SimulatedError: simulated CUDA was asked for something that it cannot show.
    """
    lacking = missing()
    if lacking:
        raise MissingPackageError(lacking)
    device = choose_device(options.device)
    simulated = is_simulated(device)
    if simulated and not torch_freeze.build_info().cuda:
        raise SimulatedError(
            "simulated CUDA: the module has no CUDA code; run `USE_CUDA=1 make build` first"
        )
    suites, models, shares, budget = plan(options)
    suites = list(usable(suites, _needs_of_suite, explicit=options.suite is not None))
    named = options.models is not None
    memory_models, memory_share = _memory_plan(options)
    if "models" in suites:
        models = list(usable(models, _needs_of_model, explicit=named))
    target_models: list[str] = []
    if "targets" in suites:
        wanted = SIMULATED_MODELS if simulated else networks(device)
        target_models = list(usable(wanted, _needs_of_model, explicit=False))
    if "memory" in suites:
        fits = functools.partial(require_memory_for, device=device)
        memory_models = list(usable(memory_models, fits, explicit=named))
    load_models = options.models or list(LOAD_MODELS)
    if "load" in suites:
        load_models = list(usable(load_models, _needs_of_model, explicit=named))
    if options.threads:
        torch.set_num_threads(options.threads)
    described = describe(device)
    computes = options.device != "simulated"
    if simulated:
        described["simulated"] = SIMULATED_WARNINGS[not computes]
    files = _files(options, described, suites)
    make_room(files)
    others, left_out = other_packages(device)
    return Job(
        device=device,
        suites=suites,
        models=models,
        shares=shares,
        target_models=target_models,
        memory_models=memory_models,
        memory_share=memory_share,
        load_models=load_models,
        budget=budget,
        simulated=described.get("simulated"),
        computes=computes,
        quick=options.quick,
        compiled=options.compiled,
        others=others,
        left_out=left_out,
        described=described,
        files=files,
    )


@dataclass
class Found:
    """What was measured so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    digits: DigitsOutcome | None = None
    targets: list[Reached] = field(default_factory=list)
    memory: list[MemoryOutcome] = field(default_factory=list)
    load: list[LoadOutcome] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    shares_of_time: list[float] = field(default_factory=list)

    def anything(self) -> bool:
        """Whether there is a figure to save."""
        return bool(self.outcomes or self.digits or self.memory or self.load)


_BAR = "{percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} left{postfix}"


def measure(job: Job, found: Found) -> None:
    """Run the suites, printing each table when it is there."""
    tqdm = require("tqdm", "tqdm", "the progress bar").tqdm
    seconds, parts_of = job.seconds(), job.parts()
    total = sum(seconds[suite] * count for suite, count in parts_of.items())
    # disable=None: no bar where stderr is no terminal. smoothing=0: what is left follows from all
    # that is over, not from the last part.
    with tqdm(
        total=total, disable=None, leave=False, bar_format=_BAR, ncols=WIDTH - 1, smoothing=0
    ) as bar:
        weight = before = 0.0

        def progress(text: str) -> None:
            nonlocal before
            bar.set_postfix_str(text, refresh=False)
            bar.update(before)  # of the part that is over
            before = weight

        def show(text: str) -> None:
            found.shown.append(text)
            tqdm.write(text + "\n", file=sys.stdout)

        setting = Setting(
            job.device,
            job.budget,
            job.compiled,
            random.Random(0),
            progress,
            job.others,
            job.computes,
        )
        show(textwrap.fill(headline(job.described), WIDTH))
        if job.simulated:
            show(textwrap.fill(job.simulated, WIDTH))
        left = [indented(f"{name}: {why}") for name, why in job.left_out.items()]
        if left and set(job.suites) - {"memory", "load"}:
            show("\n".join(["Not among the contestants:", *left]))
        takes = f"{total / 60:.1f} minutes" if total > 100 else f"{round(total, -1):.0f} seconds"
        tqdm.write(f"This takes about {takes} on two idle cores.\n", file=sys.stdout)
        for suite in job.suites:
            weight = seconds[suite]
            if suite == "synthetic":
                for outcome in run_synthetic(setting):
                    found.outcomes.append(outcome)
                    show(outcome_table(outcome))
            elif suite == "models":
                for outcome in run_models(job.models, job.shares, setting):
                    found.outcomes.append(outcome)
                    show(outcome_table(outcome))
            elif suite == "digits":
                found.digits = run_digits(setting)
                show(digits_table(found.digits))
            elif suite == "targets":
                measured = []
                scale = SIMULATED_SCALE if job.simulated else 1.0
                for outcome in target_outcomes(setting, job.target_models, scale):
                    found.outcomes.append(outcome)
                    measured.append(outcome)
                    if job.device.type == "cuda":
                        show(outcome_table(outcome))
                reached = target_lines(setting, measured, job.target_models)
                if job.simulated:
                    reached = [dataclasses.replace(line, status="simulated") for line in reached]
                found.targets += reached
                show(targets_table(reached, f"speed to reach on {TARGET_OF[job.device.type]}"))
            elif suite == "memory":
                for taken in run_memory(
                    job.memory_models, job.memory_share, setting, quick=job.quick
                ):
                    found.memory.append(taken)
                    show(memory_table(taken))
                reached = memory_targets(found.memory)
                found.targets += reached
                show(targets_table(reached, "memory to reach"))
            elif suite == "load":
                for under_load in run_load(job.load_models, setting, quick=job.quick):
                    found.load.append(under_load)
                    show(load_table(under_load))
                reached = load_targets(found.load)
                found.targets += reached
                show(targets_table(reached, "under load"))


def _without_functions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if not callable(value)}


def finish(job: Job, found: Found, *, cut_short: str | None = None) -> bool:
    """Print what it all means and save it.

    Returns:
        Whether every file lies where it was wanted.
    """
    outcomes, digits, memory = found.outcomes, found.digits, found.memory
    explained = []
    if outcomes or digits:
        explained.append(legend(job.device.type, outcomes, trained=digits is not None))
    if memory:
        explained.append(memory_legend(job.device.type))
    described = job.described | {"share of its threads' time": found.shares_of_time}
    summary = verdict(
        outcomes,
        digits,
        found.targets,
        memory=memory,
        warnings=[job.simulated, cut_short, company(found.shares_of_time)],
    )
    print("\n\n".join([*explained, summary]) + "\n")
    contents = {
        "command": sys.argv,
        "machine": described,
        "left out": job.left_out,
        "budget": dataclasses.asdict(job.budget),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        "digits": dataclasses.asdict(digits) if digits else None,
        "targets": [dataclasses.asdict(line) for line in found.targets],
        "memory": [dataclasses.asdict(taken, dict_factory=_without_functions) for taken in memory],
        "load": [dataclasses.asdict(taken) for taken in found.load],
        "verdict": summary.splitlines(),
    }
    json_file, markdown_file, plot_file = job.files
    placed = [
        write(json_file, as_json(contents)),
        write(markdown_file, as_markdown(described, [*found.shown, *explained], summary)),
    ]
    kind = plot_file.suffix[1:]
    drawn = [*outcomes, *([digits.as_workload()] if digits else [])]
    if drawn:
        placed.append(write(plot_file, draw(drawn, headline(described), kind)))
    if memory:
        name = plot_file.with_stem(f"{plot_file.stem}_memory") if drawn else plot_file
        placed.append(write(name, draw_memory(memory, headline(described), kind)))
    return all(placed)


def run(options: argparse.Namespace) -> int:
    """Do what the options ask for and return the exit status.

    Raises:
        RuntimeError: it cannot be done; see `prepare`.
    """
    job, found = prepare(options), Found()
    found.shares_of_time.append(granted_share())
    try:
        measure(job, found)
    except BaseException as error:
        if found.anything():
            found.shares_of_time.append(granted_share())
            why = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else repr(error)
            finish(job, found, cut_short=f"Ended early by {why}: this was measured before.")
        raise
    found.shares_of_time.append(granted_share())
    placed = finish(job, found)
    if unequal(found.outcomes, found.digits, found.memory):
        return 1
    return 0 if placed else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, run, and turn what a user can fix into one line and status 2."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        if options.device == "simulated":
            simulate(sys.argv[1:] if arguments is None else arguments)
        return run(options)
    except (
        MissingPackageError,
        NotEnoughMemoryError,
        NoGpuError,
        NoPictureError,
        NowhereToWriteError,
        SimulatedError,
    ) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
