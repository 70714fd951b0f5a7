"""What the site does to pages and docstrings before they are rendered."""

from __future__ import annotations

import re
from typing import Any

import griffe

_TITLES = {"before": "Before", "after": "After", "setup": "For all that follows"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn the words that the tests read on a code block's first line into its title."""
    return re.sub(
        r"^```python (before|after|setup)$",
        lambda found: f'```python title="{_TITLES[found[1]]}"',
        markdown,
        flags=re.MULTILINE,
    )


class Examples(griffe.Extension):
    """Read a docstring's section "Example" as what griffe knows as "Examples"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
