"""A table as JSON Lines: an object a row."""

import json
from collections.abc import Iterator
from pathlib import Path

from producer.tables.base import ANSWER_COLUMNS, RowAnswer, TableReader, json_cell


class JsonLinesWriter:
    def write(self, path: Path, reader: TableReader, answers: Iterator[RowAnswer], prefix: str) -> None:
        with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
            for row, answer in zip(reader.rows(), answers, strict=True):
                cells = {name: json_cell(value) for name, value in row.cells.items()}
                cells |= {prefix + name: getattr(answer, name) for name in ANSWER_COLUMNS}
                file.write(json.dumps(cells, ensure_ascii=False) + "\n")
