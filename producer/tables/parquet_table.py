"""Parquet through PyArrow (`pip install 'promptmill[tables]'`). The input's columns keep their types."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from producer.errors import BatchFileError
from producer.tables.base import NewColumns, Row, RowAnswer, TableReader

ROWS_A_BATCH = 1000
_TYPES = {"prompt_tokens": pa.int64(), "completion_tokens": pa.int64(), "embedding": pa.list_(pa.float32())}


class ParquetReader:
    def __init__(self, path: Path) -> None:
        """Raises BatchFileError."""
        self._path = path
        try:
            with pq.ParquetFile(path) as file:
                self.columns = tuple(file.schema_arrow.names)
        except (OSError, pa.ArrowException) as error:
            raise BatchFileError(f"input {path} cannot be read as Parquet: {error}") from error

    def rows(self, names: Sequence[str] | None = None) -> Iterator[Row]:
        first = 1
        for batch in self._batches(None if names is None else list(names)):
            for number, cells in enumerate(_in_microseconds(batch).to_pylist(), start=first):
                yield Row(number, cells)
            first += batch.num_rows

    def record_batches(self) -> Iterator[Any]:
        return self._batches(None)

    def _batches(self, names: list[str] | None) -> Iterator[Any]:
        try:
            # Without pre_buffer a row group is read as it is needed, however large it is.
            with pq.ParquetFile(self._path, pre_buffer=False) as file:
                batches = file.iter_batches(batch_size=ROWS_A_BATCH, columns=names)
                yield from itertools.chain(batches, [_empty(file, names)])
        except (OSError, pa.ArrowException) as error:
            raise BatchFileError(f"input {self._path} cannot be read as Parquet: {error}") from error


class ParquetWriter:
    def write(self, path: Path, reader: TableReader, answers: Iterator[RowAnswer], columns: NewColumns) -> None:
        out: pq.ParquetWriter | None = None
        try:
            for batch in reader.record_batches():
                table = _with_answers(batch, list(itertools.islice(answers, batch.num_rows)), columns)
                out = out or pq.ParquetWriter(path, table.schema)
                if table.num_rows or reader.columns == ():
                    out.write_batch(table)
        finally:
            if out is not None:
                out.close()


def _with_answers(batch: Any, answers: list[RowAnswer], columns: NewColumns) -> Any:
    for name, column in columns.items():
        values = pa.array([getattr(answer, name) for answer in answers], _TYPES.get(name, pa.string()))
        batch = batch.append_column(column, values)
    return batch


def _in_microseconds(batch: Any) -> Any:
    """Python's times have no nanoseconds."""
    for at, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type) and getattr(field.type, "unit", None) == "ns":
            values = batch.column(at).cast(_microseconds(field.type), safe=False)
            batch = batch.set_column(at, field.name, values)
    return batch


def _microseconds(kind: Any) -> Any:
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.time64("us") if pa.types.is_time64(kind) else pa.duration("us")


def _empty(file: Any, names: list[str] | None) -> Any:
    """A batch without rows: what tells a writer the columns of a table that has none."""
    schema = file.schema_arrow if names is None else pa.schema([file.schema_arrow.field(name) for name in names])
    return pa.RecordBatch.from_pylist([], schema=schema)
