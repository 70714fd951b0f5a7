"""The README's code runs as it stands, and its commands are there."""

from __future__ import annotations

import importlib.util
import inspect
import json
import pathlib
import re
import shlex
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

import torch_freeze

ROOT = pathlib.Path(__file__).parents[2]
HOW_WE_KNOW = (ROOT / "docs" / "how-we-know.md").read_text()
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def block(start: str) -> str:
    found = [text for text in BLOCKS if text.startswith(start)]
    assert len(found) == 1, f"{len(found)} blocks of README.md start with {start!r}"
    return found[0]


def test_the_ten_lines_run_and_unfreeze(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(block("import torch\n"), names)
    assert "4 changed" in capsys.readouterr().out.splitlines()[0]
    trainable = {name for name, p in names["model"].named_parameters() if p.requires_grad}
    assert trainable == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_the_equivalent_is_equivalent() -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(block("def reference_step"), names)
    nets = []
    for make, step in (
        (torch_freeze.FrozenAwareSGD, torch_freeze.FrozenAwareSGD.step),
        (torch.optim.SGD, names["reference_step"]),
    ):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        optimizer = make(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for i in range(6):
            net[0].requires_grad_(i not in (2, 3))
            net(torch.ones(2, 5)).square().sum().backward()
            step(optimizer)
        nets.append(net)
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def side_by_side() -> dict[str, Any]:
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4), nn.Linear(4, 2)
    net = nn.Sequential(body, head)
    body.requires_grad_(False)

    def train(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            net(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
            scheduler.step()

    return {
        "torch": torch,
        "torch_freeze": torch_freeze,
        "OneCycleLR": OneCycleLR,
        "body": body,
        "head": head,
        "net": net,
        "train": train,
    }


def test_before_raises_what_it_says() -> None:
    text = block("# before")
    said = re.search(r"# (\w+: .*)$", text.strip())
    assert said
    with pytest.raises(KeyError) as caught:
        exec(text, side_by_side())
    assert f"KeyError: {caught.value}" == said[1]


def test_after_trains_the_body() -> None:
    names = side_by_side()
    before = names["body"].weight.clone()
    exec(block("# after"), names)
    assert not torch.equal(names["body"].weight, before)


def test_every_block_is_tested() -> None:
    # The last one is tests/docs/test_memory_page.py's.
    starts = ("import torch\n", "def reference_step", "# before", "# after", "optimizer = torch_")
    assert all(text.startswith(starts) for text in BLOCKS)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([\w-]+)", README))))
def test_make_knows(target: str) -> None:
    if target in ("sure", "it"):
        pytest.fail(f"'make {target}' is no command")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`python ([\w/]+\.py)", README))))
def test_the_script_exists(command: str) -> None:
    assert (ROOT / shlex.split(command)[0]).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_the_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize(
    "test",
    sorted(set(re.findall(r"`(tests/[\w/*]+\.py)`", HOW_WE_KNOW))),
)
def test_the_page_how_we_know_names_tests_that_exist(test: str) -> None:
    files = list(ROOT.glob(test))
    assert files and all("def test_" in file.read_text() for file in files)


RECORDED = ROOT / "benchmarks" / "results" / "cpu_epyc_2_cores_memory.json"
MEMORY_COLUMNS = {
    "stock default": "stock/default",
    "stock fused": "stock/fused",
    "FrozenAwareSGD": "ours",
    "in backward": "ours/in backward",
    "and bfloat16 momentum": "ours/in backward, bf16",
}


def test_the_memory_table_is_the_recorded_one() -> None:
    peaks = {
        (outcome["title"].partition(",")[0], outcome["case"]): {
            row["contestant"]["key"]: row["figures"]["peak"] for row in outcome["rows"]
        }
        for outcome in json.loads(RECORDED.read_text())["memory"]
        if "case" in outcome
    }
    table = re.search(r"^\| peak above the model, MB (\|.*\|\n(?:\|.*\|\n)+)", README, re.MULTILINE)
    assert table is not None
    header, _, *rows = table[1].splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == list(MEMORY_COLUMNS)
    assert len(rows) >= 6
    for row in rows:
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        model, half, _ = name.partition(", half frozen")
        of_model = peaks[model, "4" if half else "1"]
        assert cells == [f"{of_model[key] / 1e6:,.0f}" for key in MEMORY_COLUMNS.values()], name


def documented() -> list[Any]:
    """What the site has a page for, and the public members of its classes."""
    found = []
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            module, _, name = path.rpartition(".")
            package = module.rpartition(".")[2]
            if package in ("lightning", "transformers") and not importlib.util.find_spec(package):
                continue
            thing = getattr(importlib.import_module(module), name)
            members = vars(thing) if inspect.isclass(thing) else {}
            found += [thing, *(m for key, m in members.items() if not key.startswith("_"))]
    return [thing for thing in found if thing.__doc__]


def test_no_star_of_a_docstring_is_lost_on_the_site() -> None:
    """Markdown takes two of them for emphasis, unless they are code."""
    stars = []
    for thing in documented():
        text = re.split(r"^Example:", inspect.getdoc(thing) or "", flags=re.MULTILINE)[0]
        text = re.sub(r"``.+?``|`[^`]+`", "", text, flags=re.DOTALL)
        text = re.sub(r"^ +\*+\w+:", "", text, flags=re.MULTILINE)  # the name of an argument
        prose = re.split(r"^\w+:\n", text, maxsplit=1, flags=re.MULTILINE)
        # Before the sections of arguments and the like, an indented paragraph is code.
        blocks = [b for b in prose[0].split("\n\n") if not b.startswith("    ")] + prose[1:]
        stars += [line for block in blocks for line in block.splitlines() if "*" in line]
    assert stars == []


def test_the_optimizers_page_shows_every_public_member() -> None:
    page = (ROOT / "docs" / "reference" / "optimizer.md").read_text()
    listed = re.search(r"FrozenAwareSGD\n.*?members: \[(.*?)\]", page, re.DOTALL)
    ours = [
        c for c in torch_freeze.FrozenAwareSGD.__mro__ if c.__module__.startswith("torch_freeze.")
    ]
    public = {key for c in ours for key in vars(c) if not key.startswith("_")}
    assert listed and public == set(listed[1].split(", "))
