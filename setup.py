"""Build ``torch_freeze._C`` against the torch of the environment it is installed into.

Environment variables: ``USE_CUDA=0/1`` forces CUDA code off or on, ``TORCH_CUDA_ARCH_LIST`` names
the architectures, ``MAX_JOBS`` limits the compiler processes, ``DEBUG=1`` builds with ``-O0 -g``.
``TORCH_FREEZE_NO_EXTENSION=1`` installs the Python code alone. ``TORCH_FREEZE_PIN_TORCH=1`` makes a
package that says in its version and its requirements which torch it was compiled for.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import setuptools
from setuptools.command.build_ext import build_ext

NAME = "torch_freeze._C"
TESTING = "torch_freeze._kernel_on_host"  # for the tests alone: never installed
PURE = "TORCH_FREEZE_NO_EXTENSION"
TORCH = "torch>=2.11"


class Toolkit(NamedTuple):
    """A CUDA toolkit as its own nvcc describes it."""

    home: Path
    major: int
    includes: list[str]
    known: list[int]  # compute capabilities in increasing order: 75, 80, ...


def output(*command: str | Path) -> str:
    """What ``command`` prints; nothing if it fails."""
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout + done.stderr


def ask_nvcc(nvcc: Path) -> Toolkit | None:
    """Ask nvcc for its root: the file on PATH may be a wrapper that lies elsewhere."""
    release = re.search(r"release (\d+)\.", output(nvcc, "--version"))
    plan = output(nvcc, "--dryrun", "-x", "cu", os.devnull)
    here = re.search(r"_HERE_=(.+)", plan)
    if not release or not here:
        return None
    includes = [os.path.realpath(path) for path in re.findall(r'INCLUDES="-I([^"]+)"', plan)]
    known = {int(c) for c in re.findall(r"compute_(\d+)\b", output(nvcc, "--list-gpu-arch"))}
    return Toolkit(Path(here[1].strip()).parent, int(release[1]), includes, sorted(known))


def find_toolkit(torch: ModuleType, nvidia: Path) -> Toolkit | str:
    """The first toolkit of torch's CUDA major version, or why the build is for the CPU only."""
    choice = os.environ.get("USE_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"torch_freeze: USE_CUDA={choice!r}; it is 0, 1 or unset")
    if choice == "0":
        return "USE_CUDA=0 is set"
    reason = "this torch is a build without CUDA; install one with CUDA"
    if torch.version.cuda:
        wanted = int(torch.version.cuda.split(".")[0])
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        nvccs = [Path(home, "bin", "nvcc") for home in homes if home]
        nvccs[-1:-1] = [Path(shutil.which("nvcc") or "nvcc"), *sorted(nvidia.glob("*/bin/nvcc"))]
        toolkits = [toolkit for toolkit in map(ask_nvcc, nvccs) if toolkit]
        for toolkit in toolkits:
            if toolkit.major == wanted:
                return toolkit
        others = ", ".join(sorted({f"{t.home} (CUDA {t.major})" for t in toolkits})) or "none"
        reason = (
            f"torch needs an nvcc of CUDA {wanted} and found is {others}; put one on PATH, set "
            f"CUDA_HOME or `pip install 'cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*'`"
        )
    if choice == "1":
        raise SystemExit(f"torch_freeze: USE_CUDA=1, but {reason}")
    return reason


def architecture_flags(torch: ModuleType, known: list[int]) -> list[str]:
    """``-gencode`` flags: the list asked for, else the GPUs in sight, else every generation.

    Every generation from 8.0 on: code for x.0 runs on x.y, which a kernel bound by memory bandwidth
    does not notice. All of it comes from the PTX of 8.0, which takes half the time to compile that
    one PTX for each takes, and is kept for GPUs to come.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native"):
        from torch.utils.cpp_extension import _get_cuda_arch_flags

        return list(_get_cuda_arch_flags())
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    wanted = {10 * major + minor for major, minor in gpus}
    if wanted:
        chosen = sorted({max((k for k in known if k <= w), default=known[0]) for w in wanted})
        codes = [(c, f"sm_{c}") for c in chosen] + [(chosen[-1], f"compute_{chosen[-1]}")]
    else:
        first = {c // 10: c for c in reversed(known) if c >= 80}
        codes = [(80, f"sm_{c}") for c in sorted(first.values())] + [(80, "compute_80")]
    return [f"-gencode=arch=compute_{ptx},code={code}" for ptx, code in codes]


def import_torch() -> ModuleType:
    """Import torch; from an isolated build too, where pip hides the environment it builds for."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    sys.path += [path for path in paths if path not in sys.path]
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise SystemExit(
            f"torch_freeze is compiled against the installed torch; {sys.prefix} has none. Run\n"
            "    pip install torch setuptools ninja\n    pip install --no-build-isolation ."
        ) from None
    return torch


def check_compiler(cxx: str) -> None:
    """Stop, before anything is compiled, where there is no C++ compiler or no Python.h."""
    commands = {shlex.split(cxx)[0]}
    if "CXX" not in os.environ:  # what links is Python's own, then
        commands.update(shlex.split(sysconfig.get_config_var("CXX") or "")[:1])
    missing = sorted(command for command in commands if not shutil.which(command))
    header = Path(sysconfig.get_path("include"), "Python.h")
    if missing:
        what = f"a C++ compiler, and finds no {' and no '.join(missing)}. Install one"
        packages = "apt-get install g++, dnf install gcc-c++, conda install cxx-compiler"
    elif not header.is_file():
        what = f"Python's headers, and finds no {header}. Install them"
        packages = "apt-get install python3-dev, dnf install python3-devel"
    else:
        return
    raise SystemExit(
        f"torch_freeze: compiling needs {what} ({packages}), or name another in CXX. To do without "
        "the fused kernels, install the Python code alone:\n"
        f"    {PURE}=1 {sys.executable} -m pip install --no-build-isolation ."
    )


def configure(torch: ModuleType) -> tuple[setuptools.Extension, dict[str, object]]:
    """The extension to compile, and what ``torch_freeze.build_info()`` tells of it."""
    nvidia = Path(torch.__file__ or "").parent.parent / "nvidia"  # CUDA's wheels, torch's own
    toolkit = find_toolkit(torch, nvidia)
    if isinstance(toolkit, Toolkit):
        # Set before the import: left alone, it takes the folder above the nvcc on PATH.
        os.environ["CUDA_HOME"] = str(toolkit.home)
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    check_compiler(compiler)
    debug = os.environ.get("DEBUG") == "1"
    includes = cpp_extension.include_paths()
    # Contracted products and sums would not round as stock's do. The kernel's body is compiled for
    # the host too, where `#pragma unroll` says nothing.
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    host = ["-ffp-contract=off", "-fvisibility=hidden", *warnings]
    # -fopenmp is for the compiler alone: GOMP_* stay undefined and resolve at load time to the
    # libgomp that torch brings, so that one pool of threads, sized by torch, serves both. Clang
    # calls a runtime that torch does not bring; there the linker adds it.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    extension = setuptools.Extension(
        NAME,
        sorted(str(s) for s in Path("csrc").rglob("*.cpp") if s.parent.name != "testing"),
        include_dirs=[str(Path("csrc").resolve())],
        language="c++",
        libraries=["c10", "torch", "torch_cpu", "torch_python"],
        library_dirs=cpp_extension.library_paths(),
        extra_link_args=[] if cpp_extension.check_compiler_is_gcc(compiler) else openmp,
    )
    nvcc: list[str] = []
    codes: list[str] = []
    if isinstance(toolkit, Toolkit):
        runtime = f"libcudart.so.{toolkit.major}"
        headers = [str(path.parent) for path in nvidia.glob("*/include/cuda_runtime_api.h")]
        libraries = [*nvidia.glob(f"*/lib/{runtime}"), *toolkit.home.glob(f"**/{runtime}")]
        flags = architecture_flags(torch, toolkit.known)
        codes = re.findall(r",code=(\w+)", " ".join(flags))
        # The toolkit's own headers come first; torch's stand in for what it lacks.
        includes += [path for path in [*toolkit.includes, *headers] if path != "/usr/include"]
        extension.sources += sorted(str(source) for source in Path("csrc").rglob("*.cu"))
        extension.define_macros += [("WITH_CUDA", None)]
        extension.libraries += ["c10_cuda"]
        extension.extra_objects += [str(path) for path in libraries[:1]]
        threads = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        nvcc = ["-fmad=false", f"--threads={threads}", *flags]
        nvcc += ["-Xcompiler", ",".join(host)] + (["-O0", "-g"] if debug else ["-O3"])
    else:
        print(f"torch_freeze: CPU only, because {toolkit}. USE_CUDA=1 insists on CUDA.")
    # As system headers they give no warnings; nvcc takes the path only as a word of its own.
    system = [word for path in includes for word in ("-isystem", path)]
    # Most Pythons' own flags have -g and -DNDEBUG.
    level = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3", "-g0"]
    cxx = [*level, *host, "-fno-math-errno", *openmp, *system]
    extension.extra_compile_args = {"cxx": cxx, "nvcc": [*nvcc, *system]}
    return extension, {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if codes else None,
        "architectures": codes,
        "compiler": output(compiler, "--version").partition("\n")[0],
        "debug": debug,
        "cpu_only_because": None if codes else toolkit,
    }


