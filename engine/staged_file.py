"""A file that gets its name only when it is whole, so that nobody who looks meanwhile finds a part of it."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _SUFFIX = ".promptmill-", ".partial"
_LEFT_SECONDS = 86_400  # a file that nobody wrote to for so long was left by a process that was killed


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yields an empty file beside `target` that takes its name at the end, and is removed where something raises.

    Makes the folder. All may read the file: a cache may be filled by one user, of an image say, and used by another.
    Raises `OSError` where it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # another process removed it
            if left.stat().st_mtime < time.time() - _LEFT_SECONDS:
                left.unlink()
    handle, name = tempfile.mkstemp(_SUFFIX, _PREFIX, target.parent)
    os.fchmod(handle, 0o644)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)
