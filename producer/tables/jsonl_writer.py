"""A table as JSON Lines: an object a row."""

import json
from collections.abc import Iterator
from pathlib import Path

from producer.tables.base import NewColumns, RowAnswer, TableReader, json_cell


class JsonLinesWriter:
    def write(self, path: Path, reader: TableReader, answers: Iterator[RowAnswer], columns: NewColumns) -> None:
        with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
            for row, answer in zip(reader.rows(), answers, strict=True):
                cells = {name: json_cell(value) for name, value in row.cells.items()}
                cells |= {column: getattr(answer, name) for name, column in columns.items()}
                file.write(json.dumps(cells, ensure_ascii=False) + "\n")
