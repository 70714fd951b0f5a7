"""Files that are written whole or not at all, and room for them before a run begins."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from .machine import headline
from .workloads import RequestError

_ROOM = 8 * 2**20
"""Bytes; more than all files of a long run take."""


def make_room(paths: Iterable[Path]) -> None:
    """Make the folders of these files, and try to write as much there as a run may.

    Raises:
        RequestError: one cannot be written to.
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
            raise RequestError(f"cannot write {path}: {error.strerror}") from None


def write(path: Path, data: bytes) -> bool:
    """Write a file whole, or leave what was there; in the temporary folder if there is no room.

    Returns:
        Whether the file is where it was wanted. Where it is is printed.
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


def as_markdown(
    described: dict[str, str], command: str, shown: Sequence[str], summary: str
) -> bytes:
    """What was printed, the machine, and the command."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in described.items())
    blocks = [f"```\n{text}\n```" for text in shown]
    machine = f"| | |\n|---|---|\n{facts}"
    parts = [f"# {headline(described)}", f"`{command}`", machine, *blocks, "## Verdict", summary]
    return ("\n\n".join(parts) + "\n").encode()
