"""Plants faults in the CUDA code, one at a time, and wants the GPU tests to notice each.

    python tests/cuda_on_cpu/mutants.py [part of a fault's name]

Each fault replaces a text in a copy of the source. What it changes is compiled and linked with the
rest of the build there is, and tests run on the simulation: first those that should notice, and
where they do not, all of them. A fault that none notices fails the run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.cuda_on_cpu import build  # noqa: E402

CUDA, PROMISES = "kernels/test_cuda.py", "kernels/test_cuda_promises.py"
COUNTS = "kernels/test_cuda_counts.py"
KERNELS = "kernels"  # the bodies that the simulation runs in place of the device code
LAUNCHES = "csrc/optim/sgd_cuda.cu"
STEPS = "csrc/optim/sgd.cpp"
ADAM_LAUNCHES, ADAM_STEPS = "csrc/optim/adam_cuda.cu", "csrc/optim/adam.cpp"
SECONDS = 900  # a fault may make a test go on for ever


class Fault(NamedTuple):
    """A text of a source file, there once, and what is put in its place."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's words for the tests that should notice
    schedule: str = "now"
    compiled: str = ""  # what is compiled with it: KERNELS, or a source of the module


LAUNCH = "csrc/kernels/launch_cuda.cuh"
FORMULA = "csrc/kernels/tile_formula.h"
SGD, ADAM = "csrc/optim/sgd.h", "csrc/optim/adam.h"
TABLES = "csrc/kernels/tiles.h"
STEP = "csrc/core/run_step.h"
WALK = "csrc/core/param_walk.cpp"
RULES = "csrc/core/fallback_rules.cpp"
DTYPES = "csrc/core/dtypes.h"
BACKWARD = "csrc/core/backward_step.cpp"
# What is compiled for a fault in a header.
UNITS = {LAUNCH: LAUNCHES, DTYPES: LAUNCHES, STEP: STEPS}

