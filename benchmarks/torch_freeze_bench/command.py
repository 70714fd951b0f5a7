"""The command: its options, what follows from them, and a run from plan to files."""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

import torch_freeze

from . import figures, memory_report, speed_report
from .contestants import FAMILIES, other_packages
from .machine import company, describe, granted_share, headline, is_simulated, slug
from .memory import NotEnoughMemoryError
from .records import Measured, to_csv
from .saving import as_markdown, make_room, write
from .suites import digits, load, memory, speed, targets
from .suites.base import Report, Setting, Suite
from .tables import WIDTH, Reached, filled, indented, listed, targets_summary, targets_table
from .timing import Budget
from .workloads import ALL_MODELS, MODELS, MissingPackageError, RequestError, needs_of, require

SUITES = ("synthetic", "models", "digits", "targets", "memory", "load")
DEFAULT_SUITES = ("synthetic", "models", "digits")
_OF_THEIR_OWN = ("targets", "memory", "load")
"""Suites that name the files of a run, if nothing else runs."""

_BENCHMARKS = Path(__file__).resolve().parents[1]
SCRIPT = _BENCHMARKS / "compare.py"
RECORDED = _BENCHMARKS / "results"
SIMULATION = _BENCHMARKS.parent / "tests" / "cuda_on_cpu" / "run.py"
"""Only in a clone of the repository: the tests are not part of the package."""
SCHEDULE = "CUDA_ON_CPU_SCHEDULE"
NO_WORK = "never"
HOST_TIME_FILE = "simulated_cuda_host_time"
SIMULATED_WARNINGS = {
    True: "Simulated CUDA: there was no GPU, and no kernel ran. The times are the host's alone, "
    "until step() returns, with launches that return at once.",
    False: "Simulated CUDA: there was no GPU. The CPU ran the kernels, so the times show that the "
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
        description="Measure this package's optimizers against every form of stock, in turns.",
    )
    add = parser.add_argument
    add(
        "--device",
        choices=["auto", "cpu", "cuda", "simulated"],
        default="auto",
        help="auto: a GPU if there is one; simulated: host time of step() on simulated CUDA, whose "
        "launches do nothing (in a clone of the repository)",
    )
    add("--optimizer", choices=list(FAMILIES), default="sgd", help="default: sgd")
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
    add("--quick", action="store_true", help="one network and fewer rounds: a first look")
    add("--full", action="store_true", help="more networks, shares and rounds")
    add(
        "--steps",
        type=_above_zero(int),
        help="rounds per measure, instead of as many as the time allows",
    )
    add("--seconds", type=_above_zero(float), help="time per measure and workload")
    add("--threads", type=_above_zero(int), help="threads that torch may use on the CPU")
    add("--compiled", action="store_true", help="also a stock step through torch.compile")
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="save the results there, named after the GPU or the CPU; by default they go to "
        f"{FOLDER}, with the time in their names",
    )
    add("--csv", type=Path, metavar="FILE", help="save all samples in this file")
    add("--plot", type=Path, metavar="FILE", help="save the picture; the ending says what kind")
    add("--markdown", type=Path, metavar="FILE", help="save the tables and the machine")
    return parser


def simulate(arguments: Sequence[str]) -> None:
    """Start again on simulated CUDA, unless this process already runs there."""
    if os.environ.get(SCHEDULE) == NO_WORK:
        return
    if not SIMULATION.is_file():
        raise RequestError(
            f"--device simulated: there is no {SIMULATION}; the simulation comes with a clone of "
            "the repository, not with the package. Run it there, after `USE_CUDA=1 make build`"
        )
    own = os.path.relpath(SCRIPT)
    command = [str(SIMULATION), "--schedule", NO_WORK, "--run", sys.executable, own]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command, *arguments])


