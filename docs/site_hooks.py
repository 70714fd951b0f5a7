"""What the site does to pages and docstrings before they are rendered."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

_AUDIT = Path(__file__).parents[1] / "src" / "torch_freeze" / "audit.py"
_TITLES = {"before": "Before", "after": "After", "setup": "For all that follows"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Give code blocks their titles, from the words that the tests read, and fill in tables."""
    markdown = markdown.replace("<!-- the kinds of finding -->", _kinds_of_finding())
    return re.sub(
        r"^```python (before|after|setup)$",
        lambda found: f'```python title="{_TITLES[found[1]]}"',
        markdown,
        flags=re.MULTILINE,
    )


def _kinds_of_finding() -> str:
    """A table of FINDING_KINDS, read from the source: nothing need be compiled for the site."""
    (kinds,) = (
        ast.literal_eval(statement.value)
        for statement in ast.parse(_AUDIT.read_text()).body
        if isinstance(statement, ast.AnnAssign)
        and ast.unparse(statement.target) == "FINDING_KINDS"
        and statement.value is not None
    )
    table = ["| kind | level | what it says |", "|---|---|---|"]
    for kind, (levels, said) in kinds.items():
        table.append(f"| `{kind}` | {', '.join(levels)} | {said} |")
    return "\n".join(table)


class Examples(griffe.Extension):
    """Read a docstring's section "Example" as what griffe knows as "Examples"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
