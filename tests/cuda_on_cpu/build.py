"""Compiles the simulation for the torch of the environment."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "cuda_on_cpu"
CUDA = "13"
TORCH = ("2.14",)  # what CI has; another asks the runtime for other functions


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


def stand_in(
    soname: str, source: Path, wanted: set[str], includes: list[str], *linked: Path
) -> None:
    """Link `source` as the library `soname`, with a stub for what is wanted and not in it."""
    headers = [*HERE.glob("*.h"), Path(__file__)]
    own = OUT / f"{source.stem}.o"
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra"]
    compile_to(own, [source, *headers], *flags, *includes, "-c", source)
    listed = subprocess.run(["nm", str(own)], capture_output=True, text=True, check=True).stdout
    missing = sorted(wanted - set(re.findall(r" T (\S+)$", listed, re.MULTILINE)))
    stubs = OUT / f"{source.stem}_stubs.c"
    stubs.write_text(
        "int cuda_on_cpu_missing(const char*);\n"
        + "".join(f'int {f}(void) {{ return cuda_on_cpu_missing("{f}"); }}\n' for f in missing)
    )
    # The loader takes a library for another of the same name and version.
    versions = OUT / f"{source.stem}.map"
    versions.write_text(f"{soname} {{ global: *; }};\n")
    named = [f"-Wl,-soname,{soname}", f"-Wl,--version-script={versions}"]
    compile_to(
        OUT / soname,
        [own, *linked],
        "-shared",
        "-fPIC",
        own,
        *linked,
        "-x",
        "c",
        stubs,
        *named,
        "-ldl",
    )


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
    runtime = f"libcudart.so.{CUDA}"
    users = [*libraries.glob("*.so"), *nvidia.glob("*/lib/*.so*")]
    wanted = {name.split("@")[0] for name in undefined(users) if name.endswith(f"@{runtime}")}
    stand_in(runtime, HERE / "runtime.cpp", wanted, cuda)
    driver = {f for f in undefined([libraries / "libcaffe2_nvrtc.so"]) if re.match(r"cu[A-Z]", f)}
    stand_in("libcuda.so.1", HERE / "driver.cpp", driver, [], OUT / runtime)

    includes = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    objects = []
    for name in ("kernels", "aten"):
        objects.append(OUT / f"{name}.o")
        sources = [
            HERE / f"{name}.cpp",
            HERE / "runtime.h",
            *(ROOT / "csrc").glob("*.h"),
            Path(torch.__file__),
        ]
        # The kernels round where the GPU does: nothing is contracted but the fma that they ask for.
        flags = [
            "-std=c++20",
            "-O2",
            "-march=native",
            "-fPIC",
            "-ffp-contract=off",
            "-Wno-unknown-pragmas",
        ]
        compile_to(
            objects[-1], sources, *flags, *cuda, *includes, f"-I{ROOT / 'csrc'}", "-c", sources[0]
        )
    linked = [f"-l{name}" for name in ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda")]
    aten = OUT / "libaten_on_cpu.so"
    compile_to(aten, objects, "-shared", *objects, OUT / runtime, f"-L{libraries}", *linked)


if __name__ == "__main__":
    main()