FAULTS = (
    # How a kernel is launched.
    Fault(
        "launches on the default stream",
        LAUNCH,
        "getCurrentCUDAStream(device)",
        "getDefaultCUDAStream(device)",
        f"{CUDA}::TestStreams",
        "side-late",
    ),
    Fault(
        "launches on a stream of device 0",
        LAUNCH,
        "getCurrentCUDAStream(device)",
        "getCurrentCUDAStream(0)",
        f"{PROMISES}::TestDevices",
    ),
    Fault(
        "does not make the device current",
        LAUNCH,
        "const c10::cuda::CUDAGuard guard(batch.kind.device);\n"
        "  const c10::DeviceIndex device = guard.current_device().index();",
        "const c10::DeviceIndex device = batch.kind.device.index();",
        f"{CUDA}::TestDevices",
    ),
    Fault(
        "launches twice",
        LAUNCH,
        "C10_CUDA_CHECK(cudaLaunchKernel(",
        "for (int i = 0; i < 2; ++i) C10_CUDA_CHECK(cudaLaunchKernel(",
        f"{CUDA}::TestLaunches",
    ),
    Fault(
        "waits for the kernel",
        LAUNCH,
        "C10_CUDA_KERNEL_LAUNCH_CHECK();",
        "C10_CUDA_CHECK(cudaStreamSynchronize(stream));",
        f"{PROMISES}::TestSteadyStep",
    ),
    Fault(
        "launches a block too few",
        LAUNCH,
        "dim3(blocks), dim3",
        "dim3(blocks - (blocks > 1)), dim3",
        f"{CUDA} -k bit_identical",
    ),
    Fault(
        "launches half the threads",
        LAUNCH,
        "dim3(multi_tensor::kThreads),",
        "dim3(multi_tensor::kThreads / 2),",
        f"{CUDA} -k bit_identical",
    ),
    # What the host writes into a kernel's table.
    Fault(
        "splits the tiles evenly and drops the remainder",
        TABLES,
        "longer_blocks = tile_count() % blocks;",
        "longer_blocks = 0;",
        f"{CUDA} -k bit_identical",
        compiled=LAUNCHES,
    ),
    Fault(
        "gives every tensor the first group of its table",
        TABLES,
        "row.group = static_cast<uint16_t>(table.group_count - 1);",
        "row.group = 0;",
        f"{PROMISES} -k groups",
        compiled=LAUNCHES,
    ),
    Fault(
        "writes a group into a table that has no room for it",
        TABLES,
        "table.has_room(group != last_group)",
        "table.has_room(false)",
        f"{PROMISES} -k groups",
        compiled=LAUNCHES,
    ),
    Fault(
        "uses small tables only",
        TABLES,
        "if (bytes <= Small::kStorage) {",
        "if (bytes >= 0) {",
        f"{PROMISES} -k every_size_of_table",
        compiled=LAUNCHES,
    ),
    Fault(
        "rounds every parameter's momentum with the bits of the first",
        FORMULA,
        "rounding_seed, update.index)",
        "rounding_seed, 0)",
        f"{CUDA}::TestNarrowMomentum",
        compiled=LAUNCHES,
    ),
    Fault(
        "takes bfloat16 momentum for float32",
        DTYPES,
        "kind.buffer_type == Each::kBuffer && kind.stochastic == Each::kStochastic",
        "true",
        f"{CUDA}::TestNarrowMomentum",
        compiled=LAUNCHES,
    ),
    Fault(
        "takes float16 gradients for bfloat16",
        DTYPES,
        "kind.grad_type == Each::kGrad",
        "(kind.grad_type == Each::kGrad ||"
        " (kind.grad_type == c10::kHalf && Each::kGrad == c10::kBFloat16))",
        f"{PROMISES} -k another_dtype",
        compiled=LAUNCHES,
    ),
    # The kernel's body.
    Fault(
        "leaves out the last tile of a block",
        TABLES,
        "if (tile >= end) {\n    return;\n  }\n  uint32_t row",
        "if (tile + 1 >= end) {\n    return;\n  }\n  uint32_t row",
        f"{CUDA} -k bit_identical",
        compiled=KERNELS,
    ),
    Fault(
        "begins with the tensor after the one a tile belongs to",
        TABLES,
        "  return low;\n}",
        "  return low + (low + 1 < table.row_count);\n}",
        f"{CUDA} -k bit_identical",
        compiled=KERNELS,
    ),
    Fault(
        "moves vectors at any alignment",
        TABLES,
        "vectors &= shift == 0 || (",
        "vectors &= true || (",
        f"{CUDA} -k misaligned",
        compiled=KERNELS,
    ),
    Fault(
        "shifts a misaligned gradient too little",
        TABLES,
        "(shift & 4) != 0 ? words[i + 1]",
        "(shift & 4) != 0 ? words[i]",
        f"{CUDA} -k misaligned",
        compiled=KERNELS,
    ),
    Fault(
        "reads a vector past the end of a misaligned gradient",
        TABLES,
        "    --span.vectors_end;",
        "",
        f"{PROMISES} -k outside",
        compiled=KERNELS,
    ),
    Fault(
        "writes past the end of a tensor",
        TABLES,
        "- span.lead - row.gap;",
        "- span.lead;",
        f"{CUDA} -k misaligned",
        compiled=KERNELS,
    ),
    Fault(
        "writes though the gradients have overflowed",
        FORMULA,
        "return found_inf != nullptr && *found_inf != 0;",
        "return false && found_inf != nullptr;",
        f"{CUDA}::TestGradScaler",
        compiled=KERNELS,
    ),
    Fault(
        "leaves gradients scaled",
        FORMULA,
        "(kArray == 1 ? scaled :",
        "(kArray == 1 ? false :",
        f"{CUDA}::TestGradScaler",
        compiled=KERNELS,
    ),
    Fault(
        "multiplies by the inverse of any scale",
        FORMULA,
        "values[1][i] / grad_scale",
        "values[1][i] * (1 / grad_scale)",
        f"{CUDA}::TestGradScaler",
        compiled=KERNELS,
    ),
    Fault(
        "reads a float64 learning rate as float32",
        FORMULA,
        "lr.device_is_double ?",
        "false ?",
        f"{CUDA} -k learning_rate",
        compiled=KERNELS,
    ),
    Fault(
        "rounds a whole vector with the bits of its first element",
        FORMULA,
        "static_cast<uint64_t>(element) + static_cast<uint64_t>(i) * stride",
        "static_cast<uint64_t>(element) + 0 * stride",
        f"{CUDA}::TestNarrowMomentum",
        compiled=KERNELS,
    ),
    Fault(
        "ignores dampening",
        SGD,
        "Arith::fma(t.added, d, t.kept * momentum)",
        "d + t.kept * momentum",
        f"{CUDA} -k bit_identical",
        compiled=KERNELS,
    ),
    Fault(
        "dampens the first gradient",
        SGD,
        "fresh ? T(1) : s.undamped",
        "s.undamped",
        f"{CUDA} -k bit_identical",
        compiled=KERNELS,
    ),
    Fault(
        "has nesterov the wrong way round",
        SGD,
        "d = Variant::kNesterov ?",
        "d = !Variant::kNesterov ?",
        f"{CUDA} -k bit_identical",
        compiled=KERNELS,
    ),
    Fault(
        "ignores maximize",
        SGD,
        "T d = s.sign * grad;",
        "T d = grad;",
        f"{CUDA} -k bit_identical",
        compiled=KERNELS,
    ),
    Fault(
        "rounds the product before the sum",
        SGD,
        "param = Arith::fma(t.neg_lr, d, param);",
        "param = t.neg_lr * d + param;",
        f"{CUDA} -k bit_identical",
        compiled=KERNELS,
    ),
    # Adam's formula, and its counts of updates.
    Fault(
        "forgets the largest second moment",
        ADAM,
        "return max_exp_avg_sq;",
        "return exp_avg_sq;",
        f"{COUNTS} -k trains",
        compiled=KERNELS,
    ),
    Fault(
        "adds a decoupled decay to the gradient as well",
        ADAM,
        "if constexpr (Variant::kDecay && !Variant::kDecoupled) {",
        "if constexpr (Variant::kDecay) {",
        f"{COUNTS} -k trains",
        compiled=KERNELS,
    ),
    Fault(
        "rounds all moments with the bits of the first",
        FORMULA,
        "buffer_key(tensor.rounding, k)",
        "buffer_key(tensor.rounding, 0)",
        f"{COUNTS} -k bfloat16",
        compiled=KERNELS,
    ),
    Fault(
        "begins a count with what its memory holds",
        FORMULA,
        "return kArray == 0 && !fresh;",
        "return kArray == 0;",
        f"{COUNTS} -k reset",
        compiled=KERNELS,
    ),
    Fault(
        "corrects by the number of earlier updates",
        FORMULA,
        "update.fresh != 0 ? 1 : 1 + static_cast<double>",
        "update.fresh != 0 ? 1 : static_cast<double>",
        f"{COUNTS} -k trains",
        compiled=ADAM_LAUNCHES,
    ),
    Fault(
        "gives every tensor the count of the first",
        FORMULA,
        "Counted*>(counted_) + tensor;",
        "Counted*>(counted_);",
        f"{COUNTS} -k late",
        compiled=ADAM_LAUNCHES,
    ),
    Fault(
        "counts those on the host with the device's",
        FORMULA,
        "batch_.updates[tensor].count_on_host ? 0 : 1",
        "1",
        f"{COUNTS} -k both_places",
        compiled=ADAM_LAUNCHES,
    ),
    Fault(
        "does not count",
        STEP,
        "*update.count = update.fresh ? 1 : *update.count + 1;",
        "",
        f"{COUNTS} -k trains",
        compiled=ADAM_STEPS,
    ),
    Fault(
        "counts an update that overflowed on a GPU",
        STEP,
        "(walk_.has_fresh() || walk_.counts_gpu_on_host())",
        "walk_.has_fresh()",
        f"{COUNTS}::TestGradScaler",
        compiled=ADAM_STEPS,
    ),
    Fault(
        "captures counts on the host",
        STEP,
        "if (walk_.counts_gpu_on_host()) {",
        "if (false) {",
        f"{COUNTS}::TestGraphs",
        compiled=ADAM_STEPS,
    ),
    Fault(
        "keeps every new count on the host",
        "csrc/optim/adam.cpp",
        "return reader.flag(kCapturable) || reader.flag(kFused);",
        "return false && reader.flag(kFused);",
        f"{COUNTS} -k trains",
    ),
    # What the step asks of tensors and devices before it launches.
    Fault(
        "leaves a learning rate on another device",
        STEP,
        "if (lr.defined() && lr.device() != batch.kind.device) {",
        "if (false) {",
        f"{CUDA}::TestDevices",
    ),
    Fault(
        "takes a learning rate's bytes for its value",
        STEP,
        "      holds_its_value(*lr)) {",
        "      true) {",
        f"{CUDA} -k learning_rate",
    ),
    Fault(
        "reads a learning rate from the device",
        STEP,
        "if (lr != nullptr && lr->is_cuda()",
        "if (false && lr->is_cuda()",
        f"{CUDA}::TestGraphs",
    ),
    Fault(
        "leaves the scale on another device",
        STEP,
        "(Optimizer::kStep, grad_scale, batch.kind.device)",
        "(Optimizer::kStep, grad_scale, c10::Device(c10::kCUDA, 0))",
        f"{PROMISES}::TestDevices",
    ),
    Fault(
        "reads the overflow at every step",
        STEP,
        "!found_inf.is_none() && (walk_.has_fresh() || walk_.counts_gpu_on_host()) &&",
        "!found_inf.is_none() &&",
        f"{CUDA}::TestGradScaler",
    ),
    Fault(
        "captures a first step",
        STEP,
        "if (walk_.has_fresh()) {\n      refuse_capture(",
        "if (false) {\n      refuse_capture(",
        f"{PROMISES}::TestGraphs",
    ),
    Fault(
        "captures stochastic rounding",
        STEP,
        "if (rounds_stochastically_) {\n      refuse_capture(",
        "if (false) {\n      refuse_capture(",
        f"{CUDA}::TestNarrowMomentum",
    ),
    Fault(
        "updates tensors of shared memory in one launch",
        STEP,
        "in_order ? launch_in_order(batch) : launch(batch);",
        "launch(batch);",
        f"{PROMISES} -k shared_memory",
    ),
    Fault(
        "puts tensors of two devices into one launch",
        WALK,
        "if (kind.device == device && ",
        "if (",
        f"{CUDA}::TestDevices",
    ),
    Fault(
        "frees a rearranged gradient before it is read",
        RULES,
        "use, type, type_of(grad));\n  copied_.push_back({slot.meta, std::move(copy)});",
        "use, type, type_of(grad));",
        f"{PROMISES} -k layout",
        "late",
    ),
    # The step in backward.
    Fault(
        "does not wait for the streams that gradients come from",
        BACKWARD,
        "wait(goes, came);",
        "",
        f"{CUDA}::TestInBackward",
        "late",
    ),
    Fault(
        "does not let those streams wait for the update",
        BACKWARD,
        "wait(came, goes);",
        "",
        f"{CUDA}::TestInBackward",
        "late",
    ),
    Fault(
        "makes the streams wait for each other the wrong way round",
        BACKWARD,
        "event.record(awaited);\n    event.block(waiting);",
        "event.record(waiting);\n    event.block(awaited);",
        f"{CUDA}::TestInBackward",
        "late",
    ),
    Fault(
        "clips gradients that may not be there yet",
        BACKWARD,
        "for (const auto& [came, goes] : streams) {\n    wait(goes, came);\n  }\n  clip(metas);",
        "clip(metas);\n  for (const auto& [came, goes] : streams) {\n    wait(goes, came);\n  }",
        f"{CUDA}::TestInBackward",
        "late",
    ),
)


