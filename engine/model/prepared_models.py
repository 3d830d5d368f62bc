"""Models as loading leaves them, kept in the cache folder: the next start maps one instead of loading it again.

A kept model is named by all that loading depends on. It gets its name only when it is whole and on the disk. Together
they take at most `MAX_BYTES`: the one that was used the longest ago goes first. Nothing here raises: what cannot be
kept or read is loaded as it was the first time.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from engine.model.prepared_file import NotPreparedError, freeze, thaw

logger = logging.getLogger(__name__)

MAX_BYTES = 8 << 30  # of all together; a model of more than half of it is not kept
MIN_BYTES = 16 << 20  # a smaller one is loaded as fast
_SUFFIX = ".model"
_PARTIAL = ".partial"


class PreparedModels:
    """A folder of them; several processes may use it at once."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES, min_bytes: int = MIN_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._min_bytes = min_bytes

    def load(self, name: str, shared: Mapping[str, object]) -> Any:
        """What was kept under the name, or None. shared: see `freeze`."""
        path = self._folder / f"{name}{_SUFFIX}"
        try:
            prepared = thaw(path, shared)
        except FileNotFoundError:
            return None
        except (NotPreparedError, OSError) as error:
            logger.warning("action=prepared_model_unusable reason=%r", str(error))
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # a folder that is mounted read-only, or another user's, serves as well
            os.utime(path)  # used now
        return prepared

    def keep(self, name: str, prepared: object, shared: Mapping[str, object]) -> threading.Thread | None:
        """Write it down on a thread of its own, which is returned; None where it is not to be kept.

        Its tensors must not change until the thread has ended.
        """
        try:
            size, write = freeze(prepared, shared)
            if not self._min_bytes <= size <= self._max_bytes // 2:
                return None
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < 2 * size:
                raise NotPreparedError(f"{self._folder} has not twice its {size >> 20} MiB free")
        except (NotPreparedError, OSError) as error:
            logger.info("action=model_not_kept reason=%r", str(error))
            return None
        thread = threading.Thread(target=self._write, args=(name, size, write), name="keep-model", daemon=True)
        thread.start()
        return thread

    def _write(self, name: str, size: int, write: Callable[[BinaryIO], None]) -> None:
        staging: Path | None = None
        try:
            self._make_room(size)
            handle, path = tempfile.mkstemp(suffix=_PARTIAL, dir=self._folder)
            staging = Path(path)
            os.fchmod(handle, 0o644)  # as the model's own files: one user may fill a cache that others use
            with os.fdopen(handle, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # falls with this process: what it leaves behind is nobody's
                write(file)
                file.flush()
                os.fsync(file.fileno())
                staging.rename(self._folder / f"{name}{_SUFFIX}")
            logger.info("action=model_kept name=%s mebibytes=%d", name, size >> 20)
        except OSError as error:
            logger.warning("action=model_not_kept reason=%r", str(error))
            if staging is not None:
                staging.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove what was left half written, and the models used the longest ago until `size` more bytes fit."""
        for path in self._folder.glob(f"*{_PARTIAL}"):
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its writer lives
                path.unlink(missing_ok=True)
        kept = sorted(((path.stat().st_mtime, path) for path in self._folder.glob(f"*{_SUFFIX}")), reverse=True)
        for _, path in kept:
            size += path.stat().st_size
            if size > self._max_bytes:
                path.unlink(missing_ok=True)
