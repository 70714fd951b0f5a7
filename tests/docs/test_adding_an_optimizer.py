"""Builds the optimizer of docs/adding-an-optimizer.md from its page, and checks it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-an-optimizer.md"
CHECKS = Path(__file__).with_name("lion_checks.py")
FENCE = r'^```(\w+) title="([^"\n]+)"\n(.*?)^```$'
BLOCKS = re.findall(FENCE, PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
COMPILER = shlex.split(cpp_extension.get_cxx_compiler())[0]


def added(language: str, text: str) -> list[str]:
    """The lines of a block that somebody has to write."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [line for line in lines if language != "diff" or line.startswith("+")]


def write_into(tree: Path) -> None:
    """Write the page's files, and add the lines of its diffs after those they follow."""
    for language, name, text in BLOCKS:
        path = tree / name
        if language != "diff":
            assert not path.exists()
            path.write_text(text)
            continue
        lines = text.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if not line.startswith("+"))
        after = "".join(line[1:] for line in lines)
        source = path.read_text()
        assert source.count(before) == 1, f"{name} does not have what the page shows of it"
        path.write_text(source.replace(before, after))


def join(csrc: Path) -> None:
    """Make one file of those that know Python, since torch's headers take most of the time."""
    sources = [csrc / "bindings.cpp", *csrc.glob("core/*.cpp")]
    sources += [path for path in csrc.glob("optim/*.cpp") if not path.stem.endswith("_cpu")]
    joined = [path.rename(path.with_suffix(".inc")) for path in sorted(sources)]
    (csrc / "joined.cpp").write_text("".join(f'#include "{path}"\n' for path in joined))


def test_it_takes_fewer_than_100_lines() -> None:
    files = {name for _, name, _ in BLOCKS}
    assert {Path(name).suffix for name in files} == {".h", ".cpp", ".cu", ".py"}
    assert sum(len(added(language, text)) for language, _, text in BLOCKS) < 100


@pytest.mark.skipif(
    not ((ROOT / "setup.py").is_file() and shutil.which(COMPILER)),
    reason="needs the source tree and a C++ compiler",
)
def test_it_compiles_and_does_what_the_page_says(tmp_path: Path) -> None:
    for name in ("csrc", "src"):
        ignored = shutil.ignore_patterns("testing", "*.so", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    write_into(tmp_path)
    join(tmp_path / "csrc")
    shutil.copy(CHECKS, tmp_path)
    environment = os.environ | {"USE_CUDA": "0", "DEBUG": "1", "PYTHONPATH": str(tmp_path / "src")}
    for command in (
        # Without --inplace, which would compile the tests' own module too.
        ["setup.py", "-q", "build_ext", "--build-lib", "src"],
        ["-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), CHECKS.name],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^\d\d passed in", done.stdout, re.MULTILINE), done.stdout
