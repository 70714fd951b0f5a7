"""The suite `rows`: a few rows of a table train, as those of new tokens; the rest is frozen."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_freeze import freeze, freeze_except

from ..checks import MissingPackageError, NotEnoughMemoryError, require, usable
from ..contestants import Trainer
from ..machine import available_bytes
from ..memory import held_bytes, mark, record, trim
from ..records import OURS, Measured
from ..tables import NOTHING, Reached, judge, megabytes, times
from ..timing import Budget, Turn, interleave, timed
from .base import Setting, Suite
from .epochs import difference

FROZEN, PEFT, MASKED, RESTORED = "frozen", "PEFT", "masked", "restored"
TOGETHER = f"{OURS}/together"
HYPER: Mapping[str, Mapping[str, float]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"lr": 0.1, "weight_decay": 0.1},
}
"""A decay that moves bfloat16, so that a row which is not frozen shows it."""
STEPS = 3
"""How many are compared, on a batch each."""
TOLERANCES = {torch.bfloat16: 0.02, torch.float32: 1e-3}
"""Relative, of rows after these steps, whose gradients may be summed in another order."""
LIVE_IDS = 64
"""One id in so many is that of a live row."""
TABLES_AT_ONCE = 8
"""Copies of the table, gradients, moments and temporaries that are alive together, and some."""


@dataclass(frozen=True)
class Size:
    """The table's rows and width, and how many ids a batch has."""

    rows: int
    width: int
    ids: int


