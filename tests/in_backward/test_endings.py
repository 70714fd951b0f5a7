"""Optimizers and interpreters that end while backward runs."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import pytest

from tests.helpers import apart
from tests.helpers import optim_cases as cases
from tests.helpers.hostile_use import (
    BUCKETS,
    loss_of,
    net,
    ordinary,
    train,
)


def _race() -> str:
    def work(i: int, rounds: int) -> None:
        for _ in range(rounds):
            model = net()
            optimizer = optimizers[i] = ordinary(
                model.parameters(), step_in_backward=True, bucket_mb=0
            )
            for p in list(model.parameters())[::3]:
                p.register_post_accumulate_grad_hook(lambda p: None)
            train(model, optimizer, steps=5)
            optimizer.me = optimizer  # a cycle, for the collector

    ordinary(net().parameters())  # torch imports many modules for the first optimizer
    sys.setswitchinterval(1e-5)
    optimizers: list[Any] = [None, None]
    running = [threading.Thread(target=work, args=(i, 8)) for i in range(2)]
    for thread in running:
        thread.start()
    while any(thread.is_alive() for thread in running):
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.close()
        gc.collect()
        time.sleep(1e-3)  # lets the other threads run
    return "over"


def test_optimizers_closed_and_collected_while_others_run_backward() -> None:
    """The mutex and the GIL are taken in every order, and the process neither crashes nor hangs."""
    assert apart.run(_race, seconds=60) == "over"


ENDINGS = {
    "by sys.exit() in a hook": """
model[0].weight.register_post_accumulate_grad_hook(lambda p: sys.exit(0))
backward()
""",
    "between backward and step, with more backwards at exit and after": """
class Last:
    def __del__(self):
        backward()
sys.last = Last()
atexit.register(backward)
backward()
""",
}


@pytest.mark.parametrize("ending", cases.ids({k: (v,) for k, v in ENDINGS.items()}))
def test_the_interpreter_ends_cleanly(ending: str) -> None:
    code = f"""
import atexit, sys
import torch, torch_freeze
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
optimizer = torch_freeze.FrozenAwareSGD(
    model.parameters(), 0.1, 0.9, step_in_backward=True, bucket_mb=0
)
def backward(model=model, x=torch.ones(2, 4)):
    optimizer.step()
    model(x).sum().backward()
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("bucket", cases.ids({k: (v,) for k, v in BUCKETS.items()}))
def test_nothing_outlives_model_and_optimizer(bucket: dict[str, Any]) -> None:
    """Whatever the last iteration did, and whether the model or the optimizer goes first."""
    watched: list[weakref.ref[Any]] = []

    def iteration(how: str) -> None:
        model = net()
        optimizer = ordinary(model.parameters(), step_in_backward=True, **bucket)
        model[2].weight.register_post_accumulate_grad_hook(lambda p: None)
        watched.extend(weakref.ref(x) for x in (optimizer, *model.parameters()))
        loss_of(model).backward()
        if how == "finished":
            optimizer.step()
        elif how == "closed in backward":
            optimizer.step()
            model[4].weight.register_hook(lambda g: optimizer.close())
            loss_of(model).backward()
        elif how == "model first":
            del model
        elif how == "optimizer first":
            del optimizer

    for how in ("left", "finished", "closed in backward", "model first", "optimizer first"):
        iteration(how)
        gc.collect()
        assert [ref() for ref in watched] == [None] * len(watched), how