def plant(fault: Fault, tree: Path) -> None:
    """Copy what tests and simulation need of the working tree, and put the fault in."""
    for name in ("csrc", "src", "tests", "benchmarks", "build/cuda_on_cpu"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "conftest.py"):
        shutil.copy2(ROOT / name, tree)
    source = tree / fault.file
    text = source.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has this text {text.count(fault.old)} times: {fault.old}")
    changed = text.replace(fault.old, fault.new)
    source.write_text(changed)
    if fault.compiled != KERNELS:
        link(tree, compile_unit(tree, fault.compiled or UNITS.get(fault.file, fault.file)))
        source.write_text(text)  # the kernels' bodies are as they were
        shutil.copystat(ROOT / fault.file, source)


def objects() -> Path:
    """Where the objects of the working tree's module lie: `make build` has just made them."""
    import torch

    return ROOT / "build" / f"torch-{torch.__version__}-{sys.implementation.cache_tag}"


def run(command: str | list[str], **options: object) -> str:
    """What a command says; an error if it fails."""
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def compile_unit(tree: Path, unit: str) -> Path:
    """Compile one source of the module as the build does, but fast."""
    source, made = ROOT / unit, (objects() / unit).with_suffix(".o")
    commands = run(["ninja", "-C", str(objects()), "-t", "commands"]).splitlines()
    (command,) = (line for line in commands if f" -c {source} -o {made} " in line)
    ours = tree / f"{source.stem}.o"
    for path, planted in ((source, tree / unit), (made, ours), (ROOT / "csrc", tree / "csrc")):
        command = command.replace(str(path), str(planted))
    # Nobody runs the machine code of the kernels here.
    command = re.sub(r"( -gencode=arch=(\w+),code=\w+)+", r" -gencode=arch=\2,code=\2 -G", command)
    run(re.sub(r" -O3\b", " -O0", command).replace(" -g ", " "))
    return ours


