"""Prepares pages and docstrings for the site."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

_ROOT = Path(__file__).parents[1]
_AUDIT = _ROOT / "src" / "torch_freeze" / "audit.py"
_RESULTS = "benchmarks/results"
_TITLES = {"before": "Before", "after": "After", "setup": "For all that follows"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of the benchmarks, which are outside of docs/."""
    from mkdocs.structure.files import File

    for path in sorted((_ROOT / _RESULTS).glob("*.png")):
        files.append(File.generated(config, f"{_RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Insert files and tables, adjust links, and title code blocks by the words tests read."""
    if found := re.match(r"<!-- the file (\w+\.md) -->", markdown):
        markdown = _linked_from_docs((_ROOT / found[1]).read_text())
    # A picture of the benchmarks is copied to the site; other results are named, not linked.
    markdown = markdown.replace(f"](../{_RESULTS}/", f"]({_RESULTS}/")
    markdown = re.sub(
        rf"(?<!!)\[([^]]+)\]\(({_RESULTS}/[^)]+)\)",
        lambda link: f"{link[1]} in `{link[2]}`" if link[1] == "recorded" else f"`{link[2]}`",
        markdown,
    )
    markdown = markdown.replace("<!-- the kinds of finding -->", _kinds_of_finding())
    return re.sub(
        r"^```python (before|after|setup)$",
        lambda found: f'```python title="{_TITLES[found[1]]}"',
        markdown,
        flags=re.MULTILINE,
    )


def _linked_from_docs(markdown: str) -> str:
    """A file of the repository's root, with the links that it needs as a page in docs/."""
    markdown = markdown.replace("](docs/", "](")
    names = "|".join(("README", "CHANGELOG", "CONTRIBUTING"))
    return re.sub(
        rf"\]\(({names})\.md",
        lambda link: f"]({'index' if link[1] == 'README' else link[1].lower()}.md",
        markdown,
    )


def _kinds_of_finding() -> str:
    """A table of FINDING_KINDS, read from the source so that nothing has to be compiled."""
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
