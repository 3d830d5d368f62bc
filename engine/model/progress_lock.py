"""A lock between processes for what takes long and is done once: its holder says in the lock's file how far it has
come, and those who wait for it pass that on.
"""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_TELL_SECONDS = 2.0
_LOOK_SECONDS = 0.2  # between looks at what another process does


class Progress:
    """Tells how far something has come: its own process and, in the file of its lock, those who wait. Thread-safe."""

    def __init__(self, name: str, report: Callable[[str], None], lock: IO[str] | None = None) -> None:
        self._name = name
        self._report = report
        self._file = lock
        self._told_at = float("-inf")
        self._turn = threading.Lock()

    def tell(self, how_far: str) -> None:
        with self._turn:
            self._tell(how_far)

    def tell_at_times(self, how_far: str) -> None:
        """`tell`, if nothing was told for a while."""
        with self._turn:
            if time.monotonic() > self._told_at + _TELL_SECONDS:
                self._tell(how_far)

    def _tell(self, how_far: str) -> None:
        message = f"{self._name}: {how_far}"
        self._told_at = time.monotonic()
        if self._file is not None:
            self._file.truncate(0)
            self._file.write(message)
            self._file.flush()
        self._report(message)


@contextmanager
def progress_lock(path: Path, name: str, report: Callable[[str], None]) -> Iterator[Progress]:
    """Hold an exclusive lock on a file; it falls with the process that holds it. While another one does, `report` is
    told what that one says. Makes the folder. Raises `OSError` where there is no such lock to be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        known = ""
        while not _try_lock(file):
            file.seek(0)
            if (said := file.read()) != known:
                known = said
                report(f"another process is at it: {said}")
            time.sleep(_LOOK_SECONDS)
        yield Progress(name, report, file)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
