"""What nvcc made of the CUDA kernel: results, registers, spills, access widths. No GPU needed.

What is looked at lies in the compiled module: the PTX, which runs on the CPU (see helpers/ptx.py),
and the machine code of each architecture.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import torch_freeze
from tests.helpers import kernels as body
from tests.helpers import ptx as ptx_to_cpp

ROOT = Path(__file__).resolve().parents[2]
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
every_kernel = pytest.mark.parametrize(
    ("triple", "table"),
    [
        pytest.param(name, size, id=f"{name}, table of {size} bytes")
        for name in TRIPLES
        for size in TABLES
    ],
)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_110", "sm_120")


# The buffers of the optimizers whose kernels are looked at.
BUFFERS = {"Sgd": 1, "Adam": 3}


class Ptx(NamedTuple):
    """The PTX of an optimizer's kernels."""

    optimizer: str
    kernels: list[str]


def tool(name: str) -> str | None:
    """One of NVIDIA's tools from PATH, a toolkit, or triton, which torch's CUDA wheels bring."""
    places = [os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    places.append("/usr/local/cuda/bin")
    return shutil.which(name, path=os.pathsep.join(places))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resources")


@pytest.fixture(scope="module")
def ask(folder: Path) -> Callable[..., str]:
    """What cuobjdump says of the compiled module."""
    info = torch_freeze.build_info()
    if not info.cuda:
        pytest.skip(f"no CUDA code in this build: {info.cpu_only_because}")
    if info.debug:
        pytest.skip("this build has DEBUG=1")
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH, in a toolkit or in triton")
    module = importlib.util.find_spec("torch_freeze._C")
    assert module is not None and module.origin is not None
    command = (cuobjdump, module.origin)

    def answer(*options: str) -> str:
        done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return answer


@pytest.fixture(scope="module")
def texts(ask: Callable[..., str], folder: Path) -> dict[str, str]:
    """The PTX by optimizer."""
    ask("-xptx", "all")
    found = [path.read_text() for path in folder.glob("*.ptx")]
    if not found:
        pytest.skip("this build has no PTX")
    return {name: next(text for text in found if f"{name}Formula" in text) for name in BUFFERS}


@pytest.fixture(scope="module", params=BUFFERS)
def ptx(request: pytest.FixtureRequest, texts: dict[str, str]) -> Ptx:
    return Ptx(request.param, texts[request.param].split(".entry ")[1:])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in torch_freeze.build_info().architectures:
        pytest.skip(f"this build has no code for {name}")
    return name


def kernel_name(optimizer: str, triple: str, table: int) -> re.Pattern[str]:
    return re.compile(rf"\w+{optimizer}Formula\w+DtypesI{TRIPLES[triple][0]}E+Li{table}E\w+")


def one_of(parts: list[str], optimizer: str, triple: str, table: int) -> str:
    """The part of a listing, each of which begins with a name, that belongs to one kernel."""
    name = kernel_name(optimizer, triple, table)
    bodies = [part for part in parts if name.match(part)]
    assert len(bodies) == 1, f"{len(bodies)} kernels for {triple}, table of {table} bytes"
    return bodies[0]


@pytest.fixture(scope="module")
def usage(ask: Callable[..., str], architecture: str) -> list[str]:
    return ask("-res-usage", "-arch", architecture).split(" Function ")[1:]


def test_no_kernel_spills_and_registers_leave_room_for_every_block(
    usage: list[str], ptx: Ptx
) -> None:
    for triple in TRIPLES:
        for table in TABLES:
            kernel = (ptx.optimizer, triple, table)
            blocks = re.search(r"\.minnctapersm (\d+)", one_of(ptx.kernels, *kernel))
            assert blocks and int(blocks[1]) >= 3
            # The register file of a multiprocessor, shared by all threads, in steps of eight.
            most = 65536 // (32 * WARPS * int(blocks[1])) // 8 * 8
            text = one_of(usage, *kernel)
            used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+) ", text)
            assert used and int(used[1]) <= most, f"{triple}: {text}"
            # What is spilled lies in the stack frame.
            assert (int(used[2]), int(used[3])) == (0, 0), f"{triple}: {text}"


Run = Callable[[Any, int, int], None]


@pytest.fixture(scope="module")
def kernels(texts: dict[str, str], folder: Path) -> dict[str, Run]:
    """SGD's PTX as functions of (table, blocks, threads), by the kernels' names."""
    target = re.search(r"^\.target (\w+)", texts["Sgd"], re.MULTILINE)
    assert target is not None
    if target[1] != "sm_80":  # as of a build for the GPU in sight alone
        pytest.skip(f"this build's PTX is for {target[1]}; what is translated is that for sm_80")
    source, names = ptx_to_cpp.translate(texts["Sgd"])
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
    wanted = kernel_name("Sgd", triple, table)
    (run,) = (run for name, run in kernels.items() if wanted.match(name))
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
def test_vectors_of_sixteen_bytes(triple: str, table: int, ptx: Ptx) -> None:
    body = one_of(ptx.kernels, ptx.optimizer, triple, table)
    widths = {"u8": 1, "u16": 2, "b16": 2, "u32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8}
    widths["f64"] = 8

    def count(kind: str, size: int) -> int:
        found = re.findall(rf"\b{kind}(?:\.v(\d))?\.(\w\d+)", body)
        return sum(int(times or 1) * widths[name] == size for times, name in found)

    # Parameter and buffers, two vectors of each under way; the gradient streamed.
    param, grad, buffer = TRIPLES[triple][1]
    written = (param, *[buffer] * BUFFERS[ptx.optimizer])
    for size in (param, buffer):
        vectors = 2 * written.count(size)
        assert count(r"ld\.global", size) >= vectors
        assert count(r"st\.global", size) >= vectors
    assert count(r"ld\.global\.cs", grad) >= 2


@every_kernel
def test_arithmetic_rounds_as_written(triple: str, table: int, ptx: Ptx) -> None:
    body = one_of(ptx.kernels, ptx.optimizer, triple, table)
    assert re.search(r"\bfma\.rn\.f(32|64)\b", body)
    assert not re.search(r"\.ftz\.f32\b|\.approx\.f32\b|\.full\b|\bmad\.f", body)


def test_machine_code_moves_sixteen_bytes_at_a_time(
    ask: Callable[..., str], architecture: str
) -> None:
    if tool("nvdisasm") is None:
        pytest.skip("no nvdisasm on PATH, in a toolkit or in triton")
    code = ask("-sass", "-arch", architecture).split("Function : ")[1:]
    for optimizer in BUFFERS:
        for triple in TRIPLES:
            for table in TABLES:
                body = one_of(code, optimizer, triple, table)
                # 55 MB in all: what is looked for begins with letters, which is fast.
                loads = re.findall(r"LDG\.E\.(?:\w+\.)*128\b", body)
                stores = re.findall(r"STG\.E\.(?:\w+\.)*128\b", body)
                kernel = f"{optimizer}, {triple}, table of {table} bytes"
                assert len(loads) >= 4, kernel
                assert len(stores) >= 4, kernel
                for local in (r"LDL\b", r"STL\b"):
                    assert not re.search(local, body), "local memory is a spill"
