"""A file that gets its name only when it is whole, so that nobody who looks meanwhile finds a part of it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yields an empty file beside `target` that takes its name at the end, and is removed where something raises.

    Makes the folder. Raises `OSError` where it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".partial", dir=target.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)
