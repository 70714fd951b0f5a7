"""Runs the GPU tests on simulated CUDA, under several orders of the work on its streams.

    python tests/cuda_on_cpu/run.py [pytest's arguments]
    python tests/cuda_on_cpu/run.py --schedule late --run python any_script.py

The schedules: `now`; `late`, as late as CUDA allows; `side-late` and `main-late`, of the one kind
of streams alone; or a number, the seed of an order in between. Under `never` no kernel runs at
all, ATen's included: for the time that the host takes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
sys.path.insert(0, str(ROOT))

from tests import cuda_on_cpu  # noqa: E402
from tests.cuda_on_cpu import build  # noqa: E402

# Every test under the first; as late as possible, all pairs of its parameters' values; under the
# others those on which the order of streams tells.
SCHEDULES = ("now", "late", "side-late", "main-late", "2", "3")
GPU = re.compile(r"mark\.gpu|DEVICES|helpers.hostile")
# A context is made whatever the order; its tests start processes, which take long.
ORDER_TELLS = "(Graphs or Streams or Devices or InBackward or promises or counts) and not Contexts"
NO_TESTS = 5  # pytest's exit status where its arguments choose none


def environment(schedule: str) -> dict[str, str]:
    """The environment of a process that runs on the simulation."""
    preloaded = [str(build.OUT / soname) for soname in build.STAND_INS.values()]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        cuda_on_cpu.SCHEDULE: schedule,
        "LD_PRELOAD": " ".join(preloaded),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",  # the kernels' own work is too small to share
    }


def files(schedule: str) -> list[list[Path]]:
    """The files of the tests under a schedule, for each process that runs some of them."""
    if schedule not in SCHEDULES[:2]:
        names = ("test_cuda.py", "test_cuda_promises.py", "test_cuda_counts.py")
        return [[TESTS / "kernels" / name for name in names]]
    # To load the others would take longer than to run these.
    found = [path for path in sorted(TESTS.rglob("test_*.py")) if GPU.search(path.read_text())]
    if schedule != "late":
        return [found]
    # The longest of the schedules, while whose last half the others would wait, is done in two.
    optim = [path for path in found if path.parent.name == "optim"]
    return [optim, [path for path in found if path not in optim]]


def run_tests(schedule: str, paths: list[Path], arguments: list[str]) -> Counter[str]:
    """Run the tests of some files under one schedule, and count how they ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_on_cpu.plugin", "-m", "gpu"]
    command += map(str, paths)
    if schedule not in SCHEDULES[:2]:
        command += ["-k", ORDER_TELLS]
    if schedule == "late":
        command.append("--pairwise")
    begin = time.monotonic()
    done = subprocess.run(
        [*command, *arguments],
        env=environment(schedule),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines() or [""]
    counted = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])
    }
    ended = Counter({word: counted.get(word, 0) for word in ("passed", "failed", "skipped")})
    ended["failed"] += counted.get("error", 0)
    if done.returncode not in (0, NO_TESTS) and ended["failed"] == 0:
        ended["failed"] = 1  # pytest itself did not get to its end
    print(f"=== schedule {schedule}, {time.monotonic() - begin:.0f} s")
    print(done.stdout if ended["failed"] else "\n".join(lines[-40:]), flush=True)
    return ended


def main() -> int:
    """Run a command, or all tests under all schedules."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--schedule", help="this one alone")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="a command, in place of the tests")
    options, arguments = parser.parse_known_args()
    build.main()
    if options.run:
        environ = environment(options.schedule or "now")
        os.execvpe(options.run[0], options.run, environ)
    import torch_freeze

    if not torch_freeze.build_info().cuda:
        raise SystemExit("make test-cuda: the module has no CUDA code; run `USE_CUDA=1 make build`")
    schedules = [options.schedule] if options.schedule else SCHEDULES
    parts = [(schedule, paths) for schedule in schedules for paths in files(schedule)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = list(pool.map(lambda part: run_tests(*part, arguments), parts))
    total = sum(ended, Counter[str]())
    for schedule in schedules:
        if not any(e.total() for (its, _), e in zip(parts, ended, strict=True) if its == schedule):
            print(f"=== schedule {schedule} has no tests")
            total["failed"] += 1
    counts = ", ".join(f"{total[word]} {word}" for word in ("passed", "failed", "skipped"))
    print(f"test-cuda: {counts}, under {len(schedules)} schedules")
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