def choose_device(name: str) -> torch.device:
    """The device asked for; asking for a GPU that torch does not see is an error."""
    found = torch.cuda.is_available()
    if name in ("cuda", "simulated") and not found:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        raise RequestError(
            f"torch {torch.__version__} ({built}) sees no CUDA GPU; use --device cpu or auto"
        )
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def plan(options: argparse.Namespace) -> tuple[list[str], list[str], list[float | str], Budget]:
    """Suites, models, frozen shares and time budget that follow from the options."""
    only_host = options.device == "simulated"
    asked = options.suite or (["synthetic"] if only_host else list(DEFAULT_SUITES))
    if only_host and asked != ["synthetic"]:
        raise RequestError(
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
    wanted: Iterable[str], needs: Callable[[str], object], *, explicit: bool
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


def make_suites(
    options: argparse.Namespace, device: torch.device, *, simulated: bool
) -> list[Suite]:
    """The suites asked for, as far as their packages and their memory are there."""
    names, models, shares, budget = plan(options)
    quick, each = options.quick, budget.seconds
    synthetic = 0.3 + 1.2 * each

    def those(wanted: Sequence[str], needs: Callable[[str], object] = needs_of) -> list[str]:
        named = options.models is not None
        return list(usable(options.models or wanted, needs, explicit=named))

    def models_suite() -> Suite:
        chosen = those(models)
        run = partial(speed.run_models, chosen, shares)
        return Suite("models", speed_report, run, 3 * len(chosen) * len(shares), 2.2 + each)

    def targets_suite() -> Suite:
        on_gpu = device.type == "cuda"
        wanted = targets.ON_SIMULATED_CUDA if simulated else targets.ON_CUDA
        chosen = list(usable(wanted if on_gpu else targets.ON_CPU, needs_of, explicit=False))
        return Suite(
            "targets",
            speed_report,
            partial(targets.run, chosen, simulated),
            targets.parts(chosen, device),
            1.5 + 1.5 * each,
            partial(targets.reached, chosen, simulated),
            f"speed to reach on {'a GPU' if on_gpu else 'a CPU of 2 cores'}",
            tables=on_gpu,
        )

    def memory_suite() -> Suite:
        usual = memory.QUICK_MEMORY_MODELS if quick else memory.MEMORY_MODELS
        chosen = those(usual, partial(memory.require_memory_for, device=device))
        share = next((share for share in options.frozen or [] if share), 50.0)
        run, parts = partial(memory.run, chosen, share, quick), memory.parts(chosen, device)
        seconds, reached = 3.0 if quick else 15.0, memory_report.reached
        return Suite("memory", memory_report, run, parts, seconds, reached, "memory to reach")

    def load_suite() -> Suite:
        chosen = those(load.LOAD_MODELS)
        runs = sum((load.QUICK_RUNS if quick else load.RUNS).values())
        run, seconds = partial(load.run, chosen, quick), runs / 2 * (6.9 + each)
        return Suite("load", load, run, 2 * len(chosen), seconds, load.reached, "under load")

    makers: dict[str, Callable[[], Suite]] = {
        "synthetic": partial(Suite, "synthetic", speed_report, speed.run_synthetic, 6, synthetic),
        "models": models_suite,
        "digits": partial(Suite, "digits", speed_report, digits.run, 2, 3.0),
        "targets": targets_suite,
        "memory": memory_suite,
        "load": load_suite,
    }
    kept = usable(names, _needs_of_suite, explicit=options.suite is not None)
    return [makers[name]() for name in kept]


def _needs_of_suite(name: str) -> None:
    if name == "digits":
        require("sklearn", "scikit-learn", "the digits suite")


def files_of(
    options: argparse.Namespace, described: dict[str, str], suites: Sequence[str]
) -> list[Path]:
    """Where the samples, the tables and the picture of this run go.

    Raises:
        RequestError: a picture that cannot be drawn was asked for, or results of simulated CUDA
            would be among the recorded ones.
    """
    only_host = options.device == "simulated"
    alone = len(suites) == 1 and suites[0] in _OF_THEIR_OWN
    stem = slug(described) + (f"_{suites[0]}" if alone else "")
    stem = HOST_TIME_FILE if only_host else stem
    if options.results is None:
        stem = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{stem}"
    folder = options.results or FOLDER
    if options.plot and options.plot.suffix[1:].lower() not in figures.kinds():
        known = ", ".join(figures.kinds())
        raise RequestError(f"--plot: cannot draw {options.plot.name!r}; known endings: {known}")
    if options.plot and list(suites) == ["load"]:
        raise RequestError("--plot: the load suite draws no picture")
    files = [
        options.csv or folder / f"{stem}.csv",
        options.markdown or folder / f"{stem}.md",
        options.plot or folder / f"{stem}.png",
    ]
    for file in files if "simulated" in described else []:
        recorded = RECORDED in file.resolve().parents
        if recorded and not (only_host and file.stem == HOST_TIME_FILE):
            raise RequestError(
                f"{file}: results of simulated CUDA are not kept in {RECORDED}, where a GPU's "
                "belong; name another folder with --results, as in --results build/simulated"
            )
    return files


@dataclass
class Job:
    """A run: first what it will do, all of it known to be possible, then what it found."""

    suites: list[Suite]
    setting: Setting
    described: dict[str, str]
    files: list[Path]
    left_out: dict[str, str]
    """Other packages that are not among the contestants, and why."""
    targets: list[Reached] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    shares_of_time: list[float] = field(default_factory=list)

    @property
    def measured(self) -> list[Measured]:
        """Everything that was measured so far."""
        return [found for suite in self.suites for found in suite.measured]

    def reports(self) -> list[tuple[Report, list[Measured]]]:
        """Each report with the records of its suites, if there are any."""
        found: dict[int, tuple[Report, list[Measured]]] = {}
        for suite in self.suites:
            if suite.measured:
                found.setdefault(id(suite.report), (suite.report, []))[1].extend(suite.measured)
        return list(found.values())


def prepare(options: argparse.Namespace) -> Job:
    """Find out what will be done, and that it can be; else raise RequestError."""
    device = choose_device(options.device)
    simulated = is_simulated(device)
    if simulated and not torch_freeze.build_info().cuda:
        raise RequestError(
            "simulated CUDA: the module has no CUDA code; run `USE_CUDA=1 make build` first"
        )
    suites = make_suites(options, device, simulated=simulated)
    if options.threads:
        torch.set_num_threads(options.threads)
    described, computes = describe(device), options.device != "simulated"
    if simulated:
        described["simulated"] = SIMULATED_WARNINGS[not computes]
    files = files_of(options, described, [suite.name for suite in suites])
    make_room(files)
    family = FAMILIES[options.optimizer]
    others, left_out = other_packages(family, device)
    setting = Setting(
        device=device,
        budget=plan(options)[-1],
        rng=random.Random(0),
        progress=lambda text: None,
        family=family,
        compiled=options.compiled,
        others=others,
        computes=computes,
    )
    return Job(suites, setting, described, files, left_out)


_BAR = "{percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} left{postfix}"


def measure(job: Job) -> None:
    """Run the suites, printing each table when it is there."""
    setting = job.setting
    total = sum(suite.seconds * suite.parts for suite in job.suites)
    # disable=None: no bar where stderr is no terminal. smoothing=0: what is left is estimated from
    # everything that is over, not from the last part.
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
            job.shown.append(text)
            tqdm.write(text + "\n", file=sys.stdout)

        setting = dataclasses.replace(setting, progress=progress)
        show(filled(headline(job.described)))
        if "simulated" in job.described:
            show(filled(job.described["simulated"]))
        left = [indented(f"{name}: {why}") for name, why in job.left_out.items()]
        if left and {suite.name for suite in job.suites} - {"memory", "load"}:
            show("\n".join(["Not among the contestants:", *left]))
        takes = f"{total / 60:.1f} minutes" if total > 100 else f"{round(total, -1):.0f} seconds"
        tqdm.write(f"This takes about {takes} on two idle cores.\n", file=sys.stdout)
        for suite in job.suites:
            weight = suite.seconds
            for found in suite.run(setting):
                suite.measured.append(found)
                if suite.tables:
                    show(suite.report.table(found, setting.family))
            if reached := list(suite.targets(suite.measured, setting)):
                job.targets += reached
                show(targets_table(reached, suite.heading))


def unequal(job: Job) -> list[str]:
    """Every contestant whose result is not the reference's, with its workload."""
    label = job.setting.family.label
    return [f"{label(c)} on {m.title}" for m in job.measured for c in m.contestants if m.unequal(c)]


def verdict(job: Job, warnings: Sequence[str | None]) -> str:
    """The summary at the end of a run, with what a reader must know first of all."""
    lines = [warning for warning in warnings if warning]
    if wrong := unequal(job):
        lines.append(
            f"WRONG RESULT (further from stock than rounding explains): {'; '.join(wrong)}."
        )
    for report, found in job.reports():
        lines += report.summary(found, job.setting)
    return "\n".join(map(listed, [*lines, *targets_summary(job.targets)]))


def finish(job: Job, *, cut_short: str | None = None) -> bool:
    """Print what it all means and save it.

    Returns:
        Whether every file is where it was wanted.
    """
    setting = job.setting
    sentences = [report.legend(found, setting) for report, found in job.reports()]
    explained = ["\n".join(map(filled, each)) for each in sentences if each]
    warnings = [job.described.get("simulated"), cut_short, company(job.shares_of_time)]
    summary = verdict(job, warnings)
    print("\n\n".join([*explained, f"Verdict\n{summary}"]) + "\n")
    csv_file, markdown_file, plot_file = job.files
    command = " ".join(["python", *sys.argv])
    markdown = as_markdown(job.described, command, [*job.shown, *explained], summary)
    placed = [write(csv_file, to_csv(job.measured)), write(markdown_file, markdown)]
    for number, (report, found) in enumerate(job.reports()):
        name = f"{plot_file.stem}_{found[0].suite}" if number else plot_file.stem
        if (drawn := report.draw(found, setting)) is not None:
            signed = figures.encode(drawn, plot_file.suffix[1:], headline(job.described))
            placed.append(write(plot_file.with_stem(name), signed))
    return all(placed)


def run(options: argparse.Namespace) -> int:
    """Do what the options ask for and return the exit status."""
    job = prepare(options)
    job.shares_of_time.append(granted_share())
    try:
        measure(job)
    except BaseException as error:
        if job.measured:
            job.shares_of_time.append(granted_share())
            why = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else repr(error)
            finish(job, cut_short=f"Ended early by {why}: this was measured before.")
        raise
    job.shares_of_time.append(granted_share())
    placed = finish(job)
    if unequal(job):
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
    except RequestError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
