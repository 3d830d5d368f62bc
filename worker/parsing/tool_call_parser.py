"""Tells the calls of tools from the content of one choice, as its text comes in.

A call is JSON behind a marker (`<tool_call>`, `<|python_tag|>`) or, where a model writes them so, at the very beginning
of its answer. What was given out after any piece of text depends on the text so far alone, never on how it was cut:
replaying the text replays the parser. What looks like a call and is none comes back as content, to the character;
only the white space around calls, and their markers, are left out. Knows nothing of tokens.
"""

import string
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from producer.contract import ToolCallDelta
from producer.contract.tool_call import CalledFunctionDelta
from worker.parsing.call_scanner import CallScanner
from worker.parsing.markers import may_become, num_chars_held


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How a family of models writes calls."""

    name: str
    opens: str
    closes: str | None  # models leave it out at the end of the answer
    arguments_key: str
    may_be_bare: bool  # a call needs no marker at the beginning of the answer, nor behind another call
    separators: str  # between calls, beside white space


HERMES = ToolCallFormat("hermes", "<tool_call>", "</tool_call>", "arguments", may_be_bare=False, separators="")
LLAMA = ToolCallFormat("llama", "<|python_tag|>", None, "parameters", may_be_bare=True, separators=";")

_BARE_KEYS = frozenset({"type", "id", "name", "arguments", "parameters"})
"""An object that stands in the answer without a marker is a call only if it has no others."""


class _At(Enum):
    BEGINNING = 1
    CONTENT = 2
    CALL = 3
    BEHIND_CALL = 4


class CallSplit(NamedTuple):
    content: str
    deltas: list[ToolCallDelta]


class ToolCallParser:
    """One choice's parser. `call_id` gives the id of the call of a number."""

    def __init__(
        self,
        call_format: ToolCallFormat,
        *,
        tool_names: Collection[str],
        call_id: Callable[[int], str],
        max_calls: int | None = None,
        is_forced: bool = False,
    ) -> None:
        """Calls beyond `max_calls` are left out. Without a marker only calls of `tool_names` count. `is_forced`: there
        is nothing but calls, so that the beginning of one that was cut off is no content."""
        self._format = call_format
        self._tool_names = tool_names
        self._call_id = call_id
        self._max_calls = max_calls
        self._is_forced = is_forced
        self._at = _At.BEGINNING if call_format.may_be_bare else _At.CONTENT
        self._unread = ""
        self._scanner = CallScanner()
        self._held = ""  # of the call under way, as it was written: content again, if it is none
        self._num_lead_chars = 0  # of these, its marker and what stands before it
        self._is_marked = False
        self._has_begun = False  # the name of the call under way was given out
        self._is_left_out = False
        self._is_closed = False
        self._has_content = False
        self._text: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self.num_calls = 0
        self.is_cut_off = False  # a call has no end

    def push(self, text: str) -> CallSplit:
        """What is known now."""
        self._unread += text
        while self._unread and self._step():
            pass
        return self._take()

    def finish(self) -> CallSplit:
        """What is left, once no more text will follow."""
        if self._at is _At.CALL and (self._has_begun or self._is_forced):
            self._note_cut_off()
        elif self._is_forced:
            pass  # a part of a marker
        elif self._at is _At.BEHIND_CALL:
            rest = self._unread.lstrip(self._gap)
            is_closing = self._format.closes is not None and self._format.closes.startswith(rest)
            self._add_content("" if is_closing else rest)
        else:
            self._add_content(self._held + self._unread)
        self._held = self._unread = ""
        return self._take()

    def _take(self) -> CallSplit:
        split = CallSplit("".join(self._text), self._deltas)
        self._text, self._deltas = [], []
        return split

    def _step(self) -> bool:
        """Reads on. False: more text is needed."""
        match self._at:
            case _At.BEGINNING:
                return self._step_at_beginning()
            case _At.CONTENT:
                return self._step_in_content()
            case _At.CALL:
                return self._step_in_call()
            case _At.BEHIND_CALL:
                return self._step_behind_call()

    def _step_at_beginning(self) -> bool:
        text = self._unread.lstrip()
        if not text:
            return False
        if text[0] == "{":
            self._begin(len(self._unread) - len(text), is_marked=False)
        else:
            self._at = _At.CONTENT
        return True

    def _step_in_content(self) -> bool:
        at = self._unread.find(self._format.opens)
        num_content_chars = at if at >= 0 else len(self._unread) - num_chars_held(self._unread, self._format.opens)
        content = self._unread[:num_content_chars].rstrip()  # white space before a call is left out
        self._add_content(content)
        self._unread = self._unread[len(content) :]
        if at < 0:
            return False
        self._begin(at - len(content) + len(self._format.opens), is_marked=True)
        return True

    def _begin(self, num_lead_chars: int, *, is_marked: bool) -> None:
        """What is read next may be a call."""
        self._held = self._unread[:num_lead_chars]
        self._unread = self._unread[num_lead_chars:]
        self._num_lead_chars = num_lead_chars
        self._is_marked = is_marked
        self._scanner = CallScanner()
        self._has_begun = self._is_closed = False
        self._at = _At.CALL

    def _step_in_call(self) -> bool:
        num_read = self._scanner.feed(self._unread)
        if not self._has_begun:
            self._held += self._unread[:num_read]
        self._unread = self._unread[num_read:]
        is_over = self._scanner.is_complete or self._scanner.is_broken
        if not self._has_begun and self._looks_like_a_call():
            self._give_name()
        if self._has_begun:
            self._give_arguments()
        if is_over and self._has_begun:
            self._end()
        elif is_over or not (self._has_begun or self._looks_like_a_call()):
            self._reread_as_content()
        return bool(self._unread)

    def _looks_like_a_call(self) -> bool:
        name, keys = self._scanner.name, self._scanner.keys
        return self._is_marked or (_BARE_KEYS.issuperset(keys) and (name is None or name in self._tool_names))

    def _give_name(self) -> None:
        """Where name and arguments are known to be there: from here on it is a call, whatever follows."""
        name, arguments = self._scanner.name, ""
        if self._scanner.is_complete and not self._scanner.has_begun_arguments:
            arguments = self._scanner.resolve_arguments() or ""
        if not name or not (arguments or self._scanner.has_begun_arguments):
            return
        self._held = ""
        self._has_begun = True
        self._is_left_out = self._max_calls is not None and self.num_calls >= self._max_calls
        if not self._is_left_out:
            index = self.num_calls
            self.num_calls += 1
            function: CalledFunctionDelta = {"name": name, "arguments": arguments}
            self._deltas.append({"index": index, "id": self._call_id(index), "type": "function", "function": function})

    def _give_arguments(self) -> None:
        fragment = self._scanner.take_arguments()
        if fragment and not self._is_left_out:
            self._deltas.append({"index": self.num_calls - 1, "function": {"arguments": fragment}})

    def _end(self) -> None:
        if self._scanner.is_broken:
            self._note_cut_off()
        self._at = _At.BEHIND_CALL

    def _note_cut_off(self) -> None:
        self.is_cut_off = self.is_cut_off or not self._is_left_out

    def _reread_as_content(self) -> None:
        """With what stands before it, its marker too; behind that there may be another one."""
        self._add_content(self._held[: self._num_lead_chars])
        self._unread = self._held[self._num_lead_chars :] + self._unread
        self._held = ""
        self._at = _At.CONTENT

    def _step_behind_call(self) -> bool:
        text = self._unread.lstrip(self._gap)
        num_gap_chars = len(self._unread) - len(text)
        opens, closes = self._format.opens, None if self._is_closed else self._format.closes
        if may_become(text, opens) or (closes and may_become(text, closes)):
            return False
        if closes and text.startswith(closes):
            self._unread = text[len(closes) :]
            self._is_closed = True
        elif text.startswith(opens):
            self._begin(num_gap_chars + len(opens), is_marked=True)
        elif self._format.may_be_bare and text[0] == "{":
            self._begin(num_gap_chars, is_marked=False)
        else:
            self._unread = self._unread if self._has_content else text
            self._at = _At.CONTENT
        return True

    @property
    def _gap(self) -> str:
        """What may stand between calls."""
        return string.whitespace + self._format.separators

    def _add_content(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._has_content = True