def link(tree: Path, changed: Path) -> None:
    """Link the module of the changed object and those of the working tree."""
    from torch.utils import cpp_extension

    sources = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]
    made = [(objects() / source.relative_to(ROOT)).with_suffix(".o") for source in sources]
    others = [str(o) for o in made if o.name != changed.name and o.parent.name != "testing"]
    (module,) = (tree / "src" / "torch_freeze").glob("_C.*.so")
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries = [f"-l{name}" for name in ("c10", "c10_cuda", "torch", "torch_cpu", "torch_python")]
    runtime = tree / "build" / "cuda_on_cpu" / f"libcudart.so.{build.CUDA}"
    words = ["c++", "-shared", str(changed), *others, str(runtime), *paths, *libraries]
    run([*words, "-o", str(module)])


def first_failure(tree: Path, *arguments: str) -> str:
    """The first test that fails on the simulation in `tree`; nothing where all pass."""
    environ = os.environ | {"PYTHONPATH": str(tree / "src")}
    command = [sys.executable, "tests/cuda_on_cpu/run.py", *arguments]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environ, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        if "--run" in arguments:
            return f"a test that does not end within {SECONDS} s"
        raise RuntimeError(f"all tests take more than {SECONDS} s") from None
    said = done.stdout + done.stderr
    failed = re.search(r"^FAILED (\S.*?)(?: - |$)", said, re.MULTILINE)
    if failed:
        return failed[1]
    if "Fatal Python error" in said:
        return "a crash"
    if done.returncode != 0 or " passed" not in said:
        raise RuntimeError(f"{command}\n{said}")
    return ""


