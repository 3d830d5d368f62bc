"""What a store of files' bytes does. Knows no records, owners or Redis: only parts, by names that we choose.

A part is written once and never changed; it exists whole or not at all. Records (`file_records`) list each file's parts
in order. Every method blocks: callers in an event loop use threads.
"""

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

READ_CHUNK_BYTES = 256 << 10
PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


class PartWriter(Protocol):
    """A part being written. Leaving its block commits it; leaving it by an exception leaves nothing behind."""

    num_bytes: int  # written so far

    def __enter__(self) -> Self: ...

    def write(self, data: bytes) -> None:
        """Raises FileStoreError."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raises FileStoreError where the part cannot be committed; then it is not there."""


class FileStore(Protocol):
    """May be used from several threads at once, and from several processes on several machines."""

    where: str  # shown to people: the folder, or s3://BUCKET/PREFIX

    @property
    def identity(self) -> str:
        """Without spaces: the same for everybody who sees the same parts, and for nobody else."""

    def check(self) -> None:
        """For whoever starts a gateway: whether parts can be written. Raises SettingsError with the remedy."""

    def writer(self, part: str) -> PartWriter:
        """For a new part; a name is never used twice. Raises FileStoreError."""

    def read(self, part: str, offset: int = 0) -> Iterator[bytes]:
        """The part's bytes from `offset` on, in chunks. Raises FileStoreError: for a missing part before any."""

    def delete(self, part: str) -> None:
        """Delete whatever exists of the part: committed, half written, or nothing. A writer that still lives cannot
        commit it any more. Raises FileStoreError."""


def check_part_name(part: str) -> None:
    """Names are ours; they go into paths and keys."""
    assert PART_NAME.fullmatch(part), f"no name of a part: {part!r}"
