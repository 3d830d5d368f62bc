"""A prompt with columns in it: `Summarise: {text}`. Knows nothing of files.

What stands between braces is a column's name as it is, spaces and dots included; `{{` and `}}` are braces.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from producer.errors import InvalidJobError
from producer.tables.base import cell_text

MAX_COLUMNS_SHOWN = 20

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class UnusableRowError(ValueError):
    """A row that gives no prompt; the message begins with a code."""


class NullCellError(UnusableRowError):
    """One whose null cell a text could stand for."""


class PromptTemplate:
    """`null_text`: what a null cell reads as; None: its row gives no prompt."""

    def __init__(self, text: str, columns: Sequence[str], *, flag: str, null_text: str | None = None) -> None:
        """Raises InvalidJobError naming the flag: a brace alone, or a column that the table has not."""
        self._null_text = null_text
        self._pieces: list[tuple[str, bool]] = []  # text, or the name of a column
        for found in _PIECE.finditer(text):
            self._pieces.append(_read_piece(found, columns, flag))
        self.columns = tuple(dict.fromkeys(piece for piece, is_column in self._pieces if is_column))

    def render(self, cells: Mapping[str, Any]) -> str:
        """Raises UnusableRowError."""
        return "".join(self._cell(piece, cells[piece]) if is_column else piece for piece, is_column in self._pieces)

    def _cell(self, name: str, value: Any) -> str:
        if value is None:
            if self._null_text is None:
                raise NullCellError(f"null_cell: column {name!r} is null; --null TEXT says what that reads as")
            return self._null_text
        try:
            return cell_text(value)
        except UnicodeDecodeError as error:
            raise UnusableRowError(f"invalid_row: column {name!r} is not UTF-8") from error


def _read_piece(found: "re.Match[str]", columns: Sequence[str], flag: str) -> tuple[str, bool]:
    piece = found[0]
    if piece in ("{{", "}}"):
        return piece[0], False
    if piece in ("{", "}"):
        rule = f"{flag}: the {piece} at character {found.start() + 1} stands alone; write {piece * 2} for a brace"
        raise InvalidJobError(rule, param=flag)
    if found[1] is None:
        return piece, False
    if found[1] not in columns:
        raise InvalidJobError(_unknown_column(found[1], columns, flag), param=flag)
    return found[1], True


def _unknown_column(name: str, columns: Sequence[str], flag: str) -> str:
    shown = ", ".join(columns[:MAX_COLUMNS_SHOWN])
    more = f" and {len(columns) - MAX_COLUMNS_SHOWN} more" if len(columns) > MAX_COLUMNS_SHOWN else ""
    close = difflib.get_close_matches(name, columns, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{flag}: there is no column {name!r}{hint}; the columns are: {shown}{more}"
