"""Numbers, sizes, lists, tables and lines of text as reports and errors show them."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Iterator, Sequence

#: Widest line of a table, and of running text below it.
WIDTH = 120
TEXT_WIDTH = 90


def counted(number: int, noun: str, shown: str = "") -> str:
    """A number with its noun, "1 norm" or "2 norms"; `shown` replaces the number's digits."""
    return f"{shown or number} {noun}{'s' * (number != 1)}"


def count(number: int) -> str:
    """A number in short: "25.6 M"."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 10 * scale or (scale > 10**3 and number >= scale):
            return f"{number / scale:.1f} {unit}"
    return str(number)


def parameters(number: int) -> str:
    """A number of parameters with its noun."""
    return counted(number, "parameter", count(number))


def size(number: int) -> str:
    """A number of bytes in short: "102.2 MB"; "-" for none."""
    if number == 0:
        return "-"
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"


def percent(part: float, whole: float = 1.0) -> str:
    """A share of a whole, with one decimal."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are: "a, b, c and 2 more"."""
    texts = list(names)
    shown = ", ".join(texts[:most])
    return f"{shown} and {len(texts) - most} more" if len(texts) > most else shown


def fit(text: str, width: int = WIDTH) -> str:
    """Text cut to `width` characters, with "..." at its end, if it is longer."""
    return text if len(text) <= width else text[: width - 3] + "..."


def wrap(text: str) -> list[str]:
    """Lines of running text, indented from the second on; a long word is cut at `WIDTH`."""
    lines = textwrap.wrap(
        text, TEXT_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [fit(line) for line in lines]


def table(
    header: list[str], body: list[list[str]], aligned: str, least: dict[int, int]
) -> Iterator[str]:
    """Lines of a table with rules below the header and above the last row.

    Args:
        header: one cell per column.
        body: the rows.
        aligned: "<" or ">" for each column.
        least: columns that are cut when the table is wider than `WIDTH`, in this order, and the
            width that each of them keeps.
    """
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    for column, width in least.items():
        over = sum(widths) + 2 * (len(widths) - 1) - WIDTH
        if over > 0:
            widths[column] = max(width, widths[column] - over)
    rule = "  ".join("-" * width for width in widths)
    for number, line in enumerate((header, *body)):
        if number in (1, len(body)):
            yield rule
        cells = (
            f"{fit(text, width):{side}{width}}"
            for text, width, side in zip(line, widths, aligned, strict=True)
        )
        yield "  ".join(cells).rstrip()


def html_table(header: list[str], body: list[list[str]], aligned: str) -> str:
    """The same table in HTML."""
    rows = [_html_row("th", header, aligned), *(_html_row("td", row, aligned) for row in body)]
    return f"<table>{''.join(rows)}</table>"


def _html_row(tag: str, cells: Sequence[str], aligned: str) -> str:
    made = []
    for text, side in zip(cells, aligned, strict=True):
        pad = "&nbsp;" * (len(text) - len(text.lstrip(" ")))
        align = "left" if side == "<" else "right"
        made.append(f'<{tag} style="text-align:{align}">{pad}{html.escape(text.strip())}</{tag}>')
    return f"<tr>{''.join(made)}</tr>"
