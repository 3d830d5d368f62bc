"""Walks through the JSON object of one call, a character at a time, and finds the function's name and arguments in it.

Only the walk that is needed: it knows strings, nesting and the object's own members, and leaves the arguments as they
were written. What it finds depends on the text alone, never on how it was cut into pieces. Knows nothing of markers.
"""

import json
from enum import Enum

NAME_KEY = "name"
ARGUMENTS_KEYS = ("arguments", "parameters")

_OUTSIDE_STRINGS = frozenset(
    "{}[]:,+-._ \t\r\n0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)  # what JSON has there, and Python's words for its constants


class _At(Enum):
    BEGINNING = 1  # before the object's brace
    KEY = 2
    COLON = 3
    VALUE = 4
    END = 5
    BROKEN = 6


class CallScanner:
    """Arguments that are an object are given out as they come; others are known once the object is complete."""

    __slots__ = (
        "_at",
        "_depth",
        "_fragments",
        "_is_escaped",
        "_is_in_string",
        "_other_arguments",
        "_part",
        "has_begun_arguments",
        "keys",
        "name",
    )

    def __init__(self) -> None:
        self.name: str | None = None
        self.keys: list[str] = []
        self.has_begun_arguments = False  # there is an object of them, with more to it than its brace
        self._at = _At.BEGINNING
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self._part: list[str] = []  # of the key or value under way; of an object of arguments its brace alone
        self._fragments: list[str] | None = None  # of that object
        self._other_arguments: str | None = None

    @property
    def is_complete(self) -> bool:
        return self._at is _At.END

    @property
    def is_broken(self) -> bool:
        """What was read last is no part of such an object."""
        return self._at is _At.BROKEN

    def feed(self, text: str) -> int:
        """Reads on, but for one news at a time: a member's key, its value, the beginning of the arguments, the end.

        How many characters were read; not the one that broke the object.
        """
        at, has_begun = self._at, self.has_begun_arguments
        for position, character in enumerate(text):
            self._take(character)
            if self._at is _At.BROKEN:
                return position
            if self._at is not at or self.has_begun_arguments is not has_begun:
                return position + 1
        return len(text)

    def take_arguments(self) -> str:
        """What has come of an object of arguments since the last call."""
        fragment = "".join(self._fragments or ())
        if self._fragments:
            self._fragments.clear()
        return fragment

    def resolve_arguments(self) -> str | None:
        """The arguments of a complete object that has no object of them: some models write a string that holds it.

        None: they are neither that nor missing.
        """
        raw = self._other_arguments
        if raw in (None, "null", '""'):
            return "{}"
        text = _parse_string(raw or "")
        try:
            return text if text is not None and isinstance(json.loads(text), dict) else None
        except (ValueError, RecursionError):
            return None

    def _take(self, character: str) -> None:
        if self._is_in_string:
            self._take_in_string(character)
        elif character == '"' and self._at in (_At.KEY, _At.VALUE):
            self._is_in_string = True
            self._keep(character)
        elif character not in _OUTSIDE_STRINGS:
            self._at = _At.BROKEN
        elif self._at is _At.VALUE:
            self._take_in_value(character)
        elif not character.isspace():
            self._take_between(character)

    def _take_in_string(self, character: str) -> None:
        self._keep(character)
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_in_string = False
            if self._at is _At.KEY:
                self._end_key()

    def _take_between(self, character: str) -> None:
        """The object's own punctuation."""
        if self._at is _At.BEGINNING and character == "{":
            self._at, self._depth = _At.KEY, 1
        elif self._at is _At.COLON and character == ":":
            self._at = _At.VALUE
        elif self._at is _At.KEY and character == "}":
            self._at = _At.END
        else:
            self._at = _At.BROKEN

    def _take_in_value(self, character: str) -> None:
        if self._depth == 1 and character in ",}]":
            self._end_value(character)
        elif not character.isspace() or (self._part and self._depth > 1):
            self._keep(character)
            self._depth += (character in "{[") - (character in "}]")

    def _keep(self, character: str) -> None:
        if not self._streams:
            self._part.append(character)
            if character != "{" or not self._streams:
                return
            self._fragments = []
        elif self._depth == 1:
            self._at = _At.BROKEN  # something behind the object of arguments
            return
        assert self._fragments is not None
        self.has_begun_arguments = self.has_begun_arguments or (bool(self._fragments) and not character.isspace())
        self._fragments.append(character)

    @property
    def _streams(self) -> bool:
        """Whether the value under way is an object of arguments."""
        return self._at is _At.VALUE and self.keys[-1] in ARGUMENTS_KEYS and self._part[:1] == ["{"]

    def _end_key(self) -> None:
        key = _parse_string("".join(self._part))
        self._part.clear()
        has_arguments = any(known in ARGUMENTS_KEYS for known in self.keys)
        if key is None or key in self.keys or (has_arguments and key in ARGUMENTS_KEYS):
            self._at = _At.BROKEN
            return
        self.keys.append(key)
        self._at = _At.COLON

    def _end_value(self, character: str) -> None:
        raw, key = "".join(self._part), self.keys[-1]
        is_object_of_arguments = self._streams
        self._part.clear()
        if key == NAME_KEY:
            self.name = _parse_string(raw)
        elif key in ARGUMENTS_KEYS and not is_object_of_arguments:
            self._other_arguments = raw
        is_bad = not raw or character == "]" or (key == NAME_KEY and not self.name)
        self._at = _At.BROKEN if is_bad else _At.KEY if character == "," else _At.END


def _parse_string(raw: str) -> str | None:
    """None also for half a surrogate pair, which JSON can write and nobody can write down."""
    try:
        value = json.loads(raw)
        return value.encode().decode() if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None
