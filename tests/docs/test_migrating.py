"""Run every snippet of docs/migrating.md, each in a fresh namespace after the page's setup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"


def snippets() -> list[tuple[str, int, str]]:
    """Every python block: the section's title and what the block shows, its line, and its code."""
    found = []
    title, kind, code, start = "", None, "", 0
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), 1):
        if kind is not None:
            if line == "```":
                found.append((f"{title}, {kind}" if title else kind, start, code))
                kind = None
            else:
                code += line + "\n"
        elif line.startswith("## "):
            title = line[3:]
        elif line.startswith("```"):
            kind, code, start = line.removeprefix("```python").strip(), "", number
    return found


SNIPPETS = snippets()
SETUP = SNIPPETS[0][2]


@pytest.mark.parametrize(
    ("line", "code"),
    [(line, code) for _, line, code in SNIPPETS[1:]],
    ids=[title for title, _, _ in SNIPPETS[1:]],
)
def test_the_snippet_of(line: int, code: str) -> None:
    namespace: dict[str, Any] = {}
    exec(compile(SETUP, str(PAGE), "exec"), namespace)
    # Blank lines in front make a traceback name the page's own line.
    exec(compile("\n" * line + code, str(PAGE), "exec"), namespace)


def test_every_block_says_what_it_shows_and_sections_show_after() -> None:
    kinds = {title.rpartition(", ")[2] for title, _, _ in SNIPPETS[1:]}
    assert kinds == {"before", "after"}
    assert SNIPPETS[0][0] == "setup"
