"""torch_freeze: freeze parts of a PyTorch network, at no cost for the frozen ones."""

from torch_freeze._build import BuildInfo, __version__, build_info
from torch_freeze.audit import FINDING_KINDS, Finding, audit
from torch_freeze.features import FeatureCache
from torch_freeze.freezing import freeze, freeze_except, frozen, unfreeze
from torch_freeze.frozen_state import frozen_state_dict, load_frozen_state_dict
from torch_freeze.guard import guard
from torch_freeze.optim import FrozenAwareAdam, FrozenAwareAdamW, FrozenAwareSGD
from torch_freeze.plateau import AdvanceOnPlateau
from torch_freeze.report import FreezeReport, report
from torch_freeze.schedule import FreezeSchedule, freeze_out, gradual_unfreeze, rotate
from torch_freeze.schedule_file import export_schedule, read_schedule

__all__ = [
    "FINDING_KINDS",
    "AdvanceOnPlateau",
    "BuildInfo",
    "FeatureCache",
    "Finding",
    "FreezeReport",
    "FreezeSchedule",
    "FrozenAwareAdam",
    "FrozenAwareAdamW",
    "FrozenAwareSGD",
    "__version__",
    "audit",
    "build_info",
    "export_schedule",
    "freeze",
    "freeze_except",
    "freeze_out",
    "frozen",
    "frozen_state_dict",
    "gradual_unfreeze",
    "guard",
    "load_frozen_state_dict",
    "read_schedule",
    "report",
    "rotate",
    "unfreeze",
]
