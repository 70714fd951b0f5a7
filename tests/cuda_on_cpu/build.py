"""Compiles the simulation for the torch of the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "cuda_on_cpu"
CUDA = "13"
TORCH = ("2.14",)  # what CI has; another asks the runtime for other functions
# The libraries that are replaced, by the source of the stand-in.
STAND_INS = {
    "runtime": f"libcudart.so.{CUDA}",
    "driver": "libcuda.so.1",
    "cupti": f"libcupti.so.{CUDA}",
}


def check_versions() -> None:
    """Stop where the simulation has not been tried."""
    minor = ".".join(torch.__version__.split(".")[:2])
    cuda = torch.version.cuda or "none"
    if cuda.split(".")[0] != CUDA or minor not in TORCH or sys.platform != "linux":
        raise SystemExit(
            f"make test-cuda: simulates CUDA {CUDA} for torch {' and '.join(TORCH)} on Linux; this "
            f"is torch {torch.__version__} with CUDA {cuda} on {sys.platform}. Install such a "
            "torch, or run `make gpu` on a machine with a GPU."
        )


def compile_to(made: Path, inputs: Iterable[Path], *words: str | Path) -> None:
    """Run g++, unless what it makes is newer than all that it is made of."""
    if made.exists() and all(p.stat().st_mtime < made.stat().st_mtime for p in inputs):
        return
    command = ["g++", *map(str, words), "-o", str(made)]
    print("+", " ".join(command), flush=True)
    made.unlink(missing_ok=True)
    subprocess.run(command, check=True)


def undefined(libraries: Iterable[Path]) -> set[str]:
    """The functions that libraries expect of others, as nm names them: name@version."""
    words = ["nm", "-D", "--undefined-only", *map(str, libraries)]
    listed = subprocess.run(words, capture_output=True, text=True).stdout
    return set(re.findall(r"^\s+[Uw] (\S+)$", listed, re.MULTILINE))


def stand_in(soname: str, own: Path, wanted: set[str], *linked: Path) -> None:
    """Link `own` as the library `soname`, with a stub for what is wanted and not in it."""
    listed = subprocess.run(["nm", str(own)], capture_output=True, text=True, check=True).stdout
    missing = sorted(wanted - set(re.findall(r" T (\S+)$", listed, re.MULTILINE)))
    stubs = OUT / f"{own.stem}_stubs.c"
    stubs.write_text(
        "int cuda_on_cpu_missing(const char*);\n"
        + "".join(f'int {f}(void) {{ return cuda_on_cpu_missing("{f}"); }}\n' for f in missing)
    )
    # The loader takes a library for another of the same name and version.
    versions = OUT / f"{own.stem}.map"
    versions.write_text(f"{soname} {{ global: *; }};\n")
    named = [f"-Wl,-soname,{soname}", f"-Wl,--version-script={versions}"]
    words = ["-shared", "-fPIC", own, *linked, "-x", "c", stubs, *named, "-ldl"]
    compile_to(OUT / soname, [own, *linked, Path(__file__)], *words)


def compile_all(cuda: list[str]) -> dict[str, Path]:
    """Compile the sources, as many at a time as there are cores; the objects by their names."""
    headers = [*HERE.glob("*.h"), Path(__file__)]
    runtime = ["-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", *cuda]
    includes = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    # The kernels round where the GPU does: nothing is contracted but the fma that they ask for.
    rounding = ["-ffp-contract=off", "-Wno-unknown-pragmas"]
    torch_flags = ["-std=c++20", "-O2", "-march=native", "-fPIC", *rounding, *cuda, *includes]
    torch_flags += [f"-I{ROOT / 'csrc'}"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made: dict[str, Path] = {}
        jobs = []
        for name in ("aten", "kernels", *STAND_INS):
            source, made[name] = HERE / f"{name}.cpp", OUT / f"{name}.o"
            inputs, flags = [source, *headers], runtime
            if name not in STAND_INS:
                inputs += [Path(torch.__file__)]
                flags = torch_flags
            if name == "kernels":
                inputs += (ROOT / "csrc").rglob("*.h")
            jobs.append(pool.submit(compile_to, made[name], inputs, *flags, "-c", source))
        for job in jobs:
            job.result()
    return made


def main() -> None:
    """Compile what is out of date."""
    check_versions()
    sys.path.insert(0, str(ROOT))
    from setup import Toolkit, find_toolkit

    libraries = Path(torch.__file__).parent / "lib"
    nvidia = Path(torch.__file__).parent.parent / "nvidia"
    toolkit = find_toolkit(torch, nvidia)
    if not isinstance(toolkit, Toolkit):
        raise SystemExit(f"make test-cuda: needs CUDA's headers, but {toolkit}")
    OUT.mkdir(parents=True, exist_ok=True)
    headers = [
        *toolkit.includes,
        *(str(p.parent) for p in nvidia.glob("*/include/cuda_runtime_api.h")),
    ]
    cuda = [word for path in headers if path != "/usr/include" for word in ("-isystem", path)]
    made = compile_all(cuda)
    users = undefined([*libraries.glob("*.so"), *nvidia.glob("*/lib/*.so*")])
    runtime = OUT / STAND_INS["runtime"]
    for name, soname in STAND_INS.items():
        wanted = {f.split("@")[0] for f in users if f.endswith(f"@{soname}")}
        if name == "driver":  # its functions have no versions
            nvrtc = undefined([libraries / "libcaffe2_nvrtc.so"])
            wanted = {f for f in nvrtc if re.match(r"cu[A-Z]", f)}
        stand_in(soname, made[name], wanted, *([] if name == "runtime" else [runtime]))
    linked = [f"-l{name}" for name in ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda")]
    objects = [made["aten"], made["kernels"]]
    aten = OUT / "libaten_on_cpu.so"
    compile_to(aten, [*objects, runtime], "-shared", *objects, runtime, f"-L{libraries}", *linked)


if __name__ == "__main__":
    main()