def pytest_words(fault: Fault) -> list[str]:
    """The arguments of run.py for the tests that should notice."""
    tests, _, names = fault.tests.partition(" -k ")
    chosen = [f"tests/{name}" for name in tests.split()] + (["-k", names] if names else [])
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.cuda_on_cpu.plugin"]
    pytest += ["-m", "gpu"]
    return ["--schedule", fault.schedule, "--run", *pytest, *chosen]


def outcome(fault: Fault) -> tuple[bool, str]:
    """Whether any test notices the fault, and which does."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        try:
            plant(fault, Path(folder))
            found = first_failure(Path(folder), *pytest_words(fault))
            if not found:
                found = first_failure(Path(folder), "-x")
                found = found and f"{found}, though it passes {fault.tests}"
        except (ValueError, RuntimeError) as error:
            return False, f"not tried to the end: {error}"
    return bool(found), f"noticed by {found}" if found else "SURVIVED"


def main() -> int:
    """Plant the faults whose names have the words given, or all."""
    chosen = [fault for fault in FAULTS if all(word in fault.name for word in sys.argv[1:])]
    import torch_freeze

    if not torch_freeze.build_info().cuda:
        raise SystemExit(
            "make test-cuda-mutants: the module has no CUDA code; run `USE_CUDA=1 make build`"
        )
    build.main()
    begin = time.monotonic()
    survived = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(outcome, fault): fault for fault in chosen}
        for done in as_completed(running):
            noticed, how = done.result()
            survived += not noticed
            print(f"{running[done].name}: {how}", flush=True)
    print(f"test-cuda-mutants: {len(chosen)} faults, {survived} not noticed, "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    return 1 if survived or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
