"""Measure FrozenAwareSGD against every form of stock SGD.

Run ``python benchmarks/compare.py --help`` for the options. Ends with status 0, with 1 if a
contestant computed something else than stock does, and with 2 if asked for what cannot be done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from digits import DigitsOutcome, run_digits
from load import LOAD_MODELS, LoadOutcome, load_table, load_targets, run_load
from machine import company, describe, granted_share, headline, slug
from measure import Budget
from memory_plot import save_memory
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
from plots import save
from suites import Outcome, Setting, run_models, run_synthetic
from tables import digits_table, legend, outcome_table, targets_table
from targets import Reached, networks, run_targets
from targets import parts as target_parts
from verdict import unequal, verdict

SUITES = ("synthetic", "models", "digits", "targets", "memory", "load")
TARGET_OF = {"cpu": "a CPU of 2 cores", "cuda": "a GPU"}
DEFAULT_SUITES = ("synthetic", "models", "digits")


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much a run covers where the options do not say it."""

    models: tuple[str, ...]
    frozen: str
    budget: Budget


QUICK = Extent(("resnet50", "mobilenet_v3_small"), "0,head", Budget(0.2, least=3))
USUAL = Extent(("resnet50", "vit_b_16", "mobilenet_v3_small"), "0,50,head", Budget(0.8, least=3))
FULL = Extent(ALL_MODELS, "0,50,90,head", Budget(1.5))


class NoGpuError(RuntimeError):
    """A GPU was asked for and there is none."""


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


def _output(text: str) -> Path:
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent}")
    return path


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute()}")
    return path


def make_parser() -> Parser:
    """The command line's options."""
    parser = Parser(
        prog="compare.py",
        description="Measure FrozenAwareSGD against every form of stock SGD, in turns.",
    )
    add = parser.add_argument
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: a GPU if there is one",
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
    add("--quick", action="store_true", help="fewer models, shares and rounds: a look")
    add(
        "--steps",
        type=_above_zero(int),
        help="rounds per measure, instead of as many as the time allows",
    )
    add("--seconds", type=_above_zero(float), help="time per measure and workload")
    add("--threads", type=_above_zero(int), help="threads torch may use on the CPU")
    add("--compiled", action="store_true", help="also a stock step through torch.compile")
    add("--json", type=_output, metavar="FILE", help="write all samples, the machine and versions")
    add("--plot", type=_output, metavar="FILE", help="write a PNG picture")
    add("--markdown", type=_output, metavar="FILE", help="write what is printed, and the machine")
    add(
        "--results",
        type=_folder,
        metavar="FOLDER",
        help="write all three into it, named after the GPU or the CPU",
    )
    return parser


