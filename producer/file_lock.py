"""A lock on a file, which the system takes back when its holder dies. Knows nothing of batches."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class FileLockedError(Exception):
    """Another process, or this one, holds the lock."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on the file, which is made if need be. Raises FileLockedError at once, and OSError."""
    while True:
        with path.open("ab") as file:
            _lock(file)
            if not _is_still_there(file, path):
                continue  # its holder removed it between our two steps
            yield
            return


def _is_still_there(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO) -> None:
    """Until the file is closed."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**62)  # a byte that no file has: the others can be written
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise FileLockedError from error
