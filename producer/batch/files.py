"""The files of a batch: lines in, answers out. Handles resuming: which lines are answered, and a torn last line.

A line of output answers its `custom_id`, unless its error names an input line: then it answers that line.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from producer.batch.line_index import IndexedLines, LineIndex
from producer.batch.lines import BadLineError, BatchLine, encode_line, is_failed, is_refused
from producer.batch.protocol import is_of_another_batch
from producer.errors import BatchFileError
from producer.file_lock import FileLock, FileLockedError
from producer.whole_file import partial_path, whole_file


@dataclass(slots=True)
class Answered:
    """The answers that an output file already has."""

    custom_ids: set[str] = field(default_factory=set)
    bad_lines: set[int] = field(default_factory=set)
    num_failed: int = 0
    num_refused: int = 0  # of those that failed

    @property
    def num_lines(self) -> int:
        return len(self.custom_ids) + len(self.bad_lines)

    def has(self, number: int, line: BatchLine | BadLineError) -> bool:
        """Whether input line `number` is answered."""
        return number in self.bad_lines if isinstance(line, BadLineError) else line.custom_id in self.custom_ids


class BatchInput:
    """A JSONL file of requests. Call `scan()` first; empty lines are ignored."""

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        """`file`: the open file of the lines, if `path` is the table that they were made from."""
        self._path = path
        self._file = file
        self._index: LineIndex | None = None

    @property
    def digest(self) -> str:
        return self._scanned.digest

    @property
    def num_lines(self) -> int:
        return len(self._scanned)

    def scan(self) -> None:
        """Read the file once. It stays open until `close()`."""
        try:
            self._file = self._file or self._path.open("rb")
            self._file.seek(0)
            self._index = LineIndex(self._file)
            self._index.scan()
        except OSError as error:
            raise BatchFileError(f"input {self._path} cannot be read: {error.strerror or error}") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def lines_without(self, answered: Answered) -> IndexedLines:
        """The lines without an answer, those with a common prefix together; a malformed line is its error."""
        index = self._scanned
        entries = index.entries(index.numbers())
        return IndexedLines(index, (entry for entry in entries if not answered.has(*entry)))

    @property
    def _scanned(self) -> LineIndex:
        assert self._index is not None, "scan() comes first"
        return self._index


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writes to an output, or to a file beside it. Raises BatchFileError, for example when the disk is full."""
    try:
        yield
    except OSError as error:
        raise BatchFileError(f"output {path} cannot be written: {error.strerror or error}") from error


class BatchOutput:
    """A JSONL file to which answers are appended. `journal_of`: the table that is made from them at the end; the first
    line of such a journal identifies the requests.

    `drops_failed`: answers of an earlier run that are errors are dropped, so that their lines are retried.
    """

    def __init__(self, path: Path, *, journal_of: Path | None = None, drops_failed: bool = False) -> None:
        self._path = path
        self._is_journal = journal_of is not None
        self._written_whole = [path] if journal_of is None else [path, journal_of]
        self._drops_failed = drops_failed
        self._lock: FileLock | None = None
        self._has_answers = False  # written by this run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output's lock. Raises BatchFileError if another run holds it. A run that ends with an error before
        its first answer leaves no file where there was none."""
        path, is_new = self._path.resolve(), not self._path.exists()
        with self._refused_where_locked(), writing(self._path):
            self._lock = FileLock(self._path)
        with closing(self._lock):
            with writing(self._path):
                is_new = is_new and not path.stat().st_size  # nobody has written it before we had the lock
                for whole in self._written_whole:
                    partial_path(whole).unlink(missing_ok=True)  # left by a run that was killed
            try:
                yield
            except BaseException:
                if is_new and not self._has_answers:
                    with suppress(OSError):
                        path.unlink()
                raise

    def mend(self, digests: Sequence[str]) -> Answered:
        """Return what is answered already. Removes a torn last line: its request is answered again.

        `digests`: of this run's requests, and of earlier ones whose answers count. A journal of other requests is
        refused, and so is an answer to another request: its line would count as answered and never be asked.
        """
        answered = Answered()
        with writing(self._path), self._path.open("r+b") as file:
            if self._is_journal:
                self._check_owner(file, digests)
            whole_bytes = file.tell()
            for number, raw in enumerate(file, start=1 + self._is_journal):
                if not raw.endswith(b"\n"):
                    file.truncate(whole_bytes)
                    break
                whole_bytes += len(raw)
                if raw.strip():
                    self._count(raw, number, answered, digests)
        if self._drops_failed and answered.num_failed:
            self._drop_failed()
            return self.mend(digests)
        return answered

    def _drop_failed(self) -> None:
        assert self._lock is not None, "locked() comes first"
        replaced = whole_file(self._path, self._lock.replace)
        with self._refused_where_locked(), writing(self._path), replaced as partial:
            self._copy_good(partial)

    def _copy_good(self, target: Path) -> None:
        with self._path.open("rb") as file, target.open("wb") as kept:
            if self._is_journal:
                kept.write(file.readline())
            kept.writelines(raw for raw in file if raw.strip() and not is_failed(json.loads(raw)))

    @contextmanager
    def _refused_where_locked(self) -> Iterator[None]:
        try:
            yield
        except FileLockedError as error:
            rule = f"another `promptmill run` writes {self._path}; wait for its end, or name another file"
            raise BatchFileError(rule) from error

    @contextmanager
    def opened(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """A function that appends one line and flushes it to the operating system. Raises BatchFileError."""
        with writing(self._path):
            file = self._path.open("ab")

        def write(line: Mapping[str, Any]) -> None:
            self._has_answers = True
            with writing(self._path):
                file.write(encode_line(line))
                file.flush()

        try:
            yield write
        finally:
            with writing(self._path):  # closing flushes again what could not be written
                file.close()

    def _check_owner(self, file: BinaryIO, digests: Sequence[str]) -> None:
        """Read the journal's first line, or write it. Raises BatchFileError for a journal of other requests that has an
        answer."""
        owners = [encode_line({"custom_id": None, "digest": digest}) for digest in digests]
        first = file.readline()
        if first in owners:
            return
        if file.read(1):
            raise BatchFileError(
                f"{self._path} holds the answers to another input, or to other options; go on with those, or remove it "
                "to begin anew"
            )
        # There is no answer: the file is empty, has a torn first line, or is from a run that was refused.
        file.seek(0)
        file.truncate()
        file.write(owners[0])
        file.flush()

    def _count(self, raw: bytes, number: int, answered: Answered, digests: Sequence[str]) -> None:
        try:
            line = json.loads(raw)
            error, custom_id = line["error"], line["custom_id"]
            has_failed, was_refused = is_failed(line), is_refused(line)
            bad_line = error.get("line") if error is not None else None
            is_foreign = all(is_of_another_batch(line.get("id"), digest, custom_id) for digest in digests)
        except (ValueError, LookupError, TypeError, AttributeError) as cause:
            raise BatchFileError(
                f"output {self._path}, line {number}, is not an answer of a batch; name another file or correct it"
            ) from cause
        if is_foreign:
            raise BatchFileError(
                f"output {self._path}, line {number}, answers another input, or goes with another --model, "
                "--tenant or --run-id; name another file, or remove this one"
            )
        if isinstance(bad_line, int):
            answered.bad_lines.add(bad_line)
        else:
            answered.custom_ids.add(custom_id)
        answered.num_failed += has_failed
        answered.num_refused += was_refused
