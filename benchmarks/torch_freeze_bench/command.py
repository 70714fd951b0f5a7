"""The command: its options, what follows from them, and a run from plan to files."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

import torch_freeze

from . import checks, figures, report
from .checks import MissingPackageError, RequestError
from .contestants import FAMILIES, SGD, installed
from .machine import company, describe, granted_share, headline, is_simulated, slug
from .records import Measured, to_csv
from .saving import make_room, write
from .suites import digits, epochs, load, memory, rows, speed, targets
from .suites.base import Setting, Suite
from .tables import WIDTH, Reached, filled, listed, render, targets_summary
from .timing import Budget
from .workloads import MODELS

SUITES = {
    "speed": speed.suite,
    "digits": digits.suite,
    "targets": targets.suite,
    "memory": memory.suite,
    "load": load.suite,
    "epochs": epochs.suite,
    "rows": rows.suite,
}
DEFAULT_SUITES = ("speed", "digits")
_BENCHMARKS = Path(__file__).resolve().parents[1]
SCRIPT = _BENCHMARKS / "compare.py"
RECORDED = _BENCHMARKS / "results"
FOLDER = Path("compare-results")
"""Where results go, in the current folder, with the time in their names."""
SIMULATION = _BENCHMARKS.parent / "tests" / "cuda_on_cpu" / "run.py"
"""Only in a clone of the repository: the tests are not part of the package."""
SCHEDULE, NO_WORK = "CUDA_ON_CPU_SCHEDULE", "never"
HOST_TIME_FILE = "simulated_cuda_host_time"
SIMULATED_WARNINGS = {
    True: "Simulated CUDA: there was no GPU, and no kernel ran. The times are the host's alone, "
    "until step() returns, with launches that return at once.",
    False: "Simulated CUDA: there was no GPU. The CPU ran the kernels, so the times show that the "
    "benchmark runs and say nothing about a GPU's speed. The targets' flat sets have a thousandth "
    "of the elements that their names say.",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Write the message and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser() -> Parser:
    """The command line's options."""
    about = "Measure this package's optimizers against every form of stock, in turns."
    parser = Parser(prog="compare.py", description=about)
    add, suites = parser.add_argument, ",".join(SUITES)
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
        type=checks.names([*SUITES, "all"], "suite"),
        help=f"of {suites}, or all (default: {','.join(DEFAULT_SUITES)})",
    )
    add("--models", type=checks.names(list(MODELS), "model"), help=f"of {','.join(MODELS)}")
    add(
        "--frozen",
        type=checks.shares,
        help="percents of the elements, or head for all but it (default: 0,50,head)",
    )
    add("--quick", action="store_true", help="one network and fewer rounds: a first look")
    add("--steps", type=checks.above_zero(int), help="rounds per measure, whatever they take")
    add("--seconds", type=checks.above_zero(float), help="time per measure and workload")
    add("--threads", type=checks.above_zero(int), help="threads that torch may use on the CPU")
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="save the results there, named after the GPU or the CPU; by default they go to "
        f"{FOLDER}, with the time in their names",
    )
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


def budget_of(options: argparse.Namespace) -> Budget:
    """How long each measure may take."""
    if options.steps is not None:
        return Budget(options.seconds or 60, least=options.steps, most=options.steps)
    if options.seconds is not None:
        return Budget(options.seconds, most=10_000)
    return Budget(0.2 if options.quick else 0.5)


def make_suites(options: argparse.Namespace, setting: Setting) -> list[Suite]:
    """The suites asked for, as far as their packages and their memory are there."""
    asked = options.suite or (DEFAULT_SUITES if setting.computes else ("speed",))
    if not setting.computes and set(asked) != {"speed"}:
        raise RequestError(
            "--device simulated: measures host time in the suite speed alone; use --device cpu or "
            "cuda for the others"
        )
    suites = []
    for name, make in SUITES.items():
        if name in asked or "all" in asked:
            try:
                suites.append(make(setting))
            except MissingPackageError as missing:
                if options.suite:
                    raise
                print(f"skipped {name}: {missing}", file=sys.stderr)
    return suites


def files_of(
    results: Path | None, described: dict[str, str], suites: Sequence[str], optimizer: str
) -> Path:
    """Where the results of this run go, without an ending.

    Raises:
        RequestError: results of simulated CUDA would be among the recorded ones.
    """
    stem = slug(described)
    if described.get("simulated") == SIMULATED_WARNINGS[True]:
        stem = HOST_TIME_FILE
    elif "simulated" in described and RECORDED in ((results or FOLDER) / "any").resolve().parents:
        raise RequestError(
            f"--results: results of simulated CUDA are not kept in {RECORDED}, where a GPU's "
            "belong; name another folder, as in --results build/simulated"
        )
    elif len(suites) == 1 and suites[0] not in DEFAULT_SUITES:
        stem += f"_{suites[0]}"
    if FAMILIES[optimizer] is not SGD:
        stem += f"_{optimizer}"
    return results / stem if results else FOLDER / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{stem}"