def named() -> tuple[str, str]:
    """The version of the package and what it requires: some torch, or the one at hand."""
    source = Path("src/torch_freeze/_build.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if not found:
        raise SystemExit("torch_freeze: src/torch_freeze/_build.py has no __version__")
    if os.environ.get("TORCH_FREEZE_PIN_TORCH") != "1":
        return found[1], TORCH
    label = import_torch().__version__.replace("+", ".")
    # As pip knows it: PyPI's own builds have no "+cu130" there, where torch.__version__ has.
    return f"{found[1]}+torch{label}", f"torch=={importlib.metadata.version('torch')}"


class BuildExt(build_ext):
    """Hand over to torch's BuildExtension; metadata and sdists are made without importing torch."""

    def run(self) -> None:
        """Compile, and record beside the module what it was compiled for."""
        torch = import_torch()
        extension, info = configure(torch)
        testing = copy.deepcopy(extension)  # compiling it adds arguments
        testing.name, testing.sources = TESTING, ["csrc/testing/kernel_on_host.cpp"]
        command = self.compile(torch, extension)
        if self.inplace:  # in a clone, where the tests are
            self.compile(torch, testing)
        # Read before the module is loaded, so that another torch is named and not crashed into.
        path = Path(command.get_ext_fullpath(NAME)).with_suffix(".json")
        path.write_text(json.dumps(info, indent=1) + "\n")

    def compile(self, torch: ModuleType, extension: setuptools.Extension) -> build_ext:
        """Compile one module by torch's own command."""
        from torch.utils.cpp_extension import BuildExtension

        self.distribution.ext_modules = [extension]
        command: build_ext = BuildExtension(self.distribution)
        command.inplace, command.build_lib = self.inplace, self.build_lib
        # One folder per torch, for an editable install too: ninja then compiles what changed, and a
        # torch replaced by another with older file dates is no reason to keep stale objects.
        command.build_temp = f"build/torch-{torch.__version__}-{sys.implementation.cache_tag}"
        if extension.name == TESTING:
            command.build_temp += "-testing"
        command.ensure_finalized()
        command.run()
        return command


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not know `license = "…"`
        raise SystemExit(
            f"torch_freeze needs setuptools 77 or later; {sys.prefix} has {setuptools.__version__}."
            " Run\n    pip install --upgrade setuptools"
        )
    pure = os.environ.get(PURE, "")
    if pure not in ("", "0", "1"):
        raise SystemExit(f"torch_freeze: {PURE}={pure!r}; it is 0, 1 or unset")
    version, requirement = named()
    setuptools.setup(
        version=version,
        install_requires=[requirement],
        ext_modules=[] if pure == "1" else [setuptools.Extension(NAME, [])],
        cmdclass={"build_ext": BuildExt},
    )
