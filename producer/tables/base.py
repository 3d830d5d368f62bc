"""What a table is to a run: named columns and rows, read as often as needed and in bounded memory.

PyArrow is needed for Parquet alone, so nothing here imports it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Row:
    """`number` counts from 1, without the header. `problem`: why the row is of no use; its cells are what there is."""

    number: int
    cells: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """What a row is answered with. None where there is nothing to say."""

    response: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    embedding: list[float] | None = None


GENERATED_FIELDS = ("response", "finish_reason", "error", "prompt_tokens", "completion_tokens")
EMBEDDED_FIELDS = ("embedding", "error", "prompt_tokens")

NewColumns = Mapping[str, str]
"""The columns behind the table's own, in their order: a field of `RowAnswer` and the column's name."""


class TableReader(Protocol):
    """An open table. Every call of `rows` reads it from its beginning."""

    columns: tuple[str, ...]

    def rows(self, names: Sequence[str] | None = None) -> Iterator[Row]:
        """Rows with the cells of these columns; None: of all. Raises BatchFileError where the file is broken."""
        ...

    def record_batches(self) -> Iterator[Any]:
        """The rows as pyarrow's record batches, in bounded pieces."""
        ...


class TableWriter(Protocol):
    def write(self, path: Path, reader: TableReader, answers: Iterator[RowAnswer], columns: NewColumns) -> None:
        """The reader's table with an answer behind each row."""
        ...


def cell_text(value: Any) -> str:
    """A cell as a prompt or a CSV file has it. Raises UnicodeDecodeError for bytes that are no UTF-8."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, bool | dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=cell_text)
    return str(value)


def json_cell(value: Any) -> Any:
    """A cell as JSON has it: what JSON has no form for becomes text."""
    with suppress(TypeError, ValueError):
        json.dumps(value, allow_nan=False)
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, dict):
        return {str(name): json_cell(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_cell(inner) for inner in value]
    return None if value != value else str(value)  # NaN is what is not there
