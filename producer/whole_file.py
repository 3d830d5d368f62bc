"""A file written beside its place and renamed into it: nobody finds a part of it, ever. Knows nothing of what it holds.

Whoever writes it so holds a lock meanwhile, on this file or another: what is beside it has always the same name.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Rename = Callable[[Path], None]


def partial_path(path: Path) -> Path:
    """Where it is written; there is nothing afterwards, unless its writer was killed."""
    place = path.resolve()
    return place.with_name(f".{place.name}.promptmill")


@contextmanager
def whole_file(path: Path, rename: Rename | None = None) -> Iterator[Path]:
    """Write to what is yielded, and close it: at the end it replaces the file, whose rights it has. An error ends it.

    `rename` puts it into its place, where there is more to that.
    """
    partial = partial_path(path)
    try:
        partial.open("wb").close()
        if path.exists():
            shutil.copymode(path, partial)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if rename is not None:
            rename(partial)
        else:
            os.replace(partial, path.resolve())
    finally:
        partial.unlink(missing_ok=True)
