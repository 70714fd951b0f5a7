"""An sdist, a wheel built from it, and that wheel alone in a clean environment."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Not by find_spec: setuptools would take this process for pip's, and torch's compiler fails then.
HAS_PIP = any(importlib.metadata.distributions(name="pip"))
pytestmark = pytest.mark.skipif(
    not (HAS_PIP and (ROOT / "setup.py").is_file()), reason="needs pip and the source tree"
)


def run(*command: object, cwd: Path) -> str:
    """What a command prints; where it fails, that and its errors."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["USE_CUDA"] = "0"
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    # Only the files that git would have, so that nothing built before gets in.
    kept = ("*.toml", "*.py", "*.in", "*.md", "LICENSE", "Makefile", ".clang-format", "mkdocs.yml")
    names = [path.name for pattern in kept for path in ROOT.glob(pattern)]
    names += ["csrc", "src", "tests", "benchmarks", "examples", "docs"]
    with tarfile.open(folder / "tree.tar", "w") as tree:
        for name in names:
            tree.add(ROOT / name, name, filter=lambda i: None if "__pycache__" in i.name else i)
    with tarfile.open(folder / "tree.tar") as tree:
        tree.extractall(source, filter="data")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder / "dist", cwd=source)
    (made,) = (folder / "dist").glob("*.tar.gz")
    return made


def make_wheel(sdist: Path, folder: str) -> Path:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, sdist, cwd=sdist.parent)
    (made,) = (sdist.parent / folder).glob("*.whl")
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """One built here, which takes long, or the one that was built from such an sdist before."""
    made = os.environ.get("TORCH_FREEZE_WHEEL")
    return Path(made) if made else make_wheel(sdist, "compiled")


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FREEZE_NO_EXTENSION", "1")
        return make_wheel(sdist, "pure")


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel, tmp_path_factory.mktemp("clean") / "env")


def environment_with(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel, which sees torch where it is; nothing is downloaded."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--quiet")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", *options, wheel, cwd=folder)
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                       cwd=folder).strip())  # fmt: skip
    here = sysconfig.get_path("purelib")
    around = {str(Path(torch.__file__).parents[1]), here}
    # After the wheel's own folder, so that this environment's editable torch_freeze is not found.
    (purelib / "torch.pth").write_text("".join(f"{path}\n" for path in sorted(around)))
    return python


def test_an_sdist_has_all_that_is_needed_to_build_and_test_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in ("LICENSE", "Makefile", "CHANGELOG.md", "pyproject.toml", "setup.py"):
        assert wanted in names
    for folder in ("csrc", "src", "tests", "benchmarks", "examples", "docs"):
        source = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.parent != ROOT / "benchmarks" / "results"
            and path.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".md", ".svg")
        }
        assert source <= names, sorted(source - names)
    assert "src/torch_freeze/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert not [name for name in names if name.startswith("benchmarks/results")]


def test_a_wheel_has_the_module_its_types_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(metadata))
    assert any(name.startswith("torch_freeze/_C.") and name.endswith(".so") for name in names)
    assert {"torch_freeze/py.typed", "torch_freeze/_C.pyi"} <= names
    assert "torch_freeze/integrations/lightning.py" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "benchmarks", "docs"))]
    assert about["License-Expression"] == "BSD-3-Clause"
    extras = {"bench", "dev", "examples", "lightning", "test", "transformers"}
    assert set(about.get_all("Provides-Extra", [])) == extras


SCRIPT = """
import torch, torch_freeze
model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
torch_freeze.freeze(model, "0")
optimizer = torch_freeze.FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)
before = [layer.weight.clone() for layer in model]
model(torch.ones(3, 8)).sum().backward()
optimizer.step()
print(torch_freeze.__file__)
print([torch.equal(layer.weight, weight) for layer, weight in zip(model, before)])
"""


def test_the_wheel_works_in_a_clean_environment(clean_python: Path) -> None:
    where, changed = run(clean_python, "-c", SCRIPT, cwd=clean_python.parent).splitlines()
    assert Path(where).is_relative_to(clean_python.parents[1])
    assert changed == "[True, False]"


def test_the_package_needs_no_optional_package(clean_python: Path) -> None:
    optional = {"lightning", "transformers", "accelerate", "sklearn", "matplotlib", "torchvision"}
    said = run(
        clean_python,
        "-c",
        f"import sys, torch, torch_freeze; print({optional} & set(sys.modules))",
        cwd=clean_python.parent,
    )
    assert said.strip() == "set()"


