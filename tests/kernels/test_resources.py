"""What nvcc makes of the CUDA kernel: results, registers, spills, access widths. No GPU needed.

The PTX runs on the CPU (see helpers/ptx.py), and what ptxas makes of it is looked at in the
disassembly.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers import kernels as body
from tests.helpers import ptx as ptx_to_cpp

ROOT = Path(__file__).resolve().parents[2]
# By torch's own packages: the toolkit's headers of another minor version come with the wheels.
NVIDIA = Path(torch.__file__).parent.parent / "nvidia"
HEADER = (ROOT / "csrc" / "kernels" / "tiles.h").read_text()
WARPS = int(re.search(r"kWarps = (\d+);", HEADER)[1])  # type: ignore[index]

# How a triple of dtypes reads in a mangled name, with the bytes of a vector of parameters, of
# gradients and of momentum.
TRIPLES = {
    "fp32": (r"fffLb0E", (16, 16, 16)),
    "fp64": (r"dddLb0E", (16, 16, 16)),
    "bf16": (r"N3c108BFloat16E\w{1,8}Lb0E", (16, 16, 16)),
    "fp16": (r"N3c104HalfE\w{1,8}Lb0E", (16, 16, 16)),
    "fp32 with bf16 gradients": (r"fN3c108BFloat16EfLb0E", (16, 8, 16)),
    "fp32 with fp16 gradients": (r"fN3c104HalfEfLb0E", (16, 8, 16)),
    "fp32 with stochastic bf16 momentum": (r"ffN3c108BFloat16ELb1E", (16, 16, 8)),
    "bf16 with stochastic momentum": (r"N3c108BFloat16E\w{1,8}Lb1E", (16, 16, 16)),
}
TABLES = (1024, 8192, 32760)
ENTRY = (".entry ", ".entry ")  # what a kernel begins with in PTX, and where it ends
every_kernel = pytest.mark.parametrize(
    ("triple", "table"),
    [
        pytest.param(name, size, id=f"{name}, table of {size} bytes")
        for name in TRIPLES
        for size in TABLES
    ],
)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


class Compiled(NamedTuple):
    """An optimizer's kernels as PTX, and the tools that go on from there."""

    optimizer: str
    ptx: Path
    ptxas: Path
    known: list[int]


# The buffers of the optimizers whose kernels are looked at.
BUFFERS = {"sgd": 1, "adam": 3}


