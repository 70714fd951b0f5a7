"""Say in one line which packages compare.py lacks; ``make compare`` asks before it compiles."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("torch", "pandas", "tabulate", "tqdm", "matplotlib")
"""Modules without which nothing can be compared or saved; their packages have the same names."""


def missing() -> str | None:
    """What is not installed and the command that installs it; None if all is there."""
    names = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"compare.py needs {', '.join(names)}: pip install {' '.join(names)}" if names else None


if __name__ == "__main__":
    sys.exit(missing())