@dataclass(frozen=True)
class Case:
    """A table, and which of its rows train."""

    key: str
    title: str
    full: Size
    quick: Size
    dtype: torch.dtype
    live: int
    ways: tuple[str, ...]
    tied: bool = False
    scattered: bool = False

    def size(self, setting: Setting) -> Size:
        """The size in this run."""
        return self.quick if setting.quick else self.full

    def table_bytes(self, setting: Setting) -> int:
        """The size of the table in this run."""
        size = self.size(setting)
        return size.rows * size.width * self.dtype.itemsize

    def rows(self, size: Size, *, scattered: bool) -> Tensor:
        """The live rows: as far apart as they can be, or the last ones."""
        if scattered:
            return torch.arange(self.live) * (size.rows // self.live)
        return torch.arange(size.rows - self.live, size.rows)


_EVERYONE = (FROZEN, OURS, PEFT, MASKED, RESTORED)
_LARGE, _SMALL = Size(128_256, 4096, 8192), Size(2000, 64, 512)
_GPT2 = Size(32_000, 512, 256)
CASES = (
    Case("lookup", "Embedding, 2 rows live", _LARGE, _SMALL, torch.bfloat16, 2, _EVERYONE),
    Case(
        "scattered",
        "Embedding, 64 scattered rows live",
        _LARGE,
        _SMALL,
        torch.bfloat16,
        64,
        (FROZEN, OURS, TOGETHER, PEFT),
        scattered=True,
    ),
    Case(
        "tied",
        "Embedding and tied head, 2 rows live",
        _GPT2,
        Size(500, 32, 64),
        torch.float32,
        2,
        _EVERYONE,
        tied=True,
    ),
)


class Lookup(nn.Module):
    """A table that is looked up."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of the ids."""
        rows: Tensor = self.embed(ids)
        return rows


class Tied(Lookup):
    """A language model without anything between embedding and head, which share their table."""

    # What PEFT asks a model for.
    config: Mapping[str, Any] = {"tie_word_embeddings": True, "model_type": "custom"}
    _tied_weights_keys: Mapping[str, str] = {"head.weight": "embed.weight"}

    def __init__(self, table: Tensor) -> None:
        super().__init__(table)
        self.head = nn.Linear(table.shape[1], table.shape[0], bias=False, device="meta")
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        """The layer that the head is tied to."""
        embed: nn.Module = self.embed
        return embed

    def forward(self, ids: Tensor) -> Tensor:
        """The scores of all tokens; backward reaches the head's input whatever is frozen."""
        hidden = super().forward(ids)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()
        scores: Tensor = self.head(hidden)
        return scores


class Way:
    """A way to train some rows of a model's table, here by `freeze_except(rows=...)`."""

    def __init__(self, model: Lookup, live: Tensor, make: Callable[..., Any]) -> None:
        """``make`` makes the optimizer."""
        self.model, self.live = model, live.to(model.embed.weight.device)
        self.call: Callable[[Tensor], Tensor] = model
        trained = self.prepare()
        self.trained = [] if trained is None else [trained]
        self.trainer = Trainer(make(self.trained)) if self.trained else None

    def prepare(self) -> nn.Parameter | None:
        """Freeze, and return the parameter that trains."""
        freeze_except(self.model, "embed", rows=self.live)
        return next(p for p in self.model.parameters() if p.requires_grad)

    def backward(self, ids: Tensor, given: Tensor) -> None:
        """Forward and backward from a given gradient of the output."""
        out = self.call(ids)
        if out.requires_grad:
            out.backward(given)

    def step(self) -> None:
        """The update of what trains."""
        if self.trainer is not None:
            self.trainer.step()

    def zero_grad(self) -> None:
        """Release the gradients."""
        if self.trainer is not None:
            self.trainer.zero_grad()

    def iterate(self, ids: Tensor, given: Tensor) -> None:
        """A whole iteration."""
        self.backward(ids, given)
        self.step()
        self.zero_grad()

    def values(self) -> Tensor:
        """The live rows."""
        (trained,) = self.trained
        return trained if len(trained) == len(self.live) else trained[self.live]

    def held(self) -> int:
        """Bytes of the gradients and of the optimizer's state."""
        state = [] if self.trainer is None else self.trainer.state()
        return held_bytes([*(p.grad for p in self.trained), *state])


class Frozen(Way):
    """Nothing trains: the least that an iteration can take."""

    def prepare(self) -> None:
        """Freeze everything."""
        freeze(self.model)


class TrainableTokens(Way):
    """PEFT's trainable tokens."""

    def prepare(self) -> nn.Parameter:
        """Let PEFT wrap the layers."""
        peft = require("peft", "peft")
        rows = self.live.tolist()
        config = peft.TrainableTokensConfig(token_indices=rows, target_modules=["embed"])
        self.call = peft.get_peft_model(self.model, config, autocast_adapter_dtype=False)
        (trained,) = (p for p in self.model.parameters() if p.requires_grad)
        return trained


class Masked(Way):
    """The whole table trains, and the gradients of frozen rows are set to zero."""

    def prepare(self) -> nn.Parameter:
        """Nothing is frozen."""
        weight: nn.Parameter = self.model.embed.weight
        return weight

    def frozen_rows(self, tensor: Tensor) -> Tensor:
        """All but the live rows, which are the last."""
        return tensor[: len(tensor) - len(self.live)]

    def step(self) -> None:
        """The update of everything, from masked gradients."""
        grad = self.model.embed.weight.grad
        assert grad is not None
        self.frozen_rows(grad).zero_()
        super().step()


class Restored(Masked):
    """The whole table trains, and the frozen rows are copied back after each step."""

    def prepare(self) -> nn.Parameter:
        """Keep what the frozen rows were."""
        self.kept = self.frozen_rows(self.model.embed.weight.detach()).clone()
        return super().prepare()

    def step(self) -> None:
        """The update of everything, and what undoes it."""
        Way.step(self)
        self.frozen_rows(self.model.embed.weight.detach()).copy_(self.kept)


class Reference(Way):
    """What is to be computed, in the terms of plain torch."""

    def prepare(self) -> nn.Parameter:
        """The live rows alone, which a copy of the table gets in each forward pass."""
        table = self.model.embed.weight.requires_grad_(False)
        rows = nn.Parameter(table[self.live])

        def call(ids: Tensor) -> Tensor:
            new = {"embed.weight": table.index_copy(0, self.live, rows)}
            out: Tensor = functional_call(self.model, new, ids)
            return out

        self.call = call
        return rows


WAYS: dict[str, type[Way]] = {
    FROZEN: Frozen,
    OURS: Way,
    TOGETHER: Way,
    PEFT: TrainableTokens,
    MASKED: Masked,
    RESTORED: Restored,
}
ALONE = (FROZEN, OURS, TOGETHER)
"""Those that are so close that they are timed in turns without a slower one."""


@lru_cache(maxsize=1)
def table_of(size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random table."""
    torch.manual_seed(0)
    return torch.empty(size.rows, size.width, dtype=dtype, device=device).normal_()


def batches(size: Size, live: Tensor, device: torch.device) -> list[Tensor]:
    """Ids of any rows, some of which are live."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(size.rows, (size.ids,), generator=generator)
        chosen = torch.randint(len(live), (size.ids // LIVE_IDS,), generator=generator)
        ids[::LIVE_IDS] = live[chosen]
        found.append(ids.to(device))
    return found


def changed_rows(now: Tensor, before: Tensor, live: Tensor) -> int:
    """How many rows have other bits than before, not counting the live ones."""
    bits = torch.int16 if now.element_size() == 2 else torch.int32
    parts = zip(now.view(bits).split(8192), before.view(bits).split(8192), strict=True)
    other = torch.cat([(a != b).any(1) for a, b in parts])
    other[live.to(other.device)] = False
    return int(other.sum())


@dataclass(frozen=True)
class Work:
    """What everyone of a case is given."""

    case: Case
    setting: Setting

    @property
    def table(self) -> Tensor:
        """The table, which nobody may change in the rows that are frozen."""
        return table_of(self.case.size(self.setting), self.case.dtype, self.setting.device)

    def model(self, table: Tensor) -> Lookup:
        """A model that has this table, without a copy of it."""
        return Tied(table) if self.case.tied else Lookup(table)

    def live(self, key: str) -> Tensor:
        """The rows that train."""
        scattered = self.case.scattered and key != TOGETHER
        return self.case.rows(self.case.size(self.setting), scattered=scattered)

    def ids(self, key: str) -> list[Tensor]:
        """The batches."""
        return batches(self.case.size(self.setting), self.live(key), self.setting.device)

    def given(self) -> Tensor:
        """The gradient of the output."""
        size, table = self.case.size(self.setting), self.table
        torch.manual_seed(2)
        shape = size.ids, size.rows if self.case.tied else size.width
        return torch.randn(shape, dtype=table.dtype, device=table.device).div_(size.ids**0.5)

    def optimizer(self) -> Callable[..., Any]:
        """What makes the optimizer, the same for everyone."""
        family = self.setting.family
        return partial(family.ours, **HYPER[family.key])

    def expected(self, key: str, given: Tensor) -> tuple[Tensor, Tensor]:
        """The output of the first batch and the live rows after all of them."""
        model, live = self.model(self.table), self.live(key)
        way = Reference(model, live, self.optimizer())
        with torch.no_grad():
            first = way.call(self.ids(key)[0])
        for ids in self.ids(key):
            way.iterate(ids, given)
        return first, way.values().detach()

    def check(self, key: str, given: Tensor) -> tuple[dict[str, float], float]:
        """Train a copy of the model for a few steps.

        Returns:
            The figures: bytes of ``gradients and state``; ``peak``, the most held above the model
            in the last iteration; rows outside of the live ones that have ``changed``. And how
            far output and live rows are from the expected ones.
        """
        figures: dict[str, float] = {}
        first, rows = self.expected(key, given)
        table = self.table.clone()
        model, all_ids = self.model(table), self.ids(key)
        kept: list[Way] = []
        gaps: list[float] = []
        gc.collect()  # a block that is freed in there must have been allocated in there
        trim()

        def run() -> None:
            kept.append(WAYS[key](model, self.live(key), self.optimizer()))
            (way,) = kept
            with torch.no_grad():
                gaps.append(difference(way.call(all_ids[0]), first))
            for number, ids in enumerate(all_ids):
                with mark(f"{number}"):
                    way.backward(ids, given)
                    way.step()
                    figures["held"] = way.held()
                    way.zero_grad()

        figures["peak"] = record(run, self.setting.device).peak(f"{STEPS - 1}")
        (way,) = kept
        figures["changed"] = changed_rows(table, self.table, self.live(key))
        if way.trained:
            gaps.append(difference(way.values().detach(), rows))
        return figures, max(gaps)

    def turn(self, key: str, given: Tensor) -> Turn:
        """An iteration, on one batch after the other; one is run before.

        Who leaves the frozen rows alone shares a table, so that its place in memory is the same.
        """
        shared = key not in (MASKED, RESTORED)
        model = self.model(self.table if shared else self.table.clone())
        way = WAYS[key](model, self.live(key), self.optimizer())
        all_ids = itertools.cycle(self.ids(key))
        way.iterate(next(all_ids), given)

        def turn() -> float:
            ids = next(all_ids)
            return timed(lambda: way.iterate(ids, given), self.setting.device, wait=True)

        return turn


def run(case: Case, setting: Setting) -> Measured:
    """Compare everyone's result with plain torch's, then time iterations in turns."""
    work, size = Work(case, setting), case.size(setting)
    details = (
        f": {size.rows:,} x {size.width:,} in {str(case.dtype).partition('.')[2]} "
        f"({megabytes(case.table_bytes(setting))} MB), {size.ids:,} ids"
    )
    found = Measured("rows", case.key, case.title, details, "rows")
    given = work.given()
    for key in case.ways:
        try:
            figures, gap = work.check(key, given)
        except MissingPackageError as missing:
            found.leave_out(key, missing)
            continue
        finally:
            gc.collect()
        # Masks let frozen rows move, and with them the gradients of a head; all others must not.
        tolerance = float("inf") if key == MASKED else TOLERANCES[case.dtype]
        moved = key != MASKED and figures["changed"] > 0
        found.compare(key, float("inf") if moved else gap, tolerance)
        peak = figures.pop("peak")
        floor = found.one(FROZEN, "peak")
        found.add(key, peak=peak, extra=peak - (peak if floor is None else floor), **figures)
    usual = setting.budget
    budget = Budget(usual.seconds * (1 if setting.quick else 10), usual.least, usual.most)
    fast = {key: work.turn(key, given) for key in found.contestants if key in ALONE}
    slow = [key for key in found.contestants if key not in fast]
    for other in (None, *slow):
        # Only one of those that need the most memory is there at a time.
        turns = fast if other is None else {**fast, other: work.turn(other, given)}
        measure = "alone" if other is None else f"with {other}"
        for who, taken in interleave(turns, budget, setting.rng).items():
            found.add(who, **{measure: taken})
        del turns
        gc.collect()
    return found


def reached(measured: Sequence[Measured]) -> Iterator[Reached]:
    """The lines of the table of targets."""
    for found in measured:
        held, over = found.one(OURS, "held"), found.ratio(OURS, "alone", to=FROZEN)
        slower, beside = found.ratio(PEFT, f"with {PEFT}"), found.ratio(OURS, "alone", to=TOGETHER)
        extra = [found.one(key, "extra") for key in (OURS, PEFT)]
        more = None
        if extra[0] and extra[1]:
            sizes = " of ".join(f"{size / 1e6:.2f}" for size in extra if size)
            more = (extra[0] / extra[1], f"1/{extra[1] / extra[0]:,.0f}: {sizes} MB")
        lookup = found.key != "tied"
        if found.key == "lookup":
            figure = None if held is None else (held, f"{held / 1e3:.0f} kB")
            yield judge(f"{found.title}: gradient and state", figure, "<= 100 kB", 100e3)
        for what, ratio, bound in (
            ("iteration over the frozen table's", over, "<= 1.05x"),
            ("PEFT over ours", slower, ">= 2x"),
            ("scattered over together", beside, "<= 1.1x"),
        ):
            if ratio is not None or what[0] != "s":
                figure = ratio and (ratio.median, times(ratio))
                yield judge(f"{found.title}: {what}", figure, bound if lookup else NOTHING)
        yield judge(f"{found.title}: extra memory, ours of PEFT's", more, "<= 1/100", 0.01)
        changed = found.one(OURS, "changed")
        figure = None if changed is None else (changed, f"{changed:.0f}")
        yield judge(f"{found.title}: frozen rows with other bits", figure, "<= 0")


def judged(setting: Setting, measured: Sequence[Measured]) -> list[Reached]:
    """The same, without a verdict on a GPU that is simulated."""
    lines = reached(measured)
    return [line._replace(status="simulated") if setting.simulated else line for line in lines]


def require_memory_for(key: str, setting: Setting) -> None:
    """Check that memory for a case is there, or raise a NotEnoughMemoryError."""
    (case,) = (case for case in CASES if case.key == key)
    wanted = TABLES_AT_ONCE * case.table_bytes(setting) + 10**8
    found = available_bytes(setting.device)
    if found is not None and found < wanted:
        sizes = f"{wanted / 1e9:.1f} GB of memory, of which {found / 1e9:.1f} GB are available"
        raise NotEnoughMemoryError(f"the case needs {sizes}")


def suite(setting: Setting) -> Suite:
    """Lookups in a large table, and a smaller one that is tied to a head."""
    needs = partial(require_memory_for, setting=setting)
    there = usable([case.key for case in CASES], needs, explicit=False)
    tasks = [(case.title, partial(run, case, setting)) for case in CASES if case.key in there]
    return Suite("rows", list(tasks), partial(judged, setting), "a few rows of a table")
