"""The comparison computes what it says, shows and saves it, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import check
import compare
import load
import machine
import measure
import models
import saving
import suites
import targets
from contestants import OURS, REFERENCE, Contestant, Hyper, other_packages, select
from digits import DigitsOutcome, DigitsRow
from measure import Allocations, Budget, Equality, Memory, Summary
from suites import Outcome, Row, Setting, fastest_other
from tables import digits_table, legend, outcome_table, targets_table
from units import duration, multiple
from verdict import unequal, verdict

CPU = torch.device("cpu")
for package in ("tabulate", "tqdm", "matplotlib"):
    pytest.importorskip(package, reason=f"compare.py needs {package}: pip install {package}")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved by default goes into the current folder."""
    monkeypatch.chdir(tmp_path)


def same(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> list[bool]:
    """Which tensors are equal in every bit."""
    return [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


def arguments(text: str) -> Any:
    return compare.make_parser().parse_args(text.split())


class TestSimulated:
    """What simulated CUDA measures is named so, and kept apart from what a GPU does."""

    def test_it_needs_a_clone(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr(compare, "SIMULATION", tmp_path / "run.py")
        monkeypatch.delenv(compare.SCHEDULE, raising=False)
        with pytest.raises(SystemExit) as ended:
            compare.main(["--device", "simulated"])
        assert ended.value.code == 2
        assert "clone of the repository" in capsys.readouterr().err

    def test_the_process_starts_again_on_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[list[str]] = []
        monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
        monkeypatch.delenv(compare.SCHEDULE, raising=False)
        compare.simulate(["--device", "simulated", "--quick"])
        assert started[0][-3:] == ["--device", "simulated", "--quick"]
        assert Path(started[0][1]).is_file() and "--schedule" in started[0]
        monkeypatch.setenv(compare.SCHEDULE, compare.NO_WORK)
        compare.simulate([])
        assert len(started) == 1

    def test_it_measures_host_time_alone(self) -> None:
        assert compare.plan(arguments("--device simulated"))[0] == ["synthetic"]
        with pytest.raises(compare.SimulatedError, match="host time"):
            compare.plan(arguments("--device simulated --suite models"))

    @pytest.mark.parametrize(
        ("options", "refused"),
        [
            ("--device simulated --results {}", False),
            ("--device simulated --json {}/cpu_epyc_2_cores.json", True),
            ("--device cuda --results {}", True),
            ("--device cuda --results {}/deeper", True),
            ("--device auto --plot {}/picture.png", True),
            ("--device cuda", False),
            ("--device cuda --results build/simulated", False),
        ],
    )
    def test_recorded_results_are_no_place_for_it(self, options: str, refused: bool) -> None:
        described = {"gpu": machine.SIMULATED, "simulated": "Simulated CUDA"}
        given = arguments(options.format(compare.RECORDED))
        if refused:
            with pytest.raises(compare.SimulatedError, match="simulated CUDA"):
                compare._files(given, described, ["synthetic"])
        else:
            files = compare._files(given, described, ["synthetic"])
            assert all("simulated" in file.name for file in files)

    def test_where_nothing_is_computed_nobody_is_called_equal(self) -> None:
        taken = outcome({"ours": {"warm": [1.0, 2.0]}, "all/fused": {"warm": [3.0, 5.0]}})
        for row in taken.rows:
            row.equality = None
        assert "equal" not in outcome_table(taken)
        assert "equal" not in legend("cuda", [taken], trained=False)
        text = verdict([taken], None, [], warnings=[compare.SIMULATED_WARNINGS[True]])
        assert "Simulated CUDA" in text and "Same result" not in text
        assert not unequal([taken], None)


EXACT = Equality(True, 0.0, 0.0)
HELD = Memory(102_228_128, 102_228_128, 446_000_000, 0)


def setting(steps: int = 2, device: torch.device = CPU) -> Setting:
    budget = Budget(seconds=60, least=steps, most=steps)
    return Setting(device, budget, False, random.Random(0), lambda text: None)


def outcome(
    samples: dict[str, dict[str, list[float]]],
    *,
    device: str = "cpu",
    suite: str = "models",
    equality: Equality = EXACT,
    memory: Memory | None = HELD,
    title: str = "MobileNetV3-small, all but the head frozen",
) -> Outcome:
    """An outcome with made-up samples, by contestant and measure."""
    rows = [
        Row(contestant, equality, samples[contestant.key], memory)
        for contestant in select(any_frozen=True, compiled=True)
        if contestant.key in samples
    ]
    rounds = len(samples["ours"]["warm"])
    return Outcome(
        suite=suite,
        key="made-up",
        title=title,
        device=device,
        tensors=161,
        frozen_tensors=159,
        elements=109_483_778,
        trainable_elements=2_049_000,
        frozen_percent=91.98,
        step_bytes=20_000,
        momentum=0.9,
        weight_decay=1e-4,
        batch="2 images" if suite == "models" else "",
        rows=rows,
        passes={"read-modify-write": (20_000, [1e3] * rounds), "copy": (8_000, [1e3] * rounds)},
        beside={"warm": [1_000.0, 1_200.0]},
    )


class TestStatistics:
    def test_the_summary_is_median_and_outer_tenths(self) -> None:
        assert measure.summarise([float(i) for i in range(1, 12)]) == Summary(6, 2, 10)

    def test_one_sample_is_all_of_its_summary(self) -> None:
        assert measure.summarise([3.0]) == Summary(3, 3, 3)

    def test_the_ratio_is_that_of_the_medians(self) -> None:
        assert measure.ratio([2.0, 4.0, 60.0], [1.0, 2.0, 3.0]).median == 2.0

    def test_a_slow_moment_of_the_machine_drops_out_of_the_spread(self) -> None:
        found = measure.ratio([2.0, 2.0, 20.0, 2.0, 2.0], [1.0, 1.0, 10.0, 1.0, 1.0])
        assert found == Summary(2, 2, 2)

    @pytest.mark.parametrize(
        ("rounds", "seconds", "spent"),
        [
            pytest.param(4, 5.0, False, id="fewer than the least rounds go on"),
            pytest.param(5, 0.5, False, id="time left goes on"),
            pytest.param(5, 1.5, True, id="least rounds and no time left stop"),
            pytest.param(20, 0.5, True, id="most rounds stop"),
            pytest.param(3, 11.0, True, id="ten times over time three rounds have to do"),
            pytest.param(2, 11.0, False, id="ten times over time two rounds do not do"),
        ],
    )
    def test_the_budget_bounds_rounds_and_time(
        self, rounds: int, seconds: float, spent: bool
    ) -> None:
        assert Budget(seconds=1.0, least=5, most=20).spent(rounds, seconds) is spent


class TestInterleaving:
    def test_everyone_has_one_turn_a_round_in_changing_order(self) -> None:
        calls: list[str] = []

        def turn(name: str) -> Callable[[], float]:
            def run() -> float:
                calls.append(name)
                return float(len(calls))

            return run

        names = ["a", "b", "c"]
        budget = Budget(seconds=60, least=30, most=30)
        samples = measure.interleave({n: turn(n) for n in names}, budget, random.Random(0))
        rounds = [calls[i : i + 3] for i in range(0, 90, 3)]
        assert all(sorted(names) == sorted(order) for order in rounds)
        assert len({tuple(order) for order in rounds}) == 6
        for name in names:
            places = [i + 1 for i, call in enumerate(calls) if call == name]
            assert samples[name] == places

    def test_a_cold_turn_walks_the_memory_before_its_one_step(self) -> None:
        walked = torch.zeros(8)
        seen: list[float] = []

        class Step:
            def step(self) -> None:
                seen.append(float(walked.sum()))

        turn = measure.cold_turn(Step(), CPU, walked)
        assert turn() > 0
        turn()
        assert seen == [8.0, 16.0]


class TestContestants:
    def test_something_frozen_brings_all_stock_forms_in_both_scopes(self) -> None:
        keys = [c.key for c in select(any_frozen=True, compiled=False)]
        forms = ("default", "foreach", "fused")
        assert keys == ["ours", *(f"all/{f}" for f in forms), *(f"filter/{f}" for f in forms)]

    def test_nothing_frozen_leaves_one_scope(self) -> None:
        keys = [c.key for c in select(any_frozen=False, compiled=True)]
        assert keys == ["ours", "all/default", "all/foreach", "all/fused", "all/compiled"]

    @pytest.mark.parametrize("contestant", select(any_frozen=True, compiled=False))
    def test_the_scope_decides_who_is_in_the_optimizer(self, contestant: Contestant) -> None:
        frozen, free = nn.Parameter(torch.ones(2), False), nn.Parameter(torch.ones(2))
        alone = nn.Parameter(torch.ones(2), False)
        entry = contestant.build([[frozen, free], [alone]], Hyper())
        owned = [[id(p) for p in group["params"]] for group in entry.optimizer.param_groups]
        everyone = [[id(frozen), id(free)], [id(alone)]]
        assert owned == (everyone if contestant.scope == "all" else [[id(free)]])

    def test_another_package_joins_where_it_can_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With stand-ins for the packages: one steps as stock does, one cannot."""

        class FlashSGD(torch.optim.SGD):
            def __init__(self, *given: Any, quantize: bool, master_weight_bits: None, **kept: Any):
                super().__init__(*given, **(kept | {"fused": False}))

        def refuse(*given: object, **kept: object) -> object:
            raise OSError("built for another torch")

        for name, made in (("flashoptim", {"FlashSGD": FlashSGD}), ("apex", {})):
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**made))
        apex = types.SimpleNamespace(FusedSGD=refuse)
        monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
        others, left_out = other_packages(CPU)
        assert others == ["flashoptim"]
        assert left_out["apex"] == "OSError: built for another torch"
        assert "Adam alone" in left_out["torchao"]
        workload = models.LoadedModel("tiny", CPU).workload("head")
        joined = dataclasses.replace(setting(1), others=others)
        found = suites.run_workload("models", workload, joined, ["warm"])
        assert found.rows[-1].contestant.label == "flashoptim"
        assert found.rows[-1].equality.bit_equal

    def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("flashoptim", "apex", "apex.optimizers"):
            monkeypatch.setitem(sys.modules, name, None)
        others, left_out = other_packages(CPU)
        assert others == []
        assert left_out["flashoptim"] == "not installed (pip install flashoptim)"
        assert "needs a CUDA GPU" in left_out["apex"]


class TestFreezing:
    @pytest.mark.parametrize(
        ("share", "frozen"),
        [
            pytest.param(0, [], id="nothing"),
            pytest.param(49, ["a", "b"], id="the nearest number of parameters above"),
            pytest.param(35, ["a"], id="the nearest number of parameters below"),
            pytest.param(99, ["a", "b", "c"], id="never the last parameter"),
            pytest.param("head", ["a", "b"], id="all but the head"),
        ],
    )
    def test_a_share_freezes_from_the_input_side(
        self, share: float | str, frozen: list[str]
    ) -> None:
        sizes = {"a": 30, "b": 20, "c": 40, "d": 10}
        head = {"c": "head.c", "d": "head.d"} if share == "head" else {}
        named = [(head.get(n, n), nn.Parameter(torch.ones(s))) for n, s in sizes.items()]
        named[0][1].grad = torch.ones(30)
        reached = models.freeze_share(named, share, "head.")
        assert [n for n, p in named if not p.requires_grad] == frozen
        assert reached == pytest.approx(sum(sizes[n] for n in frozen))
        assert all(p.grad is None for _, p in named)

    def test_the_next_share_starts_from_the_first_weights(self) -> None:
        loaded = models.LoadedModel("tiny", CPU)
        first = [p.detach().clone() for p in loaded.workload(50).parameters]
        for p in loaded.model.parameters():
            p.data.mul_(2)
        assert all(same(loaded.workload("head").parameters, first))


class TestEquality:
    @pytest.mark.parametrize(
        ("found", "expected", "result"),
        [
            pytest.param([1.0, 2.0], [1.0, 2.0], Equality(True, 0, 0), id="equal"),
            pytest.param([1.0, 3.0], [1.0, 4.0], Equality(False, 1, 0.25), id="apart"),
            pytest.param(
                [1.0, float("nan")],
                [1.0, 2.0],
                Equality(False, float("inf"), float("inf")),
                id="not a number",
            ),
        ],
    )
    def test_the_difference_is_relative_to_the_largest_value(
        self, found: list[float], expected: list[float], result: Equality
    ) -> None:
        assert measure.compare_tensors([torch.tensor(found)], [torch.tensor(expected)]) == result

    @pytest.mark.parametrize("share", [0, 50, "head"])
    def test_frozen_aware_sgd_has_every_bit_of_stock(self, share: float | str) -> None:
        workload = models.LoadedModel("tiny", CPU).workload(share)
        workload.fill_gradients()
        before = [p.detach().clone() for p in workload.parameters]
        expected = measure.reference_result(workload)
        assert measure.check_equality(OURS, workload, expected).bit_equal
        assert all(same(before, workload.parameters))
        unmoved = same(expected[: len(before)], before)
        assert unmoved == [not p.requires_grad for p in workload.parameters]

    def test_a_contestant_that_decays_otherwise_is_found_out(self) -> None:
        workload = models.LoadedModel("tiny", CPU).workload(0)
        workload.fill_gradients()
        expected = measure.reference_result(workload)
        workload.hyper = Hyper(momentum=0.9, weight_decay=0.5)
        assert not measure.check_equality(OURS, workload, expected).holds


class TestMemory:
    def test_allocations_are_counted_with_their_peak(self) -> None:
        def run() -> None:
            first = torch.empty(1000)
            del first
            second, third = torch.empty(250), torch.empty(250)
            del second, third

        assert measure.allocations(run, CPU) == Allocations(count=3, peak=4000)

    def test_work_in_place_allocates_nothing(self) -> None:
        kept = torch.ones(1000)
        assert measure.allocations(lambda: kept.add_(kept), CPU) == Allocations(0, 0)

    def test_views_of_one_storage_count_once(self) -> None:
        whole = torch.zeros(100)
        assert measure.held_bytes([whole, whole[:50], None, torch.zeros(1)]) == 404

    def test_an_iteration_holds_the_gradients_and_state_of_what_trains(self) -> None:
        workload = models.LoadedModel("tiny", CPU).workload("head")
        entry = OURS.build(workload.groups, workload.hyper)
        measure.iteration_turn(workload, entry.optimizer, entry.stepper, CPU)()
        kept = measure.memory(workload, entry.optimizer, entry.stepper, CPU)
        head = 4 * (32 * 4 + 4)
        weights = 4 * sum(p.numel() for p in workload.parameters)
        assert (kept.gradients, kept.state, kept.step_allocations) == (head, head, 0)
        assert weights + 2 * head < kept.peak < weights + 2 * head + 20_000

    @pytest.mark.parametrize(
        ("momentum", "streams"),
        [pytest.param(0.9, 5, id="momentum"), pytest.param(0, 3, id="plain")],
    )
    def test_the_bytes_of_a_step_are_those_of_the_reference_pass(
        self, momentum: float, streams: int
    ) -> None:
        workload = models.LoadedModel("tiny", CPU).workload(0)
        workload.hyper = Hyper(momentum=momentum)
        elements = sum(p.numel() for p in workload.parameters)
        passes = measure.reference_passes(workload, CPU)
        assert workload.step_bytes == 4 * streams * elements
        assert passes["read-modify-write"].size == workload.step_bytes
        assert passes["copy"].size == 8 * elements


class TestWorkloads:
    def test_every_measure_of_a_network_has_a_sample_for_each_round(self) -> None:
        workload = models.LoadedModel("tiny", CPU).workload(50)
        found = suites.run_workload("models", workload, setting(3), suites.MEASURES)
        assert [row.contestant for row in found.rows] == select(any_frozen=True, compiled=False)
        for row in found.rows:
            assert {name: len(s) for name, s in row.samples.items()} == {
                "warm": 3,
                "cold": 3,
                "iteration": 3,
            }
            assert row.equality.holds
            assert row.memory is not None
        assert [len(times) for _, times in found.passes.values()] == [3, 3]
        assert found.share_of_pass(found.ours) is not None

    def test_the_synthetic_sets_are_what_their_names_say(self) -> None:
        found = {o.key: o for o in suites.run_synthetic(setting(1))}
        counts = {key: (o.tensors, o.frozen_tensors) for key, o in found.items()}
        assert counts == {"tiny161": (161, 0), "frozen998": (1000, 998), "groups50": (500, 0)}
        assert len(found["frozen998"].beside["warm"]) == 1
        assert all(row.equality.holds for o in found.values() for row in o.rows)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("place", "parameters", "gradients", "size"),
        [
            pytest.param("aligned", 0, 0, 50, id="aligned"),
            pytest.param("odd sizes", 0, 0, 51, id="odd sizes"),
            pytest.param("gradients shifted", 0, 1, 50, id="gradients"),
            pytest.param("parameters shifted", 1, 0, 50, id="parameters"),
        ],
    )
    def test_a_flat_set_lies_as_it_says(
        self, dtype: torch.dtype, place: models.Place, parameters: int, gradients: int, size: int
    ) -> None:
        workload = models.flat_set(CPU, 1000, 20, dtype, place)
        workload.fill_gradients()
        assert len(workload.parameters) == 20
        for p in workload.parameters:
            assert p.grad is not None
            assert (p.dtype, p.grad.dtype, p.numel()) == (dtype, dtype, size)
            assert p.data_ptr() % 64 == parameters * p.element_size()
            assert p.grad.data_ptr() % 64 == gradients * p.element_size()
            for tensor in (p.detach(), p.grad):
                twin = measure._twin(tensor)
                assert torch.equal(twin, tensor)
                assert (twin.data_ptr() - tensor.data_ptr()) % 64 == 0

    def test_a_stock_form_this_torch_lacks_is_named_and_left_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build = Contestant.build

        def refuse(self: Contestant, groups: object, hyper: Hyper) -> object:
            if self.kind == "fused":
                raise RuntimeError("no fused kernel here\nand more")
            return build(self, groups, hyper)  # type: ignore[arg-type]

        monkeypatch.setattr(Contestant, "build", refuse)
        workload = models.LoadedModel("tiny", CPU).workload(0)
        found = suites.run_workload("models", workload, setting(1), ["warm"])
        assert found.unavailable == {"all/fused": "no fused kernel here"}
        assert [row.contestant.key for row in found.rows] == ["ours", "all/default", "all/foreach"]
        assert "all/fused: not run: no fused kernel here" in outcome_table(found)


WIDEST = {
    contestant.key: {
        measure: [time * 12.345**place for time in (888.8e3, 999.4e3, 1.111e6)]
        for measure in suites.MEASURES
    }
    for place, contestant in enumerate(select(any_frozen=True, compiled=True))
}
"""Medians of three digits and ratios from 12.3x on, all with a spread."""


class TestTables:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("suite", ["models", "synthetic"])
    def test_a_table_fits_80_columns(self, suite: str, device: str) -> None:
        worst = Equality(False, 1.0, 0.5, compile_seconds=123.4)
        without = {"cold" if suite == "models" else "iteration", device == "cpu" and "device"}
        samples = {
            key: {m: s for m, s in taken.items() if m not in without}
            for key, taken in WIDEST.items()
        }
        text = outcome_table(outcome(samples, suite=suite, device=device, equality=worst))
        assert max(map(len, text.splitlines())) <= 80
        assert len(re.findall(" NO$", text, re.MULTILINE)) == len(WIDEST)
        assert text.count("NOT stock's result: 5e-01") == len(WIDEST)

    def test_the_digits_table_fits_80_columns(self) -> None:
        rows = [
            DigitsRow(
                c, [12.3456, 0.1234], [1e9, 2e9, 3e9], 99.9, 0.5, Memory(10**9, 10**9, 10**9, 0)
            )
            for c in select(any_frozen=True, compiled=True)
        ]
        text = digits_table(DigitsOutcome("cuda", 99.9, 10.0, 645, 150_661, rows))
        assert max(map(len, text.splitlines())) <= 80

    def test_the_targets_table_fits_80_columns(self) -> None:
        times = measured(1.11e6, all_default=555.5e6, all_fused=555.5e6, filter_fused=555.5e6)
        found = outcome({key: s | {"cold": s["warm"]} for key, s in times.items()})
        lines = [target.line({"frozen998": found}) for target in targets.TARGETS]
        lines += targets.memory_lines("tiny", setting())
        assert any(line.status == "missed" for line in lines)
        assert max(map(len, targets_table(lines, "to reach").splitlines())) <= 80

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_legend_and_verdict_fit_80_columns(self, device: str) -> None:
        outcomes = [
            outcome(WIDEST, device=device),
            outcome(WIDEST, device=device, suite="synthetic"),
        ]
        text = legend(device, outcomes, trained=True) + verdict(outcomes, None, [])
        assert max(map(len, text.splitlines())) <= 80

    def test_a_column_without_a_value_is_left_out(self) -> None:
        samples = {k: {m: s for m, s in v.items() if m != "device"} for k, v in WIDEST.items()}
        assert "device" in outcome_table(outcome(WIDEST))
        text = outcome_table(outcome(samples))
        assert "device" not in text
        assert "-" not in text.partition("FrozenAwareSGD")[2].split()

    def test_memory_is_said_once_where_all_need_the_same(self) -> None:
        found = outcome(WIDEST)
        assert "memory in MB: peak 446; gradients 102; state 102" in outcome_table(found)
        found.rows[1].memory = dataclasses.replace(HELD, peak=548_000_000)
        text = " ".join(outcome_table(found).split())
        assert "peak 446 (FrozenAwareSGD, all foreach" in text
        assert "548 (all default); gradients 102; state 102" in text

    @pytest.mark.parametrize(
        ("nanoseconds", "text"),
        [
            (7, "7 ns"),
            (8_612, "8.61 us"),
            (1_320_000, "1.32 ms"),
            (999.7e3, "1000 us"),
            (2e9, "2 s"),
        ],
    )
    def test_durations_have_three_digits(self, nanoseconds: float, text: str) -> None:
        assert duration(nanoseconds) == text

    @pytest.mark.parametrize(
        ("value", "text"), [(0.904, "0.90"), (12.345, "12.3"), (123.4, "123"), (53321.0, ">999")]
    )
    def test_ratios_have_three_digits(self, value: float, text: str) -> None:
        assert multiple(value) == text


def measured(ours: float, **stock: float) -> dict[str, dict[str, list[float]]]:
    """Two rounds of warm steps: ours, and stock as ``all_fused=...``."""
    times = {"ours": ours} | {name.replace("_", "/"): time for name, time in stock.items()}
    return {key: {"warm": [time, time]} for key, time in times.items()}


class TestVerdict:
    def test_the_fastest_of_the_others_is_the_one_to_beat(self) -> None:
        found = outcome(measured(10, all_default=40, all_fused=20, filter_fused=15))
        best = fastest_other(found, "warm")
        assert best is not None
        assert (best[0].contestant.key, best[1].median) == ("filter/fused", 1.5)

    @pytest.mark.parametrize(
        ("fused", "words"),
        [
            pytest.param(10.2, "No gain over the fastest other in step()", id="no gain"),
            pytest.param(8.0, "SLOWER than the fastest other in step()", id="slower"),
        ],
    )
    def test_it_says_where_there_is_no_gain(self, fused: float, words: str) -> None:
        found = outcome(measured(10, all_default=40, filter_fused=fused))
        assert words in " ".join(verdict([found], None, []).split())

    def test_every_workload_counts(self) -> None:
        gains = outcome(measured(10, all_default=40))
        slower = outcome(measured(10, all_fused=3.3), suite="synthetic", title="many tiny ones")
        digits = DigitsOutcome(
            "cpu",
            99.0,
            10.0,
            645,
            150_661,
            [DigitsRow(OURS, [1.0], [10.0]), DigitsRow(REFERENCE, [1.0], [5.0])],
        )
        text = " ".join(verdict([gains, slower], digits, []).split())
        assert (
            "SLOWER than the fastest other in step() on the host: many tiny ones (0.33x)." in text
        )
        assert "in a whole iteration: Digits, all but the head frozen (0.50x)." in text

    def test_slower_is_only_what_stays_slower(self) -> None:
        samples = {"ours": [10.0, 10.0, 10.0], "all/fused": [8.0, 9.0, 30.0]}
        found = outcome({key: {"warm": times} for key, times in samples.items()})
        text = verdict([found], None, [])
        assert "SLOWER" not in text
        assert "No gain" in text

    def test_a_gain_is_not_called_none(self) -> None:
        found = outcome(measured(10, all_default=40, filter_fused=20))
        text = " ".join(verdict([found], None, []).split())
        assert "No gain" not in text
        assert "stock's default takes 4.00x" in text
        assert "the fastest other 2.00x" in text

    def test_a_wrong_result_comes_first(self) -> None:
        wrong = outcome(measured(10, all_fused=20), equality=Equality(False, 1, 0.5))
        assert len(unequal([wrong], None)) == 2
        assert verdict([wrong], None, []).splitlines()[1].startswith("- WRONG RESULT")

    def test_another_loss_curve_is_a_wrong_result(self) -> None:
        rows = [DigitsRow(OURS, [1.0], [1.0], 90.0, 0.5)]
        digits = DigitsOutcome("cpu", 99.0, 10.0, 645, 150_661, rows)
        assert unequal([], digits) == ["FrozenAwareSGD on the digits"]


class TestMachine:
    def test_a_process_is_granted_a_share_of_its_time(self) -> None:
        assert 0 < machine.granted_share(0.05) <= 1

    def test_company_is_warned_of_before_all_else(self) -> None:
        warning = machine.company([1.0, 0.4])
        text = verdict([outcome(measured(10, all_default=40))], None, [], warnings=[None, warning])
        assert text.splitlines()[1].startswith("- This machine is busy: at times")
        assert "40 %" in text

    def test_a_quiet_machine_is_not_warned_of(self) -> None:
        assert machine.company([1.0, 0.9]) is None

    def test_the_description_names_machine_and_versions(self) -> None:
        described = machine.describe(CPU)
        assert described["cores"] >= 1
        assert described["versions"]["torch"] == torch.__version__
        assert torch.__version__ in machine.headline(described)


class TestTargets:
    @pytest.mark.parametrize(
        ("fused", "status"),
        [pytest.param(120, "reached", id="at"), pytest.param(119, "missed", id="below")],
    )
    def test_a_ratio_is_held_against_its_target(self, fused: float, status: str) -> None:
        target = targets.Faster("case", "made-up", "all/fused", 12)
        line = target.line({"made-up": outcome(measured(10, all_fused=fused))})
        assert line.status == status

    def test_the_cost_of_a_frozen_parameter_is_what_they_add(self) -> None:
        found = outcome(measured(1100 + 159 * 4.5))
        line = targets.FrozenCost("case", "made-up", 5).line({"made-up": found})
        assert (line.figure, line.status) == ("4.50 ns", "reached")

    @pytest.mark.parametrize(
        ("ours", "figure", "status"),
        [
            pytest.param(1000, "100 %", "reached", id="as fast as the pass"),
            pytest.param(1250, "80 %", "missed", id="slower than the pass"),
        ],
    )
    def test_the_bandwidth_is_held_against_the_pass(
        self, ours: float, figure: str, status: str
    ) -> None:
        line = targets.Bandwidth("case", "made-up", 90).line({"made-up": outcome(measured(ours))})
        assert line.figure.startswith(figure)
        assert line.status == status

    def test_a_case_without_its_model_is_not_measured(self) -> None:
        every = (*targets.TARGETS, *targets.CUDA_TARGETS)
        assert {t.line({}).status for t in every} == {"not measured"}

    @pytest.mark.parametrize(
        ("ours", "status"),
        [pytest.param(6000, "reached", id="at"), pytest.param(6001, "missed", id="above")],
    )
    def test_host_time_is_held_against_microseconds(self, ours: float, status: str) -> None:
        line = targets.HostTime("case", "made-up", 6).line({"made-up": outcome(measured(ours))})
        assert line.status == status

    @pytest.mark.parametrize(
        ("beside", "figure", "status"),
        [
            pytest.param(100, "1.00x", "reached", id="the same"),
            pytest.param(80, "1.25x", "missed", id="slower than the like"),
        ],
    )
    def test_a_workload_is_held_against_the_one_beside(
        self, beside: float, figure: str, status: str
    ) -> None:
        found = outcome(measured(1) | {"ours": {"warm": [1.0], "device": [100.0]}})
        found.beside["device"] = [beside]
        line = targets.AsFast("case", "made-up", 1.05).line({"made-up": found})
        assert line.figure.startswith(figure)
        assert line.status == status

    def test_an_iteration_is_told_against_who_comes_closest(self) -> None:
        samples = {
            "ours": {"warm": [1.0], "iteration": [2e6]},
            "all/default": {"warm": [1.0], "iteration": [5e6]},
            "filter/fused": {"warm": [1.0], "iteration": [3e6]},
        }
        line = targets.Told("case", "made-up").line({"made-up": outcome(samples)})
        assert line.figure.startswith("2 ms; filter/fused: 1.50x")
        assert line.status == "no target"

    def test_every_case_of_the_gpus_table_is_measured(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tried on the CPU, on small sets; the networks are stood in for by their keys."""

        def stand_in(
            keys: list[str], shares: list[float | str], *rest: object
        ) -> Iterator[Outcome]:
            for key in keys:
                for share in shares:
                    name = share if share == "head" else f"{share:g}"
                    yield dataclasses.replace(outcome(measured(1)), key=f"{key}/{name}")

        monkeypatch.setattr(targets, "run_models", stand_in)
        told: list[str] = []
        found = {
            o.key: o
            for o in targets.cuda_outcomes(
                dataclasses.replace(setting(1), progress=told.append), scale=2e-4
            )
        }
        assert {target.workload for target in targets.CUDA_TARGETS} == set(found)
        flat = {key: o for key, o in found.items() if "/" not in key or key.startswith("flat")}
        # The GPU's device has one line more for launches, one for memory, and the networks'.
        assert targets.parts([], torch.device("cuda")) == len(told) + 1 == 2 * len(flat) + 1
        for key, of in flat.items():
            # torch 2.13's is wrong: https://github.com/pytorch/pytorch/issues/191763
            judged = [row for row in of.rows if "bf16" not in key or row.contestant.kind != "fused"]
            assert all(row.equality.holds for row in judged), key
            aligned = key.endswith("aligned") or key == "groups161"
            assert bool(of.beside) != aligned, key

    def test_a_step_allocates_nothing_and_leaves_no_frozen_gradients(self) -> None:
        lines = targets.memory_lines("tiny", setting())
        assert [line.status for line in lines] == ["reached", "reached"]
        assert lines[0].figure == "0"
        assert lines[1].figure.startswith("0 B (before: ")


class TestLoad:
    def test_the_busy_process_computes_and_is_ended(self) -> None:
        with pytest.raises(KeyError), load.busy_core() as process:  # noqa: PT012
            assert process.poll() is None
            raise KeyError
        assert process.returncode == -signal.SIGKILL

    def test_the_busy_process_ends_with_a_killed_parent(self) -> None:
        code = (
            "import load, os\n"
            "with load.busy_core() as process:\n"
            "    print(process.pid, flush=True)\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # Returns when the busy process, too, has let go of stdout.
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            timeout=300,
            check=False,
        )
        assert ended.returncode == -signal.SIGKILL
        assert int(ended.stdout) > 0

    @pytest.mark.parametrize(
        ("slow", "fused", "statuses"),
        [
            pytest.param([20.0, 20.0], 20.0, ["reached", "reached"], id="at both bounds"),
            pytest.param([20.0, 21.0], 22.0, ["missed", "reached"], id="the 90th percentile"),
            pytest.param([20.0, 20.0], 19.0, ["reached", "missed"], id="one run of two"),
        ],
    )
    def test_figures_under_load_are_held_against_their_targets(
        self, slow: list[float], fused: float, statuses: list[str]
    ) -> None:
        runs: list[load.Samples] = [
            {"ours with 1": [10.0], "ours with 2": [time], "all/fused with 2": [stock]}
            for time, stock in zip(slow, (30.0, fused), strict=True)
        ]
        found = load.LoadOutcome("made-up", "busy", 1, 1, 2, runs)
        lines = load.load_targets([found])
        assert [line.status for line in lines] == statuses

    def test_the_suite_steps_everyone_beside_an_idle_and_a_busy_core(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(load, "QUICK_RUNS", {"idle": 1, "busy": 1})
        arguments = ["--suite", "load", "--models", "tiny", "--quick", "--steps", "1"]
        assert compare.main([*arguments, "--threads", "2"]) == 0
        printed = capsys.readouterr().out
        assert printed.count("\nFrozenAwareSGD  ") == 2 * 2
        assert printed.count("\nall fused ") == 2 * 2
        assert len(re.findall(r"^three linear layers, \w+: ", printed, re.MULTILINE)) == 4


class TestCommand:
    ARGUMENTS = ("--device", "cpu", "--suite", "models", "--models", "tiny", "--steps", "2")
    NAME = machine.slug(machine.describe(CPU))

    def test_it_measures_and_ends_with_a_verdict(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert compare.main([*self.ARGUMENTS, "--frozen", "0,head"]) == 0
        printed = capsys.readouterr()
        assert printed.out.count("FrozenAwareSGD  ") == 2
        assert "\nVerdict\n" in printed.out
        assert max(map(len, printed.out.splitlines())) <= 80
        assert printed.err == ""
        assert "This takes about " in printed.out

    def test_the_files_hold_samples_machine_and_picture(self, tmp_path: Path) -> None:
        data, picture = tmp_path / "run.json", tmp_path / "run.png"
        options = ["--frozen", "50", "--json", str(data), "--plot", str(picture)]
        assert compare.main([*self.ARGUMENTS, *options]) == 0
        found = json.loads(data.read_text())
        assert found["machine"]["versions"]["torch"] == torch.__version__
        assert found["machine"]["torch_freeze"]["torch"]
        (only,) = found["outcomes"]
        assert {len(row["samples"]["warm"]) for row in only["rows"]} == {2}
        header = picture.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", header[16:])
        assert width > 600
        assert height > 200

    @pytest.mark.parametrize(
        ("options", "folder", "time"),
        [
            pytest.param([], "compare-results", r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_", id="default"),
            pytest.param(["--results", "a/new one"], "a/new one", "", id="a folder"),
        ],
    )
    def test_everything_is_saved_and_it_says_where(
        self,
        options: list[str],
        folder: str,
        time: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
        assert compare.main([*self.ARGUMENTS[:2], "--suite", "digits", *options]) == 0
        saved = sorted((tmp_path / folder).iterdir())
        assert [f.suffix for f in saved] == [".json", ".md", ".png"]
        assert all(re.fullmatch(f"{time}{self.NAME}", f.stem) for f in saved)
        assert all(f.stat().st_size > 1000 for f in saved)
        printed = capsys.readouterr().out.splitlines()
        assert printed[-3:] == [f"saved {folder}/{f.name}" for f in saved]

    def test_the_bar_estimates_what_is_left(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert compare.main([*self.ARGUMENTS, "--frozen", "0,head"]) == 0
        assert re.search(r"\d\d:\d\d, about \d\d:\d\d left", capsys.readouterr().err)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
    def test_what_was_measured_is_saved_when_a_run_ends_early(
        self,
        error: BaseException,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def cut_short(*given: object) -> Iterator[Outcome]:
            yield outcome(measured(10, all_default=40))
            raise error

        monkeypatch.setattr(compare, "run_models", cut_short)
        arguments = [*self.ARGUMENTS, "--results", "results"]
        if isinstance(error, KeyboardInterrupt):
            assert compare.main(arguments) == 130
        else:
            with pytest.raises(RuntimeError, match="out of memory"):
                compare.main(arguments)
        saved = sorted((tmp_path / "results").iterdir())
        assert [f.suffix for f in saved] == [".json", ".md", ".png"]
        found = json.loads(saved[0].read_text())
        assert len(found["outcomes"]) == 1
        assert found["verdict"][1].startswith("- Ended early by ")
        assert "Traceback" not in capsys.readouterr().err

    def test_a_full_disk_is_found_before_the_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        try:
            with pytest.raises(SystemExit) as ended:
                compare.main(list(self.ARGUMENTS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert re.fullmatch("compare.py: cannot write .*: File too large\n", printed.err)

    def test_a_file_is_written_whole_or_left_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "spare").mkdir()
        (tmp_path / "full").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spare"))
        kept = tmp_path / "full" / "run.json"
        kept.write_text("before")
        real = Path.write_bytes

        def fill(self: Path, data: bytes) -> int:
            if self.parent == kept.parent:
                real(self, data[:3])
                raise OSError(28, "No space left on device")
            return real(self, data)

        monkeypatch.setattr(Path, "write_bytes", fill)
        assert not saving.write(kept, b"after")
        assert kept.read_text() == "before"
        assert [f.name for f in kept.parent.iterdir()] == ["run.json"]
        assert (tmp_path / "spare" / "run.json").read_text() == "after"
        printed = capsys.readouterr()
        assert printed.err == f"cannot write {kept}: No space left on device\n"
        assert printed.out == f"saved {tmp_path / 'spare' / 'run.json'}\n"

    def test_the_markdown_holds_what_is_printed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert compare.main([*self.ARGUMENTS, "--results", str(tmp_path)]) == 0
        name = self.NAME
        assert re.fullmatch("[a-z0-9_]+", name)
        text = (tmp_path / f"{name}.md").read_text()
        assert f"| torch | {torch.__version__} |" in text
        printed = capsys.readouterr().out
        blocks = re.findall(r"^```\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
        assert len(blocks) > 2
        assert all(block in printed for block in blocks)
        assert text.rpartition("## Verdict\n\n")[2].strip() in printed

    def test_a_wrong_result_ends_with_status_1(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = Equality(False, 1.0, 1.0)
        monkeypatch.setattr(suites, "check_equality", lambda *given: wrong)
        assert compare.main([*self.ARGUMENTS, "--frozen", "0"]) == 1

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            pytest.param(
                ["--models", "resnet5"], "unknown model 'resnet5'; known: resnet50", id="model"
            ),
            pytest.param(
                ["--suite", "speed"], "unknown suite 'speed'; known: synthetic", id="suite"
            ),
            pytest.param(["--frozen", "100"], "'100' is no share to freeze", id="share"),
            pytest.param(["--frozen", "most"], "'most' is no share to freeze", id="share in words"),
            pytest.param(["--threads", "0"], "'0' is not a whole number above 0", id="threads"),
            pytest.param(["--seconds", "nan"], "'nan' is not a number above 0", id="seconds"),
            pytest.param(["--plot", "x.jpgg"], "cannot draw 'x.jpgg'; known endings", id="ending"),
            pytest.param(
                ["--suite", "load", "--plot", "x.png"], "the load suite draws no", id="no picture"
            ),
            pytest.param(
                ["--json", "/dev/null/x.json"], "cannot write /dev/null/x.json: ", id="no folder"
            ),
            pytest.param(["--markdown", "."], "cannot write .: it is a folder", id="a folder"),
        ],
    )
    def test_what_cannot_be_done_is_said_in_one_line(
        self, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            compare.main(arguments)
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert words in printed.err
        assert len(printed.err.splitlines()) == 1

    def test_missing_packages_are_said_together_and_before_anything_is_built(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert check.missing() is None
        for name in ("tabulate", "tqdm"):
            monkeypatch.setitem(sys.modules, name, None)
        said = "compare.py needs tabulate, tqdm: pip install tabulate tqdm"
        assert check.missing() == said
        isolated = [sys.executable, "-S", "-E", "-B", check.__file__]
        ended = subprocess.run(isolated, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("compare.py needs torch, tabulate, tqdm, matplotlib: pip")

    def test_a_missing_gpu_is_said_in_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit) as ended:
            compare.main(["--device", "cuda"])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "sees no CUDA GPU; use --device cpu or auto" in line

    def test_a_named_model_without_its_package_names_the_command(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(SystemExit) as ended:
            compare.main(["--device", "cpu", "--suite", "models", "--models", "bert_base"])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "bert_base needs transformers: pip install transformers" in line

    def test_a_model_not_asked_for_is_skipped_with_a_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
        assert compare.main(["--device", "cpu", "--suite", "models", "--steps", "1"]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(":")[0] for line in lines] == [
            f"skipped {name}" for name in compare.USUAL.models
        ]

    def test_quick_and_full_change_the_extent_and_options_win(self) -> None:
        parse = compare.make_parser().parse_args
        assert compare.plan(parse(["--quick"]))[1:3] == (list(compare.QUICK.models), [0.0, "head"])
        suites_, models_, shares, budget = compare.plan(
            parse(["--suite", "all", "--full", "--models", "tiny", "--seconds", "9"])
        )
        assert suites_ == list(compare.SUITES)
        assert models_ == ["tiny"]
        assert shares == [0.0, 50.0, 90.0, "head"]
        assert budget.seconds == 9


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "mobilenet_v3_small", "resnet18_batch_8"])
def test_the_head_of_a_network_is_its_last_layer(name: str) -> None:
    spec = models.MODELS[name]
    with torch.device("meta"):
        named = list(spec.build().named_parameters())
    head = [n for n, _ in named if n.startswith(spec.head)]
    assert head == [n for n, _ in named[-2:]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_has_time_of_its_own_and_the_same_results() -> None:
    device = torch.device("cuda")
    workload = models.LoadedModel("tiny", device).workload(50)
    found = suites.run_workload("models", workload, setting(3, device), suites.MEASURES)
    assert all(row.equality.holds for row in found.rows)
    assert {len(row.samples["device"]) for row in found.rows} == {3}
    assert found.share_of_pass(found.ours) is not None
    assert found.ours.memory is not None
    assert found.ours.memory.step_allocations == 0
    assert targets.launch_line(setting(1, device)).status == "reached"


def test_the_reference_is_stock_without_foreach() -> None:
    entry = REFERENCE.build([[nn.Parameter(torch.ones(1))]], Hyper())
    assert type(entry.optimizer) is torch.optim.SGD
    assert entry.optimizer.param_groups[0]["foreach"] is False
