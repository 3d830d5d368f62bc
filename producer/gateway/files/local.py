"""Files' bytes in a folder: one that every gateway on the same Redis sees, where there are several."""

import os
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self
from uuid import uuid4

from producer.errors import FileStoreError, SettingsError
from producer.gateway.files.base import READ_CHUNK_BYTES, check_part_name

IDENTITY_NAME = ".promptmill-files"  # holds a random id, which identifies the folder wherever it is mounted
UNFINISHED_SUFFIX = ".unfinished"


class LocalFileStore:
    """A `FileStore`. A part is written under another name, flushed to the disk, then renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.where = str(folder)

    @cached_property
    def identity(self) -> str:
        """Made by the gateway that comes first: of several, only one can create the link."""
        path = self._folder / IDENTITY_NAME
        if not path.exists():
            own = self._folder / f"{IDENTITY_NAME}-{uuid4().hex}"
            own.write_text(uuid4().hex)
            try:
                os.link(own, path)
            except (FileExistsError, FileNotFoundError):  # another gateway has made it, and may have removed our file
                pass
            finally:
                own.unlink(missing_ok=True)
        return path.read_text().strip()

    def check(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _ = self.identity  # made, unless somebody has
            # Left by a process that was killed; or by one that is about to find that it is late.
            for left in self._folder.glob(f"{IDENTITY_NAME}-*"):
                left.unlink(missing_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()  # without a name, where the system has such files
        except OSError as error:
            raise SettingsError(
                f"--files (PROMPTMILL_FILES): the folder {self._folder} cannot be written: {error.strerror}; "
                "make it writable for this user, or name another folder or s3://BUCKET/PREFIX"
            ) from error

    def writer(self, part: str) -> "LocalPartWriter":
        return LocalPartWriter(self._path(part))

    def read(self, part: str, offset: int = 0) -> Iterator[bytes]:
        path = self._path(part)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while chunk := file.read(READ_CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise FileStoreError(f"part {part} cannot be read from {self._folder}: {error.strerror}") from error

    def delete(self, part: str) -> None:
        path = self._path(part)
        try:
            # The unfinished file first: a writer that still lives has nothing to rename then.
            _unfinished(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise FileStoreError(f"part {part} cannot be deleted from {self._folder}: {error.strerror}") from error

    def _path(self, part: str) -> Path:
        check_part_name(part)
        return self._folder / part


class LocalPartWriter:
    """A `PartWriter`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_bytes = 0
        try:
            self._file: BinaryIO = _unfinished(path).open("xb", buffering=0)
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise self._failure(error) from error
        self.num_bytes += len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._remove()
            return
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            _unfinished(self._path).rename(self._path)
            _flush_folder(self._path.parent)
        except OSError as failure:
            self._remove()
            raise self._failure(failure) from failure

    def _remove(self) -> None:
        self._file.close()
        _unfinished(self._path).unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> FileStoreError:
        return FileStoreError(f"part {self._path.name} cannot be written to {self._path.parent}: {error.strerror}")


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED_SUFFIX)


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is flushed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
