"""The learning-rate schedulers of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import SWALR

Scheduler = Callable[[torch.optim.Optimizer], Any]
STEPS = 12

# Each with arguments under which the rate changes during a run of so many steps.
SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: rates.LambdaLR(
        o, [lambda n, i=i: 0.9**n / (1 + i) for i in range(len(o.param_groups))]
    ),
    "MultiplicativeLR": lambda o: rates.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: rates.StepLR(o, 3),
    "MultiStepLR": lambda o: rates.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: rates.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: rates.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: rates.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: rates.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o: rates.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: rates.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: rates.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: rates.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: rates.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: rates.SequentialLR(
        o, [rates.LinearLR(o, 0.1, total_iters=4), rates.ExponentialLR(o, 0.8)], [4]
    ),
    "ChainedScheduler": lambda o: rates.ChainedScheduler(
        [rates.ConstantLR(o, total_iters=4), rates.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5),
}