def test_the_installed_package_is_typed_for_its_users(clean_python: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    (tmp_path / "use.py").write_text(
        "import torch\nimport torch_freeze\n"
        "optimizer = torch_freeze.FrozenAwareSGD([torch.zeros(2)], lr=0.1)\n"
        "frozen: int = torch_freeze.freeze(torch.nn.Linear(2, 2)).total.frozen\n"
    )
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", clean_python)
    run(*mypy, "--cache-dir", tmp_path / "cache", "use.py", cwd=tmp_path)


def test_the_stub_of_the_compiled_module_agrees_with_it(clean_python: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy, which has stubtest, is not installed")
    # Its metaclass is pybind11's, which no stub can name; its members are compared.
    (tmp_path / "known").write_text(
        "torch_freeze._C.BackwardStep\ntorch_freeze._C.OptimizerSteps\n"
        "torch_freeze._C.OptimizerSteps.__init__\n"  # it has none: only C++ makes one
    )
    # What is there is compared, for pybind11's functions have no signatures. To read all of torch,
    # for which stubtest has no cache, would take five times as long.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n"
    )
    stubtest = (clean_python, "-m", "mypy.stubtest", "--allowlist", "known")
    run(*stubtest, "--mypy-config-file", "mypy.ini", "torch_freeze._C", cwd=tmp_path)


WITHOUT_EXTENSION = """
import importlib, pathlib, warnings
import torch, torch_freeze

folder = pathlib.Path(torch_freeze.__file__).parent
for path in set(folder.glob("*.py")) - {folder / "__init__.py"}:
    importlib.import_module(f"torch_freeze.{path.stem}")
assert all(hasattr(torch_freeze, name) for name in torch_freeze.__all__)
assert not torch_freeze.build_info().compiled


def train(make, freeze, options):
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    model = torch.nn.Sequential(*layers)
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    for i in range(6):
        optimizer.zero_grad()
        freeze(model, i)
        model(torch.randn(6, 8)).square().sum().backward()
        if i == 2:
            model[0].requires_grad_(False)  # with a gradient
        optimizer.step()
    return [tensor for tensor in (*model.parameters(), *model.buffers())], optimizer


def by_hand(model, i):
    model[0].requires_grad_(i not in (2, 3))


def stock(kind):
    def make(*args, **options):
        optimizer = kind(*args, **options, foreach=False)
        def drop(optimizer, args, kwargs):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.grad if p.requires_grad else None
        optimizer.register_step_pre_hook(drop)
        return optimizer
    return make


FAMILIES = {
    "SGD": ({"momentum": 0.9}, "frozen_momentum", "momentum_dtype"),
    "Adam": ({"amsgrad": True}, "frozen_state", "moment_dtype"),
    "AdamW": ({}, "frozen_state", "moment_dtype"),
}
for name, (hyper, policy, dtype) in FAMILIES.items():
    kind = getattr(torch_freeze, f"FrozenAware{name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours, optimizer = train(kind, by_hand, hyper)
        train(kind, by_hand, hyper)
    said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(said) == 1 and "no compiled module" in said[0] and "pip install" in said[0], said
    theirs, _ = train(stock(getattr(torch.optim, name)), by_hand, hyper)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name

    for value, left in (("keep", 4), ("reset", 4), ("drop", 2)):
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        options = hyper | {policy: value, "fused": True}
        optimizer = kind(model.parameters(), **options)
        model(torch.ones(3, 8)).sum().backward()
        optimizer.step()
        with torch_freeze.guard(model):
            torch_freeze.freeze(model, "0")
            optimizer.zero_grad()
            assert len(optimizer.state) == left, (name, value)
            torch_freeze.unfreeze(model, "0")
        print(torch_freeze.report(model, optimizer), torch_freeze.audit(model, optimizer))
    model[0].requires_grad_(False)
    optimizer.step()
    optimizer.param_groups[0][policy] = "forget"
    try:
        optimizer.step()
    except ValueError as error:
        assert f"{policy} of param_groups[0] is 'forget'" in str(error), error
    else:
        raise AssertionError(name)
    for options in ({"step_in_backward": True}, {dtype: torch.bfloat16}):
        try:
            kind(model.parameters(), **options)
        except RuntimeError as error:
            assert "needs the compiled module" in str(error), error
        else:
            raise AssertionError(options)

    # A late parameter counts its own updates.
    if "step" in next(iter(optimizer.state.values())):
        torch_freeze.unfreeze(model, "0")
        optimizer.param_groups[0][policy] = "keep"
        model(torch.ones(3, 8)).sum().backward()
        optimizer.step()
        counts = [int(optimizer.state[p]["step"]) for p in model.parameters()]
        assert counts == [1, 1, 2, 2], counts

model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
optimizer = torch_freeze.FrozenAwareSGD(model.parameters(), momentum=0.9)
model(torch.ones(3, 8)).sum().backward()
optimizer.step()
optimizer.state[model[1].bias]["momentum_buffer"] = torch.zeros(3)
before = model[1].bias.clone()
model(torch.ones(3, 8)).sum().backward()
try:
    optimizer.step()
except ValueError as error:
    assert "momentum_buffer of param_groups[0]['params'][3] has shape [3]" in str(error), error
else:
    raise AssertionError("a momentum buffer of another shape")
assert torch.equal(model[1].bias, before)
"""


def test_without_the_extension_everything_imports_and_steps_as_stock(
    pure_wheel: Path, tmp_path: Path
) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    python = environment_with(pure_wheel, tmp_path / "env")
    run(python, "-c", WITHOUT_EXTENSION, cwd=tmp_path)
