"""Numbers, sizes and lines as reports and errors show them."""

from __future__ import annotations

import textwrap


def counted(number: int, noun: str, shown: str = "") -> str:
    """A number with its noun, "1 norm" or "2 norms"; `shown` is the number as it is to be read."""
    return f"{shown or number} {noun}{'s' * (number != 1)}"


def count(number: int) -> str:
    """A number as it is read: 25.6 M."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 10 * scale or (scale > 10**3 and number >= scale):
            return f"{number / scale:.1f} {unit}"
    return str(number)


def parameters(number: int) -> str:
    """A number of parameters with its noun."""
    return counted(number, "parameter", count(number))


def size(number: int) -> str:
    """Bytes as they are read: 102.2 MB; "-" for none."""
    if number == 0:
        return "-"
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"


def percent(part: float, whole: float) -> str:
    """A share of a whole, with one decimal."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def fit(text: str, width: int) -> str:
    """Text of at most `width` characters, cut where it is longer."""
    return text if len(text) <= width else text[: width - 3] + "..."


def wrap(text: str, width: int, cut: int) -> list[str]:
    """Lines of about `width` characters, those below indented; what is longer than `cut` is cut."""
    lines = textwrap.wrap(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [fit(line, cut) for line in lines]
