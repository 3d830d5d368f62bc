"""CSV and TSV through the standard library. Cells are text as it stands: `007` stays `007`.

UTF-8; bytes that are none make their row unusable, and are written back as they were.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from producer.errors import BatchFileError
from producer.tables.base import NewColumns, Row, RowAnswer, TableReader, cell_text

MAX_CELL_CHARS = 2**31 - 1  # the library's own limit of 131,072 is less than many a prompt
ROWS_A_BATCH = 1000

_ENCODING: dict[str, Any] = {"errors": "surrogateescape", "newline": ""}


class CsvReader:
    def __init__(self, path: Path, delimiter: str) -> None:
        """Raises BatchFileError."""
        self._path = path
        self._delimiter = delimiter
        csv.field_size_limit(MAX_CELL_CHARS)
        header = next(self._records(), [])
        if not header:
            raise BatchFileError(f"input {path} has no header: its first row must name the columns")
        if any(_is_broken(name) for name in header):
            raise BatchFileError(f"input {path} is not UTF-8 text; save it as UTF-8")
        self.columns = tuple(header)

    def rows(self, names: Sequence[str] | None = None) -> Iterator[Row]:
        wanted = self.columns if names is None else tuple(names)
        places = [(name, self.columns.index(name)) for name in wanted]
        records = self._records()
        next(records)
        for number, record in enumerate(records, start=1):
            cells = {name: record[place] if place < len(record) else None for name, place in places}
            yield Row(number, cells, self._problem(record, cells))

    def record_batches(self) -> Iterator[Any]:
        import pyarrow as pa

        schema = pa.schema([(name, pa.string()) for name in self.columns])
        chunk: list[dict[str, Any]] = []
        for row in self.rows():
            chunk.append({name: _replace_broken(text) for name, text in row.cells.items()})
            if len(chunk) == ROWS_A_BATCH:
                yield pa.RecordBatch.from_pylist(chunk, schema=schema)
                chunk = []
        yield pa.RecordBatch.from_pylist(chunk, schema=schema)

    def _records(self) -> Iterator[list[str]]:
        """The header and the rows; empty lines count for nothing."""
        try:
            with self._path.open(encoding="utf-8-sig", **_ENCODING) as file:
                reader = csv.reader(file, delimiter=self._delimiter)
                yield from filter(None, reader)
        except OSError as error:
            raise BatchFileError(f"input {self._path} cannot be read: {error.strerror or error}") from error
        except csv.Error as error:
            raise BatchFileError(f"input {self._path}, line {reader.line_num}: {error}") from error

    def _problem(self, record: list[str], cells: dict[str, str | None]) -> str | None:
        if len(record) != len(self.columns):
            return f"invalid_row: the row has {len(record)} cells, the header names {len(self.columns)}"
        for name, text in cells.items():
            if text is not None and _is_broken(text):
                return f"invalid_row: column {name!r} is not UTF-8"
        return None


class CsvWriter:
    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def write(self, path: Path, reader: TableReader, answers: Iterator[RowAnswer], columns: NewColumns) -> None:
        with path.open("w", encoding="utf-8", **_ENCODING) as file:
            out = csv.writer(file, delimiter=self._delimiter, lineterminator="\n")
            out.writerow([*reader.columns, *columns.values()])
            for row, answer in zip(reader.rows(), answers, strict=True):
                values = [row.cells[name] for name in reader.columns]
                values += [getattr(answer, name) for name in columns]
                out.writerow(["" if value is None else _text(value) for value in values])


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return cell_text(value)


def _is_broken(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def _replace_broken(text: str | None) -> str | None:
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