@functools.cache
def compile_kernels(optimizer: str, folder: Path) -> Compiled:
    spec = importlib.util.spec_from_file_location("torch_freeze_setup", ROOT / "setup.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT / 'setup.py'} cannot be loaded")
    setup_py = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup_py
    spec.loader.exec_module(setup_py)
    toolkit = setup_py.find_toolkit(torch, NVIDIA)
    if isinstance(toolkit, str):
        pytest.skip(f"no CUDA compiler for this torch: {toolkit}")
    from torch.utils import cpp_extension

    wheels = [str(path.parent) for path in NVIDIA.glob("*/include/cuda_runtime_api.h")]
    includes = [
        word
        for path in (*cpp_extension.include_paths(), *toolkit.includes, *wheels)
        if path != "/usr/include"
        for word in ("-isystem", path)
    ]
    ptx = folder / f"{optimizer}_cuda.ptx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", str(toolkit.home))  # the build sets it
        patch.setenv("DEBUG", "0")
        built = setup_py.configure(torch)[0].extra_compile_args["nvcc"]
    # All but what is for architectures, processes and the host's compiler.
    flags = [word for word in built if re.match(r"--?(O\d|fmad|use_fast_math|ftz|prec)", word)]
    flags += ["-ptx", "-arch=compute_80", "-std=c++20", f"-I{ROOT / 'csrc'}"]
    flags += ["--expt-relaxed-constexpr", "-DWITH_CUDA", "-o", str(ptx)]
    nvcc = str(toolkit.home / "bin" / "nvcc")
    source = str(ROOT / "csrc" / "optim" / f"{optimizer}_cuda.cu")
    done = subprocess.run([nvcc, *flags, *includes, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Compiled(optimizer, ptx, toolkit.home / "bin" / "ptxas", toolkit.known)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ptx")


@pytest.fixture(scope="module", params=BUFFERS)
def compiled(request: pytest.FixtureRequest, folder: Path) -> Compiled:
    return compile_kernels(request.param, folder)


def kernel_name(triple: str, table: int) -> re.Pattern[str]:
    return re.compile(rf"\w+DtypesI{TRIPLES[triple][0]}E+Li{table}E\w+")


def body_of(text: str, triple: str, table: int, start: str, end: str) -> str:
    """The part of a listing that belongs to one kernel."""
    name = kernel_name(triple, table)
    bodies = [part.split(end)[0] for part in text.split(start)[1:] if name.match(part)]
    assert len(bodies) == 1, f"{len(bodies)} kernels for {triple}, table of {table} bytes"
    return bodies[0]


@pytest.fixture(scope="module")
def ptx(compiled: Compiled) -> str:
    return compiled.ptx.read_text()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def assembled(
    request: pytest.FixtureRequest, compiled: Compiled, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """What ptxas says of each kernel on one architecture, and the machine code."""
    architecture: str = request.param
    if int(architecture.removeprefix("sm_")) not in compiled.known:
        pytest.skip(f"this nvcc does not know {architecture}")
    cubin = tmp_path_factory.mktemp(architecture) / "kernels.cubin"
    command = [compiled.ptxas, "-v", f"-arch={architecture}", "-o", cubin, compiled.ptx]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, cubin


def test_no_kernel_spills_and_registers_leave_room_for_every_block(
    assembled: tuple[str, Path], ptx: str
) -> None:
    report, _ = assembled
    for triple in TRIPLES:
        for table in TABLES:
            blocks = re.search(r"\.minnctapersm (\d+)", body_of(ptx, triple, table, *ENTRY))
            assert blocks and int(blocks[1]) >= 3
            # The register file of a multiprocessor, shared by all threads, in steps of eight.
            most = 65536 // (32 * WARPS * int(blocks[1])) // 8 * 8
            end = "Compiling entry function"
            text = body_of(report, triple, table, "Compiling entry function '", end)
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text
            used = re.search(r"Used (\d+) registers", text)
            assert used and int(used[1]) <= most, f"{triple}: {text}"


Run = Callable[[Any, int, int], None]


@pytest.fixture(scope="module")
def kernels(folder: Path) -> dict[str, Run]:
    """SGD's PTX as functions of (table, blocks, threads), by the kernels' names."""
    source, names = ptx_to_cpp.translate(compile_kernels("sgd", folder).ptx.read_text())
    (folder / "kernels.cpp").write_text(source)
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O0", "-w", "-ffp-contract=off"]
    command += ["-shared", "-fPIC", "-o", "kernels.so", "kernels.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "kernels.so"))
    return {name: getattr(library, f"run_{i}") for i, name in enumerate(names)}


def random_step(
    rng: random.Random, triple: body.Triple, table: int
) -> tuple[list[body.Update], list[body.Group]]:
    """Tensors of all sizes and alignments in groups of all kinds, as many as take such a table."""
    groups = [
        replace(group, lr=rng.uniform(0.01, 0.5), rounding_seed=rng.getrandbits(64))
        for group in body.HYPERS.values()
    ]
    dtype, place = rng.choice([torch.float32, torch.float64]), rng.randrange(len(groups))
    groups[place] = replace(groups[place], device_lr=torch.tensor(0.3, dtype=dtype))
    count = len(groups)
    tiers = body.kernel_on_host.capacities(triple.names, count, stochastic=triple.stochastic)
    fits = dict(tiers)[table]
    fewest = max((tensors + 1 for size, tensors in tiers if size < table), default=1)
    updates = []
    for i in sorted(rng.randrange(count) for _ in range(rng.randint(fewest, fits))):
        tile = triple.tile
        numel = rng.choice([1, 2, 7, tile - 1, tile, tile + 1, rng.randrange(1, 9 * tile)])
        same = rng.randrange(16)
        places = rng.choice([(0, 0, 0), (same,) * 3, (same, rng.randrange(16), same)])
        updates.append(
            body.make(
                numel,
                triple,
                i,
                groups[i].momentum != 0 and rng.random() < 0.2,
                [place * dtype.itemsize for place, dtype in zip(places, triple, strict=True)],
                groups[i].momentum != 0,
            )
        )
    return updates, groups


@every_kernel
@pytest.mark.parametrize(
    ("scale", "overflow"),
    [(None, 0.0), (4.0, 0.0), (3.0, 0.0), (4.0, 1.0)],
    ids=["plain", "scaled by 4", "scaled by 3", "overflow"],
)
def test_computes_what_its_source_does(
    triple: str, table: int, scale: float | None, overflow: float, kernels: dict[str, Run]
) -> None:
    """The PTX and the source, compiled for the CPU, leave the same bytes in and around arrays."""
    rng = random.Random(f"{triple} {table} {scale} {overflow}")
    options: dict[str, Any] = {"resident": rng.choice([1, 3, 40, 660])}
    if scale is not None:
        options |= {"grad_scale": torch.tensor(scale), "found_inf": torch.tensor(overflow)}
    (run,) = (run for name, run in kernels.items() if kernel_name(triple, table).match(name))
    for _ in range(8 if table == min(TABLES) else 1):
        check_step(rng, body.TRIPLES[triple], table, run, options, overflow == 0)


def check_step(
    rng: random.Random,
    dtypes: body.Triple,
    table: int,
    run: Run,
    options: dict[str, Any],
    writes: bool,
) -> None:
    updates, groups = random_step(rng, dtypes, table)
    arrays = [a for u in updates for a in (u.param, u.grad, u.momentum) if a is not None]
    before = [array.whole.clone() for array in arrays]
    body.step(updates, groups, dtypes, **options)
    by_source = [array.whole.clone() for array in arrays]
    for array, whole in zip(arrays, before, strict=True):
        array.whole.copy_(whole)
    (launch,) = body.step(updates, groups, dtypes, **options, chosen=[])
    assert launch.parameter_bytes == table
    run(ctypes.create_string_buffer(launch.table, table), launch.blocks, 32 * WARPS)
    for number, (array, whole) in enumerate(zip(arrays, by_source, strict=True)):
        assert torch.equal(array.whole, whole), f"array {number} of {len(arrays)}"
    changed = any(not torch.equal(a, b) for a, b in zip(before, by_source, strict=True))
    assert changed == writes


@every_kernel
def test_vectors_of_sixteen_bytes(triple: str, table: int, ptx: str, compiled: Compiled) -> None:
    body = body_of(ptx, triple, table, *ENTRY)
    widths = {"u8": 1, "u16": 2, "b16": 2, "u32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8}
    widths["f64"] = 8

    def count(kind: str, size: int) -> int:
        found = re.findall(rf"\b{kind}(?:\.v(\d))?\.(\w\d+)", body)
        return sum(int(times or 1) * widths[name] == size for times, name in found)

    # Parameter and buffers, two vectors of each under way; the gradient streamed.
    param, grad, buffer = TRIPLES[triple][1]
    written = (param, *[buffer] * BUFFERS[compiled.optimizer])
    for size in (param, buffer):
        vectors = 2 * written.count(size)
        assert count(r"ld\.global", size) >= vectors
        assert count(r"st\.global", size) >= vectors
    assert count(r"ld\.global\.cs", grad) >= 2


@every_kernel
def test_arithmetic_rounds_as_written(triple: str, table: int, ptx: str) -> None:
    body = body_of(ptx, triple, table, *ENTRY)
    assert re.search(r"\bfma\.rn\.f(32|64)\b", body)
    assert not re.search(r"\.ftz\.f32\b|\.approx\.f32\b|\.full\b|\bmad\.f", body)


def disassembler() -> str | None:
    """nvdisasm from PATH, a toolkit, or triton, which torch's CUDA wheels bring."""
    places = [os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    places.append("/usr/local/cuda/bin")
    return shutil.which("nvdisasm", path=os.pathsep.join(places))


def test_machine_code_moves_sixteen_bytes_at_a_time(assembled: tuple[str, Path]) -> None:
    tool = disassembler()
    if tool is None:
        pytest.skip("no nvdisasm on PATH, in a toolkit or in triton")
    _, cubin = assembled
    done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for triple in TRIPLES:
        for table in TABLES:
            start = "//--------------------- .text."
            body = body_of(done.stdout, triple, table, start, "//---------------------")
            loads = re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", body)
            stores = re.findall(r"\bSTG\.E\.(?:\w+\.)*128\b", body)
            assert len(loads) >= 4, f"{triple}, table of {table} bytes"
            assert len(stores) >= 4, f"{triple}, table of {table} bytes"
            assert not re.search(r"\b(LDL|STL)\b", body), "local memory is a spill"
