"""Files that are written whole or not at all, and room for them before a run begins."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from .checks import RequestError

_ROOM = 8 * 2**20
"""Bytes; more than all files of a long run take."""


def make_room(folder: Path) -> None:
    """Make a folder, and try to write as much there as a run may, or raise RequestError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_ROOM))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror}") from None


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
