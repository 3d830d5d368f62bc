"""A lock on a file, which the system takes back when its holder dies. Knows nothing of batches."""

import os
import sys
from pathlib import Path
from typing import BinaryIO

RENAMES_ONTO_OPEN_FILES = sys.platform != "win32"


class FileLockedError(Exception):
    """Another process, or this one, holds the lock."""


class FileLock:
    """Held from the start until `close()`, on whatever file stands at `path` then."""

    def __init__(self, path: Path) -> None:
        """Make the file if need be. Raises FileLockedError at once, and OSError."""
        self._path = path.resolve()
        self._file = _open_locked(self._path)

    def replace(self, whole: Path) -> None:
        """Put the file `whole`, which nobody has open, into the place of the locked one; the lock is on that then.

        Raises FileLockedError if somebody else was faster: theirs is the new file.
        """
        with self._file:  # on the old one until the new one is: who waits for that finds that it is gone
            if not RENAMES_ONTO_OPEN_FILES:  # then nobody can have opened it in between, or the rename is refused
                self._file.close()
            os.replace(whole, self._path)
            self._file = _open_locked(self._path)

    def close(self) -> None:
        self._file.close()


def _open_locked(path: Path) -> BinaryIO:
    while True:
        file = path.open("ab")
        try:
            _lock(file)
        except BaseException:
            file.close()
            raise
        if _is_still_there(file, path):
            return file
        file.close()  # its holder removed it between our two steps


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
