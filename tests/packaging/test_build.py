"""setup.py's choices, what the module records of itself, and the errors that replace a crash."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch

import torch_freeze
from tests.cuda_on_cpu import build as simulation
from tests.cuda_on_cpu import mutants

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "-m pip install --no-build-isolation"


def load(name: str, path: Path, package: Path | None = None) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(package)] if package else None
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("USE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "DEBUG",
                 "CXX", "TORCH_FREEZE_NO_EXTENSION", "TORCH_FREEZE_PIN_TORCH"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    return load("torch_freeze_setup", ROOT / "setup.py")


class TestBuildInfo:
    def test_names_the_torch_in_use(self) -> None:
        info = torch_freeze.build_info()
        assert info.version == torch_freeze.__version__
        assert info.torch == torch.__version__
        assert info.cuda in (None, torch.version.cuda)
        assert info.compiler

    def test_has_architectures_or_says_why_not(self) -> None:
        info = torch_freeze.build_info()
        assert bool(info.cuda) == bool(info.architectures) == (info.cpu_only_because is None)
        assert all(re.fullmatch(r"(sm|compute)_\d+\w?", code) for code in info.architectures)

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError):
            torch_freeze.build_info().torch = "0"  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            pytest.param(
                {
                    "cuda": "13.2",
                    "architectures": ("sm_80", "compute_80"),
                    "cpu_only_because": None,
                },
                "torch_freeze 1.0, torch 2.14.1, CUDA 13.2 for sm_80 compute_80, g++ 12",
                id="a CUDA build",
            ),
            pytest.param(
                {"debug": True},
                "torch_freeze 1.0, torch 2.14.1, CPU only (USE_CUDA=0 is set), g++ 12, debug build",
                id="a CPU debug build",
            ),
            pytest.param(
                {"compiled": False},
                "torch_freeze 1.0, torch 2.14.1, no compiled module",
                id="no compiled module",
            ),
        ],
    )
    def test_prints_as_one_line(self, changes: dict[str, Any], text: str) -> None:
        fields: dict[str, Any] = {
            "version": "1.0",
            "torch": "2.14.1",
            "cuda": None,
            "architectures": (),
            "compiler": "g++ 12",
            "debug": False,
            "cpu_only_because": "USE_CUDA=0 is set",
        }
        assert str(torch_freeze.BuildInfo(**fields | changes)) == text

    def test_has_the_version_of_the_metadata(self) -> None:
        command = [sys.executable, "setup.py", "--version"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == torch_freeze.__version__


@pytest.fixture
def copy(tmp_path: Path) -> SimpleNamespace:
    """A copy of the installed package, to be damaged: its folder, its module and its record."""
    assert torch_freeze.__file__
    package = tmp_path / "src" / "torch_freeze"
    shutil.copytree(Path(torch_freeze.__file__).parent, package)
    spec = importlib.util.find_spec("torch_freeze._C")
    assert spec and spec.origin
    module = package / Path(spec.origin).name
    return SimpleNamespace(
        parent=package.parent, package=package, module=module, record=module.with_suffix(".json")
    )


def edit(**changes: object) -> Callable[[SimpleNamespace], None]:
    def damage(copy: SimpleNamespace) -> None:
        copy.record.write_text(json.dumps(json.loads(copy.record.read_text()) | changes))

    return damage


def make_source_tree(copy: SimpleNamespace) -> None:
    (copy.parent.parent / "csrc").mkdir()
    (copy.parent.parent / "setup.py").touch()
    copy.module.unlink()


DAMAGES: dict[str, tuple[Callable[[SimpleNamespace], Any], str]] = {
    "built for another torch": (
        edit(torch="2.10.0+cpu"),
        rf"built for torch 2\.10\.0\+cpu .*, but this is torch {re.escape(torch.__version__)}",
    ),
    "built for another CUDA": (
        edit(cuda="9.2", architectures=["sm_70"]),
        rf"built for torch .* \(CUDA 9\.2\), but this is torch .* \(CUDA {torch.version.cuda}\)",
    ),
    "no module": (lambda copy: copy.module.unlink(), r"no compiled module for Python 3\.\d+"),
    "no module in a source tree": (make_source_tree, rf"{INSTALL} -e /"),
    "a module that does not load": (
        lambda copy: copy.module.write_bytes(b"\x7fELF"),
        r"built for this torch .*, but its module does not load",
    ),
    "no record": (lambda copy: copy.record.unlink(), r"cannot tell what .* was built for"),
    "a garbled record": (
        lambda copy: copy.record.write_text("{"),
        r"cannot tell what .* built for",
    ),
    "a record of another layout": (
        edit(colour="red"),
        r"cannot tell what .* was built for.*colour",
    ),
}


class TestImportErrors:
    @pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
    def test_name_the_fix(
        self,
        copy: SimpleNamespace,
        damage: Callable[[SimpleNamespace], Any],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        damage(copy)
        parent = ModuleType("damaged")
        parent.__path__ = [str(copy.package)]
        monkeypatch.setitem(sys.modules, "damaged", parent)
        monkeypatch.delitem(sys.modules, "damaged._build", raising=False)
        build = load("damaged._build", copy.package / "_build.py")
        with pytest.raises(ImportError, match=message) as caught:
            build.load_extension()
        assert f"{sys.executable} {INSTALL}" in str(caught.value)

    def test_come_before_an_undefined_symbol(self, copy: SimpleNamespace) -> None:
        edit(torch="2.10.0")(copy)
        assert "torch_freeze was built for torch 2.10.0 " in import_error(copy.parent)

    @pytest.mark.skipif(sys.platform != "linux", reason="links as Linux does")
    @pytest.mark.parametrize(
        ("needs", "reason"),
        [
            pytest.param("a library", "libc10_of_another_torch.so: cannot open", id="library"),
            pytest.param("a symbol", "undefined symbol: of_another_torch", id="symbol"),
        ],
    )
    def test_stand_where_the_loader_refuses_the_module(
        self, copy: SimpleNamespace, tmp_path: Path, needs: str, reason: str
    ) -> None:
        """For example a module built for CUDA under a CPU torch, or against another version."""
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o"]
        source, linked = "void of_another_torch(void); void* PyInit__C(void);", []
        source += "void* PyInit__C(void) { of_another_torch(); return 0; }"
        if needs == "a library":
            library = tmp_path / "libc10_of_another_torch.so"
            subprocess.run(
                [*command, library], input="void of_another_torch(void) {}", text=True, check=True
            )
            linked = ["-Wl,--no-as-needed", f"-L{tmp_path}", "-lc10_of_another_torch"]
        subprocess.run([*command, copy.module, *linked], input=source, text=True, check=True)
        said = import_error(copy.parent)
        assert re.search(
            rf"was built for this torch .*, but its module does not load .*{reason}", said
        )

    def test_come_for_a_module_built_against_another_torch(self) -> None:
        """This uses a real module, where CI has built for two versions of torch."""
        other = os.environ.get("TORCH_FREEZE_OF_ANOTHER_TORCH")
        if not other:
            pytest.skip("TORCH_FREEZE_OF_ANOTHER_TORCH names no folder of such a torch_freeze")
        said = import_error(Path(other))
        assert re.search(
            rf"was built for torch .*, but this is torch {re.escape(torch.__version__)}", said
        )

    def test_come_without_torch(self, copy: SimpleNamespace) -> None:
        said = import_error(copy.parent, "import sys; sys.modules['torch'] = None; ")
        assert "torch_freeze needs torch, which" in said
        assert "-m pip install torch\n" in said


def import_error(folder: Path, before: str = "") -> str:
    """What `import torch_freeze` raises in a process that finds the one in this folder."""
    done = subprocess.run(
        [sys.executable, "-c", f"{before}import torch_freeze"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.rindex("\nImportError: ")
    assert f"{sys.executable} {INSTALL}" in done.stderr[last:], done.stderr
    return done.stderr[last:]


def test_the_folder_of_a_clone_hides_no_installed_package() -> None:
    assert importlib.machinery.PathFinder.find_spec("torch_freeze", [str(ROOT)]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_module_shares_the_thread_pool_of_torch() -> None:
    """Two OpenMP runtimes in a process would have two pools, and torch sizes only one."""
    code = (
        "import torch_freeze, re\n"
        "print(*re.findall(r'/.*lib[gi]?omp.*', open('/proc/self/maps').read()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runtimes = set(done.stdout.split())
    assert len(runtimes) == 1
    site = Path(torch.__file__).parent.parent
    assert runtimes.pop().startswith((f"{site}/torch/lib/", f"{site}/torch.libs/"))


def fake_torch(cuda: str | None, *gpus: tuple[int, int]) -> Any:
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            device_count=lambda: len(gpus), get_device_capability=lambda index: gpus[index]
        ),
    )


def fake_nvcc(root: Path, release: str, wrapper: Path | None = None) -> None:
    """An nvcc in ``root``/bin that prints its version as nvcc does, and perhaps a wrapper of it."""
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f'--dryrun) echo "#\\$ _HERE_={root}/bin" >&2\n'
        f"""  echo '#$ INCLUDES="-I{root}/bin/../include"  ' >&2;;\n"""
        "--list-gpu-arch) printf 'compute_75\\ncompute_100\\ncompute_90\\ncompute_80\\n';;\nesac\n"
    )
    nvcc.chmod(0o755)
    if wrapper:
        wrapper.mkdir()
        (wrapper / "nvcc").write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
        (wrapper / "nvcc").chmod(0o755)


class TestToolkit:
    @pytest.fixture(autouse=True)
    def empty_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leave only /usr/bin/env, sh and what a test makes to be found."""
        monkeypatch.setenv("PATH", str(tmp_path / "wrapper"))

    def test_is_found_behind_a_wrapper(self, setup_py: ModuleType, tmp_path: Path) -> None:
        fake_nvcc(tmp_path / "cuda", "99.0", wrapper=tmp_path / "wrapper")
        toolkit = setup_py.find_toolkit(fake_torch("99.2"), tmp_path)
        assert toolkit.home == tmp_path / "cuda"
        assert toolkit.includes == [str(tmp_path / "cuda" / "include")]
        assert toolkit.known == [75, 80, 90, 100]

    def test_is_found_in_the_packages_of_torch(self, setup_py: ModuleType, tmp_path: Path) -> None:
        fake_nvcc(tmp_path / "nvidia" / "cu99", "99.0")
        toolkit = setup_py.find_toolkit(fake_torch("99.2"), tmp_path / "nvidia")
        assert toolkit.home == tmp_path / "nvidia" / "cu99"

    def test_of_another_major_version_is_passed_over(
        self, setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_nvcc(tmp_path / "old", "98.8")
        fake_nvcc(tmp_path / "cuda", "99.0", wrapper=tmp_path / "wrapper")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
        assert setup_py.find_toolkit(fake_torch("99.2"), tmp_path).home == tmp_path / "cuda"
        assert "98" in setup_py.find_toolkit(fake_torch("97.0"), tmp_path)

    @pytest.mark.parametrize(
        ("use_cuda", "cuda", "reason"),
        [
            pytest.param("", None, "a build without CUDA", id="torch has no CUDA"),
            pytest.param("", "99.2", "torch needs an nvcc of CUDA 99", id="there is no nvcc"),
            pytest.param("0", "99.2", "USE_CUDA=0 is set", id="it is not wanted"),
        ],
    )
    def test_missing_is_explained(
        self,
        setup_py: ModuleType,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        use_cuda: str,
        cuda: str | None,
        reason: str,
    ) -> None:
        monkeypatch.setenv("USE_CUDA", use_cuda)
        assert reason in setup_py.find_toolkit(fake_torch(cuda), tmp_path)

    @pytest.mark.parametrize(
        ("use_cuda", "cuda", "message"),
        [
            pytest.param("1", None, "USE_CUDA=1, but this torch", id="torch has no CUDA"),
            pytest.param("1", "99.2", r"set CUDA_HOME or .*==99\.2\.\*", id="there is no nvcc"),
            pytest.param("yes", "99.2", "USE_CUDA='yes'; it is 0, 1", id="not a choice"),
        ],
    )
    def test_insisted_on_stops_the_build(
        self,
        setup_py: ModuleType,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        use_cuda: str,
        cuda: str | None,
        message: str,
    ) -> None:
        monkeypatch.setenv("USE_CUDA", use_cuda)
        with pytest.raises(SystemExit, match=message):
            setup_py.find_toolkit(fake_torch(cuda), tmp_path)


KNOWN = [50, 60, 61, 75, 80, 86, 89, 90, 100, 103, 120, 121]


@pytest.mark.parametrize(
    ("gpus", "wanted", "codes"),
    [
        pytest.param(
            [], None, "sm_80 sm_90 sm_100 sm_120 compute_80", id="no GPU: one for each generation"
        ),
        pytest.param([(9, 0)], None, "sm_90 compute_90", id="one GPU: its own"),
        pytest.param(
            [(10, 3), (8, 6), (8, 6)],
            None,
            "sm_86 sm_103 compute_103",
            id="several GPUs: each once",
        ),
        pytest.param([(13, 0)], None, "sm_121 compute_121", id="a GPU newer than nvcc: its newest"),
        pytest.param([(3, 5)], None, "sm_50 compute_50", id="a GPU older than nvcc: its oldest"),
        pytest.param([(9, 0)], "8.0;8.6+PTX", "sm_80 compute_86 sm_86", id="a list: as it says"),
        pytest.param([(9, 0)], "native", "sm_90 compute_90", id="native: the GPU in sight"),
    ],
)
def test_architectures(
    setup_py: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[tuple[int, int]],
    wanted: str | None,
    codes: str,
) -> None:
    if wanted:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    flags = setup_py.architecture_flags(fake_torch("99.0", *gpus), KNOWN)
    assert [flag.split(",code=")[1] for flag in flags] == codes.split()


def test_a_build_without_torch_says_what_to_run(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install --no-build-isolation") as caught:
        setup_py.import_torch()
    assert sys.prefix in str(caught.value)


@pytest.mark.parametrize(
    ("path", "include", "message"),
    [
        pytest.param("", None, r"finds no .*c\+\+.*apt-get install g\+\+", id="no compiler"),
        pytest.param(None, "/none", r"/none/Python\.h\..*python3-dev", id="no headers"),
    ],
)
def test_a_build_that_cannot_compile_says_what_to_install(
    setup_py: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    path: str | None,
    include: str | None,
    message: str,
) -> None:
    setup_py.check_compiler("cc")
    if path is not None:
        monkeypatch.setenv("PATH", path)
    if include is not None:
        monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: include)
    with pytest.raises(SystemExit, match=message) as caught:
        setup_py.check_compiler("c++")
    assert f"TORCH_FREEZE_NO_EXTENSION=1 {sys.executable} {INSTALL} ." in str(caught.value)


def test_a_package_pinned_to_a_torch_names_it(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup_py.named() == (torch_freeze.__version__, "torch>=2.11")
    monkeypatch.setenv("TORCH_FREEZE_PIN_TORCH", "1")
    version, requirement = setup_py.named()
    assert version == f"{torch_freeze.__version__}+torch{torch.__version__.replace('+', '.')}"
    assert requirement == f"torch=={importlib.metadata.version('torch')}"


def test_a_build_with_an_old_setuptools_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(
        SystemExit, match=r"has 65\.5\.0\. Run\n    pip install --upgrade setuptools"
    ):
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")


class TestSimulatedCuda:
    """It stands in for one CUDA under some versions of torch, and says so under others."""

    @staticmethod
    def pretend(
        monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, platform: str
    ) -> None:
        torch_ = SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(simulation, "torch", torch_)
        monkeypatch.setattr(simulation, "sys", SimpleNamespace(platform=platform, path=[]))

    @pytest.mark.parametrize("minor", simulation.TORCH)
    def test_takes_the_torch_that_it_was_made_for(
        self, minor: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.pretend(monkeypatch, f"{minor}.9+cu130", f"{simulation.CUDA}.0", "linux")
        simulation.check_versions()

    @pytest.mark.parametrize(
        ("version", "cuda", "platform"),
        [
            pytest.param("2.1.0+cu130", "13.0", "linux", id="another torch"),
            pytest.param(f"{simulation.TORCH[-1]}5.0", "13.0", "linux", id="2.14 is no 2.145"),
            pytest.param(f"{simulation.TORCH[-1]}.1+cu126", "12.6", "linux", id="another CUDA"),
            pytest.param(f"{simulation.TORCH[-1]}.1+cpu", None, "linux", id="no CUDA"),
            pytest.param(f"{simulation.TORCH[-1]}.1", "13.0", "darwin", id="another system"),
        ],
    )
    def test_says_what_it_needs_elsewhere(
        self,
        version: str,
        cuda: str | None,
        platform: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        self.pretend(monkeypatch, version, cuda, platform)
        monkeypatch.setattr(simulation, "OUT", tmp_path / "out")
        with pytest.raises(SystemExit) as stopped:
            simulation.main()
        said = str(stopped.value)
        assert f"simulates CUDA {simulation.CUDA} for torch {simulation.TORCH[0]}" in said
        assert f"this is torch {version} with CUDA {cuda or 'none'} on {platform}" in said
        assert "`make gpu`" in said
        assert not (tmp_path / "out").exists()

    def test_every_planted_fault_has_its_place_in_the_source(self) -> None:
        for fault in mutants.FAULTS:
            assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault.name
            assert fault.old != fault.new, fault.name


def test_every_make_target_is_in_its_help() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    done = subprocess.run([make, "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^  make ([\w-]+)", done.stdout, re.MULTILINE) == targets[1].split()