def choose_device(name: str) -> torch.device:
    """The device asked for.

    Raises:
        NoGpuError: a GPU was asked for and torch sees none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        raise NoGpuError(
            f"torch {torch.__version__} ({built}) sees no CUDA GPU; use --device cpu or auto"
        )
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def plan(options: argparse.Namespace) -> tuple[list[str], list[str], list[float | str], Budget]:
    """Suites, models, frozen shares and time budget that follow from the options."""
    asked = options.suite or list(DEFAULT_SUITES)
    suites = [suite for suite in SUITES if suite in asked or "all" in asked]
    extent = QUICK if options.quick else FULL if "all" in asked else USUAL
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


def _without_functions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if not callable(value)}


def _write_json(path: Path, found: dict[str, Any]) -> None:
    text = json.dumps(found, indent=1, default=str)
    # Samples in a line, and not each in its own.
    text = re.sub(
        r"\[\s+([-+.eE\d,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text
    )
    path.write_text(text + "\n")


def _write_markdown(
    path: Path, described: dict[str, Any], shown: Sequence[str], summary: str
) -> None:
    facts = {key: value for key, value in described.items() if not isinstance(value, (dict, list))}
    facts |= {key: value for key, value in described["versions"].items() if value is not None}
    path.write_text(
        "\n\n".join(
            [
                f"# {headline(described)}",
                f"`{' '.join(['python', *sys.argv])}`",
                "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())]),
                *(f"```\n{text}\n```" for text in shown),
                "## Verdict",
                summary.partition("\n")[2] + "\n",
            ]
        )
    )


_BAR = "{percentage:3.0f}% |{bar:30}| {elapsed}{postfix}"


def _parts(suites: Sequence[str], workloads: int, targets: int, memory: int, load: int) -> int:
    """How often the suites will tell their progress."""
    told = {
        "synthetic": 3 * 2,
        "models": 3 * workloads,
        "digits": 2,
        "targets": targets,
        "memory": memory,
        "load": load,
    }
    return sum(told[suite] for suite in suites)


def run(options: argparse.Namespace) -> int:
    """Do what the options ask for and return the exit status.

    Raises:
        MissingPackageError: something asked for by name needs a package that is not installed.
        NotEnoughMemoryError: a model asked for by name does not fit.
        NoGpuError: a GPU was asked for and there is none.
    """
    device = choose_device(options.device)
    tqdm = require("tqdm", "tqdm", "the progress bar").tqdm
    require("tabulate", "tabulate", "the tables")
    if options.plot or options.results:
        require("matplotlib", "matplotlib", "--plot")
    suites, models, shares, budget = plan(options)
    suites = list(usable(suites, _needs_of_suite, explicit=options.suite is not None))
    if "models" in suites:
        models = list(usable(models, _needs_of_model, explicit=options.models is not None))
    target_models: list[str] = []
    if "targets" in suites:
        target_models = list(usable(networks(device), _needs_of_model, explicit=False))
    memory_models, memory_share = _memory_plan(options)
    if "memory" in suites:
        memory_models = list(
            usable(
                memory_models,
                lambda key: require_memory_for(key, device),
                explicit=options.models is not None,
            )
        )
    load_models = options.models or list(LOAD_MODELS)
    if "load" in suites:
        load_models = list(
            usable(load_models, _needs_of_model, explicit=options.models is not None)
        )
    if options.threads:
        torch.set_num_threads(options.threads)

    described = describe(device)
    if options.results:
        stem = slug(described) + ("_memory" if suites == ["memory"] else "")
        for kind, suffix in (("json", "json"), ("markdown", "md"), ("plot", "png")):
            if getattr(options, kind) is None:
                setattr(options, kind, options.results / f"{stem}.{suffix}")
    shares_of_time = [granted_share()]
    outcomes: list[Outcome] = []
    digits: DigitsOutcome | None = None
    targets: list[Reached] = []
    memory: list[MemoryOutcome] = []
    load: list[LoadOutcome] = []
    shown: list[str] = []
    total = _parts(
        suites,
        len(models) * len(shares),
        target_parts(target_models, device),
        parts(memory_models, device),
        2 * len(load_models),
    )
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=total, disable=None, leave=False, bar_format=_BAR) as bar:

        def progress(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        setting = Setting(device, budget, options.compiled, random.Random(0), progress)

        def show(text: str) -> None:
            shown.append(text)
            tqdm.write(text + "\n", file=sys.stdout)

        show(headline(described))
        if "synthetic" in suites:
            for outcome in run_synthetic(setting):
                outcomes.append(outcome)
                show(outcome_table(outcome))
        if "models" in suites:
            for outcome in run_models(models, shares, setting):
                outcomes.append(outcome)
                show(outcome_table(outcome))
        if "digits" in suites:
            digits = run_digits(setting)
            show(digits_table(digits))
        if "targets" in suites:
            measured, targets = run_targets(setting, models=target_models)
            outcomes += measured
            if device.type == "cuda":
                for outcome in measured:
                    show(outcome_table(outcome))
            show(targets_table(targets, f"speed to reach on {TARGET_OF[device.type]}"))
        if "memory" in suites:
            for found in run_memory(memory_models, memory_share, setting, quick=options.quick):
                memory.append(found)
                show(memory_table(found))
            reached = memory_targets(memory)
            show(targets_table(reached, "memory to reach"))
            targets += reached
        if "load" in suites:
            for under_load in run_load(load_models, setting, quick=options.quick):
                load.append(under_load)
                show(load_table(under_load))
            reached = load_targets(load)
            show(targets_table(reached, "under load"))
            targets += reached
    if outcomes or digits:
        shown.append(legend(device.type, outcomes, trained=digits is not None))
        print(shown[-1])
    if memory:
        shown.append(memory_legend(device.type))
        print(shown[-1])
    shares_of_time.append(granted_share())
    described["share of its threads' time"] = shares_of_time
    summary = verdict(outcomes, digits, targets, memory=memory, warning=company(shares_of_time))
    print(f"\n{summary}")

    if options.json:
        _write_json(
            options.json,
            {
                "command": sys.argv,
                "machine": described,
                "budget": dataclasses.asdict(budget),
                "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
                "digits": dataclasses.asdict(digits) if digits else None,
                "targets": [dataclasses.asdict(line) for line in targets],
                "memory": [
                    dataclasses.asdict(found, dict_factory=_without_functions) for found in memory
                ],
                "verdict": summary.splitlines(),
            },
        )
    if options.markdown:
        _write_markdown(options.markdown, described, shown, summary)
    if options.plot and outcomes:
        save(options.plot, outcomes, headline(described))
    if options.plot and memory:
        plot: Path = options.plot
        if outcomes:
            plot = plot.with_stem(f"{plot.stem}_memory")
        save_memory(plot, memory, headline(described))
    return 1 if unequal(outcomes, digits, memory) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, run, and turn what a user can mend into one line and status 2."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (MissingPackageError, NotEnoughMemoryError, NoGpuError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
