"""The suite of frozen rows: everyone trains the same rows, and what it says of them is so."""

from __future__ import annotations

import dataclasses
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas", reason="compare.py needs pandas: pip install pandas")
pytest.importorskip("tabulate", reason="compare.py needs tabulate: pip install tabulate")
pytest.importorskip("tqdm", reason="compare.py needs tqdm: pip install tqdm")
pytest.importorskip("matplotlib", reason="compare.py needs matplotlib: pip install matplotlib")

from torch_freeze_bench import command, report
from torch_freeze_bench.checks import NotEnoughMemoryError
from torch_freeze_bench.contestants import ADAMW, FAMILIES, SGD
from torch_freeze_bench.records import OURS, Measured
from torch_freeze_bench.suites import rows
from torch_freeze_bench.suites.rows import CASES, FROZEN, MASKED, PEFT, RESTORED, TOGETHER

from tests.benchmarks.compare_cases import CPU, GPUS, setting, widest

QUICK = partial(setting, quick=True)
LOOKUP, SCATTERED, TIED = CASES


@pytest.fixture(scope="module", params=["cpu", GPUS])
def found(request: pytest.FixtureRequest) -> dict[str, Measured]:
    device = torch.device(request.param)
    return {case.key: rows.run(case, QUICK(2, device, family=ADAMW)) for case in CASES}


