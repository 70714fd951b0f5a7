"""Files that are written whole or not at all, and room for them before a run begins."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import headline

_ROOM = 8 * 2**20
"""Bytes; more than all files of a long run take."""


class NowhereToWriteError(RuntimeError):
    """A file could not be written at the end of the run; the message says which and why."""


def make_room(paths: Iterable[Path]) -> None:
    """Make the folders of these files and try to write there as much as a run may.

    Raises:
        NowhereToWriteError: one cannot be written to.
    """
    for path in paths:
        folder = path.absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(_ROOM))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise NowhereToWriteError(f"cannot write {path}: {error.strerror}") from None


def write(path: Path, data: bytes) -> bool:
    """Write a file whole, or leave what was there; in the temporary folder if there is no room.

    Returns:
        Whether it lies where it was wanted. Where it lies is printed.
    """
    for place in (path, Path(tempfile.gettempdir()) / path.name):
        part = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            part.write_bytes(data)
            part.replace(place)
        except OSError as error:
            print(f"cannot write {place}: {error.strerror}", file=sys.stderr)
        else:
            print(f"saved {place}")
            return place == path
        finally:
            part.unlink(missing_ok=True)
    return False


def as_json(found: Mapping[str, Any]) -> bytes:
    """Everything that was measured; samples in a line, and not each in its own."""
    text = json.dumps(found, indent=1, default=str)
    text = re.sub(
        r"\[\s+([-+.eE\d,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text
    )
    return f"{text}\n".encode()


def as_markdown(described: dict[str, Any], shown: Sequence[str], summary: str) -> bytes:
    """What was printed, and the machine."""
    facts = {key: value for key, value in described.items() if not isinstance(value, (dict, list))}
    facts |= {key: value for key, value in described["versions"].items() if value is not None}
    text = "\n\n".join(
        [
            f"# {headline(described)}",
            f"`{' '.join(['python', *sys.argv])}`",
            "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())]),
            *(f"```\n{text}\n```" for text in shown),
            "## Verdict",
            summary.partition("\n")[2] + "\n",
        ]
    )
    return text.encode()
