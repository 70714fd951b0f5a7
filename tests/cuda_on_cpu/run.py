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


def run_tests(schedule: str, arguments: list[str]) -> Counter[str]:
    """Run the tests under one schedule, and count how they ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_on_cpu.plugin", "-m", "gpu"]
    if schedule not in SCHEDULES[:2]:
        names = ("test_cuda.py", "test_cuda_promises.py", "test_cuda_counts.py")
        command += ["-k", ORDER_TELLS, *(str(TESTS / "kernels" / name) for name in names)]
    else:
        # To load the others would take longer than to run these.
        command += [str(p) for p in sorted(TESTS.rglob("test_*.py")) if GPU.search(p.read_text())]
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
    if done.returncode != 0 and ended["failed"] == 0:
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = sum(
            pool.map(lambda schedule: run_tests(schedule, arguments), schedules), Counter[str]()
        )
    counts = ", ".join(f"{ended[word]} {word}" for word in ("passed", "failed", "skipped"))
    print(f"test-cuda: {counts}, under {len(schedules)} schedules")
    return 1 if ended["failed"] or not ended["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