class TestOutcome:
    def test_everyone_trains_the_live_rows_alike(self, found: dict[str, Measured]) -> None:
        for of in found.values():
            assert not any(map(of.unequal, of.contestants))
        exact = {OURS, TOGETHER, RESTORED}
        lookups = [of for key, of in found.items() if key != "tied"]
        on_cpu = all(gap == 0 for of in lookups for gap in of.of(OURS, "difference"))
        assert on_cpu or torch.cuda.is_available()
        for of in found.values():
            assert all(of.one(key, "changed") == 0 for key in exact & set(of.contestants))

    @pytest.mark.parametrize("case", [LOOKUP, TIED], ids=lambda case: case.key)
    def test_masks_let_every_frozen_row_move(
        self, case: rows.Case, found: dict[str, Measured]
    ) -> None:
        assert found[case.key].one(MASKED, "changed") == case.quick.rows - case.live

    def test_what_is_held_is_what_the_rows_need(self, found: dict[str, Measured]) -> None:
        row = LOOKUP.quick.width * LOOKUP.dtype.itemsize
        every = LOOKUP.quick.rows * row
        of = found["lookup"]
        # A gradient and two moments, and what counts the steps.
        assert 3 * 2 * row <= (of.one(OURS, "held") or 0) < 3 * 2 * row + 200
        assert of.one(FROZEN, "held") == 0
        assert 3 * every <= (of.one(MASKED, "held") or 0) < 3 * every + 200
        assert of.one(FROZEN, "extra") == 0
        assert 0 < (of.one(OURS, "extra") or 0) < every / 10
        assert every * 3 <= (of.one(MASKED, "extra") or 0) < every * 3.5
        kept = every - LOOKUP.live * row
        assert (of.one(RESTORED, "extra") or 0) >= (of.one(MASKED, "extra") or 0) + kept

    def test_each_slow_one_takes_turns_with_frozen_and_ours(
        self, found: dict[str, Measured]
    ) -> None:
        for of in found.values():
            assert {FROZEN, OURS} < set(of.contestants)
            for key in of.contestants:
                measure = "alone" if key in rows.ALONE else f"with {key}"
                assert [len(of.of(who, measure)) for who in (key, FROZEN, OURS)] == [2] * 3

    def test_peft_is_compared(self, found: dict[str, Measured]) -> None:
        pytest.importorskip("peft", reason="trainable tokens are compared: pip install peft")
        for key, of in found.items():
            case = next(case for case in CASES if case.key == key)
            table = case.quick.rows * case.quick.width * case.dtype.itemsize
            assert of.one(PEFT, "changed") == 0
            # A copy of the table with the rows in it, at least.
            assert (of.one(PEFT, "extra") or 0) > 0.9 * table
            assert f"\n{PEFT} " in report.table(of, ADAMW)

    def test_tables_targets_and_legend_fit_80_columns(self, found: dict[str, Measured]) -> None:
        every = list(found.values())
        text = "\n".join(report.table(of, ADAMW) for of in every)
        assert widest(text) <= 80
        assert len(re.findall(r"^FrozenAwareAdamW ", text, re.MULTILINE)) == 4
        legend = report.legend(every, ADAMW)
        assert len(legend) == 3 and legend[0].startswith("frozen: ")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 kB"), (57_344, "57 kB"), (131e6, "131 MB"), (4_203e6, "4.20 GB")]
)
def test_sizes_have_a_unit_that_suits_them(size: float, text: str) -> None:
    assert report.bytes_of([size]) == text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_the_batches_look_live_rows_up(case: rows.Case) -> None:
    live = case.rows(case.quick, scattered=case.scattered)
    assert len(live) == case.live and live[-1] < case.quick.rows
    gaps = set(live.diff().tolist())
    assert gaps == ({case.quick.rows // case.live} if case.scattered else {1})
    made = rows.batches(case.quick, live, CPU)
    assert len(made) == rows.STEPS
    assert not torch.equal(made[0], made[1])
    for ids in made:
        assert int(torch.isin(ids, live).sum()) >= case.quick.ids // rows.LIVE_IDS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_changed_bit_is_found(dtype: torch.dtype) -> None:
    before = torch.zeros(20_000, 3, dtype=dtype)
    now, live = before.clone(), torch.tensor([4, 19_999])
    assert rows.changed_rows(now, before, live) == 0
    now[live] = 1.0
    assert rows.changed_rows(now, before, live) == 0
    now[[0, 19_998], 2] = -0.0  # equal as numbers
    assert rows.changed_rows(now, before, live) == 2


def test_a_way_that_moves_frozen_rows_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows.WAYS, OURS, rows.Masked)
    of = rows.run(dataclasses.replace(LOOKUP, ways=(FROZEN, OURS)), QUICK(1, family=SGD))
    assert of.unequal(OURS)
    lines = {line.case.partition(": ")[2]: line for line in rows.reached([of])}
    assert lines["frozen rows with other bits"].status == "missed"
    assert lines["gradient and state"].status == "missed"


def made_up(key: str, **changed: float) -> Measured:
    """Ours is as fast as it should be, PEFT twice as slow; both but for what is changed."""
    figures = {"held": 99e3, "ours": 105.0, "peft": 210.0, "extra": 1e6, "more": 100e6, "moved": 0}
    figures |= changed
    of = Measured("rows", key, "table", kind="rows")
    of.add(FROZEN, alone=[100.0] * 3, with_PEFT=[100.0] * 3, held=0.0, extra=0.0)
    ours = {"held": figures["held"], "extra": figures["extra"], "changed": figures["moved"]}
    of.add(OURS, **ours, alone=[figures["ours"]] * 3, with_PEFT=[105.0] * 3)
    of.add(PEFT, extra=figures["more"], with_PEFT=[figures["peft"]] * 3)
    if key == "scattered":
        of.add(TOGETHER, alone=[100.0] * 3)
    return of


@pytest.mark.parametrize(
    ("key", "changed", "missed"),
    [
        ("lookup", {}, []),
        ("scattered", {}, []),
        ("lookup", {"held": 101e3}, ["gradient and state"]),
        ("lookup", {"ours": 106.0}, ["iteration over the frozen table's"]),
        ("lookup", {"peft": 209.0}, ["PEFT over ours"]),
        ("lookup", {"more": 99e6}, ["extra memory, ours of PEFT's"]),
        ("lookup", {"moved": 1.0}, ["frozen rows with other bits"]),
        ("scattered", {"ours": 111.0}, ["iteration over the frozen table's", "scattered over tog"]),
        ("tied", {"ours": 300.0, "peft": 1.0}, []),
    ],
)
def test_figures_are_compared_with_their_targets(
    key: str, changed: dict[str, float], missed: list[str]
) -> None:
    lines = list(rows.reached([made_up(key, **changed)]))
    assert len(lines) == {"lookup": 5, "scattered": 5, "tied": 4}[key]
    found = [line.case.partition(": ")[2] for line in lines if line.status == "missed"]
    assert [case[: len(words)] for case, words in zip(found, missed, strict=True)] == missed


def test_without_peft_it_is_named_and_nothing_is_said_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    of = rows.run(dataclasses.replace(LOOKUP, ways=(FROZEN, OURS, PEFT)), QUICK(1))
    assert of.unavailable == {PEFT: "this contestant needs peft: pip install peft"}
    statuses = {line.status for line in rows.reached([of]) if "PEFT" in line.case}
    assert statuses == {"not measured"}
    simulated = rows.judged(QUICK(1, simulated=True), [of])
    assert {line.status for line in simulated} == {"simulated"}
    assert "PEFT: not run: " in report.table(of, SGD)


def test_a_case_without_memory_is_skipped_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "available_bytes", lambda device: 2 * 10**9)
    assert [title for title, _ in rows.suite(setting()).tasks] == [TIED.title]
    skipped = capsys.readouterr().err.splitlines()
    assert len(skipped) == 2 and "needs 8.5 GB of memory" in skipped[0]
    assert len(rows.suite(QUICK()).tasks) == len(CASES)
    with pytest.raises(NotEnoughMemoryError):
        rows.require_memory_for("lookup", setting())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_measures_and_saves(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(LOOKUP, ways=(FROZEN, OURS))
    monkeypatch.setattr(rows, "CASES", (small,))
    given = ["--device", "cpu", "--suite", "rows", "--quick", "--steps", "1", "--results", "saved"]
    assert command.main([*given, "--optimizer", family]) == 0
    printed = capsys.readouterr().out
    assert widest(printed) <= 80 and "a few rows of a table" in printed
    ending = "_rows" if family == "sgd" else "_rows_adamw"
    assert {file.stem[-len(ending) :] for file in (tmp_path / "saved").iterdir()} == {ending}
