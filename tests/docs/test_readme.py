"""The README's code runs as it stands, and its commands are there."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import itertools
import pathlib
import re
import shlex
import statistics
from typing import Any

import pytest
import torch
from torch import nn

import torch_freeze

ROOT = pathlib.Path(__file__).parents[2]
HOW_WE_KNOW = (ROOT / "docs" / "how-we-know.md").read_text()
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}


def block(start: str, page: str = "README.md") -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    found = [text for text in blocks if text.startswith(start)]
    assert len(found) == 1, f"{len(found)} blocks of {page} start with {start!r}"
    return found[0]


def test_the_first_code_freezes_and_unfreezes(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.BatchNorm1d(16))
    model = nn.Sequential()
    model.add_module("backbone", backbone)
    model.add_module("head", nn.Linear(16, 4))
    seen = [[p.detach().clone() for p in model.parameters()]]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
        seen.append([p.detach().clone() for p in model.parameters()])

    names = {"model": model, "train": train}
    exec(block("import torch_freeze\n"), names)
    assert "4 changed" in capsys.readouterr().out.splitlines()[0]
    assert all(p.requires_grad for p in model.parameters())
    moved = [
        [not torch.equal(old, new) for old, new in zip(*epochs, strict=True)]
        for epochs in itertools.pairwise(seen)
    ]
    # The parameters of the backbone come first, then the two of the head.
    assert moved == [[False] * 4 + [True] * 2] * 2 + [[True] * 6] * 2


def test_the_page_use_runs_and_unfreezes(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(block("import torch\n", "docs/use.md"), names)
    assert "4 changed" in capsys.readouterr().out.splitlines()[0]
    trainable = {name for name, p in names["model"].named_parameters() if p.requires_grad}
    assert trainable == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_the_equivalent_is_equivalent() -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(block("def reference_step"), names)
    nets = []
    for make, step in (
        (torch_freeze.FrozenAwareAdamW, torch_freeze.FrozenAwareAdamW.step),
        (torch.optim.AdamW, names["reference_step"]),
    ):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        optimizer = make(net.parameters(), lr=0.01, weight_decay=0.1)
        for i in range(6):
            net[0].requires_grad_(i not in (2, 3))
            net(torch.ones(2, 5)).square().sum().backward()
            step(optimizer)
        nets.append(net)
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_block_of_the_readme_is_tested() -> None:
    starts = ("import torch_freeze\n", "def reference_step")
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == len(starts) and all(text.startswith(starts) for text in blocks)


def mentioned(pattern: str) -> list[str]:
    found = (re.findall(pattern, text, re.MULTILINE) for text in PAGES.values())
    return sorted({name for names in found for name in names})


@pytest.mark.parametrize("target", mentioned(r"(?:^|`)make ([\w-]+)"))
def test_make_knows(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", mentioned(r"`python ([\w/]+\.py)"))
def test_the_script_exists(command: str) -> None:
    assert (ROOT / shlex.split(command)[0]).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_the_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert missing == []


FILES = r"`((?:src|csrc|tests|benchmarks|docs|examples)/[\w./-]+)`"


@pytest.mark.parametrize("file", mentioned(FILES))
def test_the_file_that_a_page_names_exists(file: str) -> None:
    assert (ROOT / file).exists()


@pytest.mark.parametrize(
    "test",
    sorted(set(re.findall(r"`(tests/[\w/*]+\.py)`", HOW_WE_KNOW))),
)
def test_the_page_how_we_know_names_tests_that_exist(test: str) -> None:
    files = list(ROOT.glob(test))
    named = re.compile(r"^\s*(def )?test_\w+[(,]", re.MULTILINE)  # or bound: test_a, test_b = …
    assert files and all(named.search(file.read_text()) for file in files)


RESULTS = ROOT / "benchmarks" / "results"


def recorded(run: str) -> dict[tuple[str, str, str], list[float]]:
    """The values of a recorded run, by workload, contestant and measure."""
    with (RESULTS / f"{run}.csv").open() as file:
        return {
            (row["workload"], row["contestant"], row["measure"]): [
                float(value) for value in row["value"].split()
            ]
            for row in csv.DictReader(file)
        }


# By the optimizer: the recorded runs, the first of which has the percentiles, and the rows.
USUAL_SPEEDS = {
    "161 one-element parameters": ("tiny161", "warm", "all"),
    "the same, cold caches": ("tiny161", "cold", "all"),
    "1000 parameters, 998 of them frozen; stock gets only the other 2": (
        "frozen998",
        "warm",
        "filter",
    ),
    "the same, cold caches ": ("frozen998", "cold", "filter"),
    "50 param groups of 10 tensors of 64 elements": ("groups50", "warm", "all"),
}
LARGE_SPEEDS = {
    "ViT-B/16": ("vit_b_16/0", "warm", "all"),
    "MobileNetV3-small": ("mobilenet_v3_small/0", "warm", "all"),
}
SPEEDS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, str, str]]]] = {
    "FrozenAwareSGD": (
        ("amd_epyc_targets", "amd_epyc"),
        USUAL_SPEEDS
        | {"ResNet-50, momentum and decay": ("resnet50/0", "warm", "all")}
        | LARGE_SPEEDS,
    ),
    "FrozenAwareAdamW": (
        ("amd_epyc_targets_adamw",),
        USUAL_SPEEDS
        | {
            "465 param groups of 1 tensor of 64 elements": ("groups465", "warm", "all"),
            "ResNet-50": ("resnet50/0", "warm", "all"),
        }
        | LARGE_SPEEDS,
    ),
}


@pytest.mark.parametrize("optimizer", SPEEDS)
def test_the_speed_table_is_the_recorded_one(optimizer: str) -> None:
    """Cells with percentiles are of the run of the targets, the others of the longer one."""
    runs, titles = SPEEDS[optimizer]
    samples = {
        (run, *key): torch.tensor(values, dtype=torch.float64)
        for run in runs
        for key, values in recorded(run).items()
    }
    page = PAGES["docs/benchmarks.md"]
    heading = rf"^\| step\(\) on the CPU \| {optimizer} \|.*\n\|.*\n((?:\|.*\|\n)+)"
    table = re.search(heading, page, re.MULTILINE)
    assert table is not None

    def two_digits(value: float) -> str:
        return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"

    rows = table[1].splitlines()
    for (title, (workload, measure, scope)), row in zip(titles.items(), rows, strict=True):
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert name == title.strip()
        if len(cells) == 3:  # both ratios are to the same time
            cells.insert(2, cells[0])
        for form, time, cell in zip(("default", "fused"), cells[::2], cells[1::2], strict=True):
            run = runs[0] if "[" in cell else runs[1]
            mine = f"ours/{form}" if (run, workload, f"ours/{form}", measure) in samples else "ours"
            shown, unit = time.split()
            ours = float(samples[runs[0], workload, mine, measure].quantile(0.5)) / 1e3
            assert float(shown) == pytest.approx(ours if unit == "µs" else ours / 1e3, rel=0.03)
            of_stock, of_ours = (
                samples[run, workload, who, measure] for who in (f"{scope}/{form}", mine)
            )
            expected = f"{two_digits(float(of_stock.quantile(0.5) / of_ours.quantile(0.5)))}x"
            if "[" in cell:
                spread = (of_stock / of_ours).quantile(torch.tensor([0.1, 0.9]).double())
                low, high = spread.tolist()
                expected += f" [{two_digits(low)}-{two_digits(high)}]"
            assert cell.startswith(expected), (name, form)


def benchmark_table(first: str) -> tuple[list[str], list[str]]:
    """The other columns, and the lines, of the table whose first column is called that."""
    pattern = rf"^\| {first} (.*)\n\|.*\n((?:\|.*\|\n)+)"
    table = re.search(pattern, PAGES["docs/benchmarks.md"], re.MULTILINE)
    assert table is not None
    return [cell.strip() for cell in table[1].strip("| ").split("|")], table[2].splitlines()


CACHED_FEATURES = {
    "ResNet-18 at 64², half frozen": "resnet18/half",
    "ResNet-18 at 64², all but the head": "resnet18/head",
    "ViT at 64², half frozen": "vit/half",
    "ViT at 64², all but the head": "vit/head",
    "all-MiniLM-L6-v2, all but the head": "sentences/head",
    "ResNet-50 at 224², all but the head (an iteration)": "resnet50/head/iteration",
}


def test_the_table_of_cached_features_is_the_recorded_one() -> None:
    samples = recorded("amd_epyc_epochs")
    exact = [*CACHED_FEATURES.values(), "resnet18/schedule"]
    assert [samples[workload, "cached", "difference"] for workload in exact] == [[0]] * len(exact)

    def shown(nanoseconds: float) -> str:
        unit, size = ("s", 1e9) if nanoseconds >= 1e9 else ("ms", 1e6)
        return f"{nanoseconds / size:.3g} {unit}"

    expected = []
    for title, workload in CACHED_FEATURES.items():
        single = workload.endswith("/iteration")
        later, filling = ("iteration", "filling") if single else ("epoch", "cached")
        first = "iteration" if single else "first epoch"
        times = {
            who: statistics.median(samples[workload, who, later])
            for who in ("ours", "cached", "by hand")
        }
        filled, plain = (
            statistics.median(samples[workload, who, first]) for who in (filling, "ours")
        )
        size = "-" if single else f"{samples[workload, 'cached', 'features'][0] / 1e6:.1f} MB"
        gains = (f"{times['ours'] / times[who]:,.1f}x" for who in ("cached", "by hand"))
        cells = (title, *map(shown, (times["ours"], times["cached"])), *gains)
        expected.append(f"| {' | '.join((*cells, f'{filled / plain:.2f}x', size))} |")
    _, lines = benchmark_table("each epoch after the first")
    assert lines == expected, "it is:\n" + "\n".join(expected)


FROZEN_ROWS = {
    "Embedding of 128,256 x 4,096 in bfloat16, 2 rows live": "lookup",
    "the same, 64 scattered rows live": "scattered",
    "Embedding and tied head of 32,000 x 512 in float32, 2 rows live": "tied",
}
ROW_COLUMNS = {
    "rows frozen": "ours",
    "PEFT": "PEFT",
    "masked": "masked",
    "restored": "restored",
}


def test_the_table_of_frozen_rows_is_the_recorded_one() -> None:
    samples = recorded("amd_epyc_rows_adamw")
    changed = [samples[workload, "ours", "changed"] for workload in FROZEN_ROWS.values()]
    assert changed == [[0]] * len(FROZEN_ROWS)

    def cell(workload: str, who: str) -> str:
        measure = "alone" if who == "ours" else f"with {who}"
        if (workload, who, measure) not in samples:
            return "-"
        times, frozen = (samples[workload, key, measure] for key in (who, "frozen"))
        over = statistics.median(times) / statistics.median(frozen)
        more = samples[workload, who, "extra"][0] / 1e6
        return f"{over:.{2 if who == 'ours' else 1}f}x, {more:,.{2 if more < 10 else 0}f} MB"

    expected = [
        f"| {' | '.join((title, *(cell(workload, who) for who in ROW_COLUMNS.values())))} |"
        for title, workload in FROZEN_ROWS.items()
    ]
    columns, lines = benchmark_table("an iteration")
    assert columns == list(ROW_COLUMNS)
    assert lines == expected, "it is:\n" + "\n".join(expected)


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
    lists = dict(re.findall(r"^::: torch_freeze\.(\w+)\n.*?members: \[(.*?)\]", page, re.M | re.S))
    assert list(lists) == ["FrozenAwareAdamW", "FrozenAwareAdam", "FrozenAwareSGD"]
    for name, listed in lists.items():
        mro = getattr(torch_freeze, name).__mro__
        ours = [c for c in mro if c.__module__.startswith("torch_freeze.")]
        public = {key for c in ours for key in vars(c) if not key.startswith("_")}
        # The page says that the methods of the first are those of all.
        assert public == set(lists["FrozenAwareAdamW"].split(", "))
        assert listed in ("", lists["FrozenAwareAdamW"])
