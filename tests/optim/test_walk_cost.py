"""How many instructions a step spends on each parameter, against the figures in walk_cost.json.

Times on shared machines say little; instructions, counted by valgrind, hardly vary. What is counted
is the whole of `optimizer.step()` on one-element tensors, and the figure is the slope between two
counts of them, so that what a step costs once cancels. Compilers, torches and Pythons differ: where
walk_cost.json has no figures for them, the margin is wider.

A change that makes steps cheaper, or more expensive for a reason, records new figures and says why:

    python -m tests.optim.test_walk_cost
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import torch_freeze
from tests.optim import walk_cost_run

HERE = Path(__file__).parent
RECORD = HERE / "walk_cost.json"
SGD_LAUNCH = "void torch_freeze::launch_cpu<torch_freeze::SgdFormula>"
MARGIN = 0.15
MARGIN_ELSEWHERE = 0.6


def environment() -> str:
    """What the figures depend on, apart from the code."""
    compiler = torch_freeze.build_info().compiler
    version = re.search(r"(\d+)\.\d+", compiler)
    name = "clang" if "clang" in compiler else "gcc"
    return (
        f"torch {'.'.join(torch.__version__.split('.')[:2])}, "
        f"Python {sys.version_info.major}.{sys.version_info.minor}, "
        f"{name} {version[1] if version else '?'}, {platform.machine()}"
    )


def why_not() -> str | None:
    """Why nothing can be counted here; None where it can."""
    if torch_freeze.build_info().debug:
        return "this is a debug build"
    if "libasan" in os.environ.get("LD_PRELOAD", "") or "libtsan" in os.environ.get(
        "LD_PRELOAD", ""
    ):
        return "this is a sanitizer's build"
    for tool in ("valgrind", "cc"):
        if not shutil.which(tool):
            return f"there is no {tool}; apt-get install valgrind gcc"
    test = subprocess.run(
        ["cc", "-E", "-x", "c", "-"],
        input="#include <valgrind/callgrind.h>",
        capture_output=True,
        text=True,
    )
    return None if test.returncode == 0 else "there is no valgrind/callgrind.h"


class Measured(NamedTuple):
    each: dict[str, float]  # instructions per parameter (or group) of each kind
    launches: int  # of the kernel, by the one step of `walk_cost_run.ONE_LAUNCH`


def calls_of(function: str, text: str) -> int:
    """How often callgrind saw a function called."""
    found = re.search(rf"fn=\((\d+)\) {re.escape(function)}\(", text)
    assert found, f"callgrind saw no {function}"
    return sum(map(int, re.findall(rf"^cfn=\({found[1]}\).*\ncalls=(\d+)", text, re.MULTILINE)))


def measure() -> Measured:
    """What callgrind counts."""
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder, "marks.so")
        source = str(HERE / "walk_cost_marks.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(marks), source], check=True)
        root = str(Path(torch_freeze.__file__).parents[1])
        command = [
            "valgrind",
            "--tool=callgrind",
            "--instr-atstart=no",
            f"--callgrind-out-file={folder}/out",
            sys.executable,
            str(HERE / "walk_cost_run.py"),
            str(marks),
        ]
        env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        counts: dict[str, dict[int, int]] = {}
        launches = 0
        for file in Path(folder).glob("out.*"):
            text = file.read_text()
            mark = re.search(r"Client Request: (.+)/(\d+)", text)
            total = re.search(r"^summary: (\d+)", text, re.MULTILINE)
            if mark and mark[1] == walk_cost_run.ONE_LAUNCH:
                launches = calls_of(SGD_LAUNCH, text)
            elif mark and total:
                counts.setdefault(mark[1], {})[int(mark[2])] = int(total[1])
    few, many = walk_cost_run.COUNTS
    assert sorted(counts) == sorted(walk_cost_run.KINDS), f"callgrind counted {sorted(counts)}"
    each = {
        kind: round((counts[kind][many] - counts[kind][few]) / (many - few), 1)
        for kind in walk_cost_run.KINDS
    }
    return Measured(each, launches)


@pytest.fixture(scope="module")
def measured() -> Measured:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return measure()


@pytest.mark.parametrize("kind", walk_cost_run.KINDS)
def test_instructions_per_parameter_are_as_recorded(kind: str, measured: Measured) -> None:
    records = json.loads(RECORD.read_text())
    here = records.get(environment())
    wanted = (here or next(iter(records.values())))[kind]
    margin = MARGIN if here else MARGIN_ELSEWHERE
    figure = measured.each[kind]
    assert figure <= wanted * (1 + margin), (
        f"{kind}: {figure} instructions each, where {wanted} are recorded for {environment()}"
    )
    # Far fewer is good news, but with the old record half of the gain could be lost again.
    if here:
        assert figure >= wanted * (1 - margin), (
            f"{kind}: {figure} instructions each, fewer than the {wanted} recorded; record them "
            "again with `python -m tests.optim.test_walk_cost`"
        )


@pytest.mark.parametrize("prefix", ["", "AdamW: "], ids=["SGD", "AdamW"])
def test_a_frozen_parameter_costs_a_tenth_of_a_trainable_one(
    prefix: str, measured: Measured
) -> None:
    """What is frozen is nearly free, whatever the compiler."""
    assert measured.each[f"{prefix}frozen"] < measured.each[f"{prefix}trainable"] / 10


def test_a_frozen_parameter_costs_every_optimizer_the_same(measured: Measured) -> None:
    assert measured.each["AdamW: frozen"] == pytest.approx(measured.each["frozen"], rel=0.1)


def test_momentum_that_a_state_dict_shares_takes_one_launch(measured: Measured) -> None:
    """Buffers are sized by their own type: neighbours do not seem to overlap."""
    assert measured.launches == 1


def main() -> None:
    """Record the figures of this environment."""
    reason = why_not()
    if reason:
        raise SystemExit(reason)
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    records[environment()] = measure().each
    RECORD.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")
    print(environment(), records[environment()])


if __name__ == "__main__":
    main()