@dataclass
class Job:
    """A run: first what it will do, all of it known to be possible, then what it found."""

    suites: list[Suite]
    setting: Setting
    described: dict[str, str]
    files: Path
    """Where the results go, without an ending."""
    targets: list[Reached] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    shares_of_time: list[float] = field(default_factory=list)

    @property
    def measured(self) -> list[Measured]:
        """Everything that was measured so far."""
        return [found for suite in self.suites for found in suite.measured]


def prepare(options: argparse.Namespace) -> Job:
    """Find out what will be done, and that it can be; else raise RequestError."""
    device, family = choose_device(options.device), FAMILIES[options.optimizer]
    simulated, computes = is_simulated(device), options.device != "simulated"
    if simulated and not torch_freeze.build_info().cuda:
        raise RequestError(
            "simulated CUDA: the module has no CUDA code; run `USE_CUDA=1 make build` first"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    packages, left_out = installed(family, device)
    setting = Setting(
        device,
        budget_of(options),
        family=family,
        packages=packages,
        models=options.models,
        shares=options.frozen,
        quick=options.quick,
        simulated=simulated,
        computes=computes,
    )
    suites = make_suites(options, setting)
    described = describe(device)
    # The memory suite has contestants of its own, and its tables say which of them were not run.
    if any(suite.name != "memory" for suite in suites):
        described["not compared"] = "; ".join(f"{name} ({why})" for name, why in left_out.items())
    if simulated:
        described["simulated"] = SIMULATED_WARNINGS[not computes]
    names = [suite.name for suite in suites]
    files = files_of(options.results, described, names, family.key)
    make_room(files.parent)
    return Job(suites, setting, described, files)


def measure(job: Job) -> None:
    """Run the suites, printing each table when it is there."""
    family = job.setting.family
    # disable=None: no bar where stderr is no terminal. smoothing=0: what is left is estimated from
    # everything that is over, not from the last part.
    with tqdm(
        total=sum(len(suite.tasks) for suite in job.suites),
        disable=None,
        leave=False,
        bar_format="{n}/{total} |{bar:20}| {elapsed}, about {remaining} left{postfix}",
        ncols=WIDTH - 1,
        smoothing=0,
    ) as bar:

        def show(text: str) -> None:
            job.shown.append(text)
            tqdm.write(text + "\n", file=sys.stdout)

        show(filled(headline(job.described)))
        if "simulated" in job.described:
            show(filled(job.described["simulated"]))
        for suite in job.suites:
            while suite.tasks:  # each is let go of with what it holds
                title, task = suite.tasks.pop(0)
                bar.set_postfix_str(title)
                suite.measured.append(task())
                bar.update()
                if suite.tables:
                    show(report.table(suite.measured[-1], family))
            if reached := list(suite.targets(suite.measured)):
                job.targets += reached
                show(render([suite.heading, "measured", "target", ""], reached))


def verdict(job: Job, warnings: Sequence[str | None]) -> str:
    """The summary at the end of a run, with what a reader must know first of all."""
    lines = [warning for warning in warnings if warning]
    lines += report.summary(job.measured, job.setting.family)
    return "\n".join(map(listed, [*lines, *targets_summary(job.targets)]))


def finish(job: Job, *, cut_short: str | None = None) -> bool:
    """Print what it all means and save it.

    Returns:
        Whether every file is where it was wanted.
    """
    found, family, machine = job.measured, job.setting.family, headline(job.described)
    explained = "\n".join(map(filled, report.legend(found, family)))
    warnings = [job.described.get("simulated"), cut_short, company(job.shares_of_time)]
    summary = verdict(job, warnings)
    print("\n\n".join(filter(None, [explained, f"Verdict\n{summary}\n"])))
    facts = "\n".join(f"| {name} | {value} |" for name, value in job.described.items())
    parts = [f"# {machine}", f"`{' '.join(['python', *sys.argv])}`", f"| | |\n|---|---|\n{facts}"]
    parts += [f"```\n{text}\n```" for text in (*job.shown, explained) if text]
    markdown = "\n\n".join([*parts, "## Verdict", summary]) + "\n"
    files = {".csv": to_csv(found), ".md": markdown.encode()}
    for number, figure in enumerate(figures.draw(found, family)):
        files[f"{f'_{number + 1}' if number else ''}.png"] = figures.encode(figure, machine)
    placed = [write(job.files.with_name(job.files.name + end), data) for end, data in files.items()]
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
    if report.unequal(job.measured, job.setting.family):
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
