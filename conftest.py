"""Leaves the docstrings out of the tests where the package they show is missing, and says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Modules that import an optional package, which pytest would have to import for their docstrings.
_NEEDS = {
    "src/torch_freeze/integrations/lightning.py": ("lightning",),
    "src/torch_freeze/integrations/transformers.py": ("transformers", "accelerate"),
}
_MISSING = {
    path: [name for name in names if importlib.util.find_spec(name) is None]
    for path, names in _NEEDS.items()
}

collect_ignore = [str(Path(__file__).parent / path) for path, names in _MISSING.items() if names]


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [
        f"docstrings of {path} left out: {' and '.join(names)} not installed"
        for path, names in _MISSING.items()
        if names
    ]
