"""The files of a batch: lines in, answers out. Owns resuming: what is answered already, and a torn last line.

A line of output is an answer to its `custom_id`, unless its error names an input line: then it is an answer to that.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from producer.batch_lines import BadLineError, BatchLine, parse_line
from producer.errors import BatchFileError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Answered:
    """What an output file holds already."""

    custom_ids: set[str] = field(default_factory=set)
    bad_lines: set[int] = field(default_factory=set)
    num_failed: int = 0

    @property
    def num_lines(self) -> int:
        return len(self.custom_ids) + len(self.bad_lines)


class BatchInput:
    """A JSONL file of requests. `scan()` comes first; empty lines count for nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.digest = ""
        self.num_lines = 0

    def scan(self) -> None:
        """Read the file once: its SHA-256 and its number of lines."""
        digest = hashlib.sha256()
        num_lines = 0
        try:
            with self._path.open("rb") as lines:
                for line in lines:
                    digest.update(line)
                    num_lines += bool(line.strip())
        except OSError as error:
            raise BatchFileError(f"input {self._path} cannot be read: {error.strerror or error}") from error
        self.digest, self.num_lines = digest.hexdigest(), num_lines

    def entries(self, answered: Answered) -> Iterator[tuple[int, BatchLine | BadLineError]]:
        """The lines without an answer, numbered from 1; broken ones, and repeated ids, as the error they are."""
        seen: set[str] = set()
        with self._path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                text = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
                if not text.strip():
                    continue
                line = _parse(text, seen)
                if isinstance(line, BadLineError):
                    if number not in answered.bad_lines:
                        yield number, line
                elif line.custom_id not in answered.custom_ids:
                    yield number, line


def _parse(text: bytes, seen: set[str]) -> BatchLine | BadLineError:
    try:
        line = parse_line(text)
    except BadLineError as error:
        return error
    if line.custom_id in seen:
        rule = f"custom_id: {line.custom_id!r:.80} stands on an earlier line; give each line one of its own"
        return BadLineError("duplicate_custom_id", rule, line.custom_id)
    seen.add(line.custom_id)
    return line


class BatchOutput:
    """A JSONL file of answers, appended to."""

    def __init__(self, path: Path, source: Path) -> None:
        self._path = path
        self._source = source

    def mend(self) -> Answered:
        """What was answered before. A last line that was torn off is removed: its request is answered again."""
        if self._path.exists() and self._path.samefile(self._source):
            raise BatchFileError(f"output {self._path} is the input as well; name another file")
        answered = Answered()
        try:
            self._path.touch()
            with self._path.open("r+b") as file:
                whole_bytes = 0
                for number, raw in enumerate(file, start=1):
                    if not raw.endswith(b"\n"):
                        file.truncate(whole_bytes)
                        break
                    whole_bytes += len(raw)
                    if raw.strip():
                        self._count(raw, number, answered)
        except OSError as error:
            raise BatchFileError(f"output {self._path} cannot be written: {error.strerror or error}") from error
        return answered

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], None]]:
        """A function that appends one line, and has it with the system before it returns."""
        with self._path.open("ab") as file:

            def write(line: str) -> None:
                # Half a surrogate pair (in a custom_id) has no UTF-8; with a backslash it is JSON's own escape.
                file.write(line.encode("utf-8", "backslashreplace") + b"\n")
                file.flush()

            yield write

    def _count(self, raw: bytes, number: int, answered: Answered) -> None:
        try:
            line = json.loads(raw)
            error, response, custom_id = line["error"], line["response"], line["custom_id"]
            bad_line = error.get("line") if error is not None else None
            is_failed = error is not None or response["status_code"] >= 400
        except (ValueError, LookupError, TypeError, AttributeError) as cause:
            raise BatchFileError(
                f"output {self._path}, line {number}, is no answer of a batch; name another file, or mend that line"
            ) from cause
        if isinstance(bad_line, int):
            answered.bad_lines.add(bad_line)
        else:
            answered.custom_ids.add(custom_id)
        answered.num_failed += is_failed
