"""A file of batch lines: read once as a whole, then line by line in the best order to run them. Holds no bodies.

Lines whose prompts share a prefix come next to each other, so that the engine's prefix cache still holds its KV blocks;
otherwise the file's order is kept. 50,000 lines take a few MB here, whatever their length.
"""

import hashlib
import json
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from producer.batch.lines import BadLineError, BatchLine, parse_line

PREFIX_CHARS = (128, 512, 2048, 8192)  # of a prompt: the prefix lengths by which lines are grouped
HASH_MASK = 2**64 - 1
ID_DIGEST_BYTES = 16
DEFAULT_MAX_LINE_BYTES = 256 << 20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

ParsedLine = BatchLine | BadLineError
Entry = tuple[int, ParsedLine]
See = Callable[[int, ParsedLine], None]  # a line's number in the file, from 1, and what it is


class LineIndex:
    """The offset of each line. `file` stays open as long as lines are read; not thread-safe."""

    def __init__(self, file: BinaryIO, max_line_bytes: int = DEFAULT_MAX_LINE_BYTES) -> None:
        self._file = file
        self._max_bytes_read = max_line_bytes + 1
        self._numbers, self._offsets, self._lengths = array("L"), array("Q"), array("Q")
        self._prefixes = [array("Q") for _ in PREFIX_CHARS]
        self._repeated: dict[int, int] = {}  # the number of a line, and of the earlier one with the same custom_id
        self.digest = ""

    def __len__(self) -> int:
        """The number of lines that are not empty."""
        return len(self._numbers)

    def scan(self, see: See | None = None) -> None:
        """Read the whole file once. `see` is called with every line that is not empty, in order."""
        digest, first_with_id = hashlib.sha256(), dict[bytes, int]()
        offset = 0
        for number, raw in enumerate(self._read_lines(digest.update), start=1):
            length = self._file.tell() - offset
            if raw.strip() not in (b"", _BYTE_ORDER_MARK):
                line = self._parse(number, raw)
                if isinstance(line, BatchLine):
                    first = first_with_id.setdefault(_digest(line.custom_id), number)
                    if first != number:
                        self._repeated[number] = first
                        line = _repeated(line.custom_id, first)
                self._add(number, offset, length, line)
                if see is not None:
                    see(number, line)
            offset += length
        self.digest = digest.hexdigest()

    def numbers(self) -> Iterator[int]:
        """The numbers of the lines, in the best order to run them."""
        ranks = [_first_of_each(hashes) for hashes in self._prefixes]
        by_prefix = sorted(range(len(self)), key=lambda at: (*(rank[at] for rank in ranks), at))
        return (self._numbers[at] for at in by_prefix)

    def read(self, number: int) -> ParsedLine:
        """The line of that number, parsed as in `scan`."""
        at = self.position(number)
        self._file.seek(self._offsets[at])
        line = self._parse(number, self._file.read(min(self._lengths[at], self._max_bytes_read)))
        if number in self._repeated and isinstance(line, BatchLine):
            return _repeated(line.custom_id, self._repeated[number])
        return line

    def position(self, number: int) -> int:
        """The line's index among the lines that are not empty, from 0."""
        return bisect_left(self._numbers, number)

    def entries(self, numbers: Iterable[int]) -> Iterator[Entry]:
        """Yield those lines, each read when it is asked for."""
        return ((number, self.read(number)) for number in numbers)

    def _read_lines(self, see_bytes: Callable[[bytes], object]) -> Iterator[bytes]:
        """The file's lines; a line that is too long is cut, to a length that is still too long."""
        while raw := self._file.readline(self._max_bytes_read):
            see_bytes(raw)
            rest = raw
            while len(rest) == self._max_bytes_read and not rest.endswith(b"\n"):
                rest = self._file.readline(self._max_bytes_read)
                see_bytes(rest)
            yield raw

    def _parse(self, number: int, raw: bytes) -> ParsedLine:
        try:
            if len(raw) == self._max_bytes_read:
                raise BadLineError("line_too_long", f"the line has more than {self._max_bytes_read - 1} bytes")
            return parse_line(raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw)
        except BadLineError as error:
            return error

    def _add(self, number: int, offset: int, length: int, line: ParsedLine) -> None:
        self._numbers.append(number)
        self._offsets.append(offset)
        self._lengths.append(length)
        text = prefix_text(line.body) if isinstance(line, BatchLine) else ""
        for num_chars, hashes in zip(PREFIX_CHARS, self._prefixes, strict=True):
            hashes.append(hash(text[:num_chars]) & HASH_MASK)


@dataclass(frozen=True, slots=True)
class IndexedLines:
    """A `LineSource` for `BatchProtocol`: the lines of `entries`, and `reload` for any line of the index."""

    index: LineIndex
    entries: Iterator[Entry]

    def __iter__(self) -> Iterator[Entry]:
        return self.entries

    def reload(self, number: int) -> BatchLine:
        line = self.index.read(number)
        assert isinstance(line, BatchLine)
        return line


def prefix_text(body: Mapping[str, Any]) -> str:
    """The text of a prompt's beginning, in the order of chat templates. `body` may be invalid."""
    limit = PREFIX_CHARS[-1]
    prompt, messages, tools = body.get("prompt"), body.get("messages", body.get("input")), body.get("tools")
    if isinstance(prompt, str):
        return prompt[:limit]
    if isinstance(prompt, list):
        return json.dumps(prompt[:limit])
    pieces = [json.dumps(tools)] if tools else []
    if isinstance(instructions := body.get("instructions"), str):
        pieces.append(instructions[:limit])
    for message in messages if isinstance(messages, list) else [messages or ""]:
        if sum(map(len, pieces)) >= limit:
            break
        content = message.get("content") if isinstance(message, dict) else message
        pieces.append(f"\n{message.get('role')}\n" if isinstance(message, dict) else "\n")
        pieces.append(content[:limit] if isinstance(content, str) else json.dumps(content))
    return "".join(pieces)


def _first_of_each(hashes: "array[int]") -> "array[int]":
    """For each hash, the index of its first occurrence."""
    first: dict[int, int] = {}
    return array("L", (first.setdefault(value, at) for at, value in enumerate(hashes)))


def _digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=ID_DIGEST_BYTES).digest()


def _repeated(custom_id: str, first: int) -> BadLineError:
    rule = f"custom_id: {custom_id!r:.80} stands on line {first} already; give each line one of its own"
    return BadLineError("duplicate_custom_id", rule, custom_id)
