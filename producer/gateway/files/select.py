"""Which store holds files' bytes. What one needs is imported when it is chosen."""

from pathlib import Path

from producer.gateway.files.base import FileStore
from producer.gateway.files.local import LocalFileStore


def select_file_store(where: str) -> FileStore:
    """`where` is a folder."""
    return LocalFileStore(Path(where).expanduser())
