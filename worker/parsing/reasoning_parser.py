"""Tells what a model thought from its answer: `<think>…</think>` at the beginning of the text of one choice.

A template may open the thought in the prompt; then the text begins inside it. As with calls, what was given out depends
on the text so far alone. White space around the markers is left out.
"""

from enum import Enum
from typing import NamedTuple

from worker.parsing.markers import may_become, num_chars_held

OPENS = "<think>"
CLOSES = "</think>"


class _At(Enum):
    BEGINNING = 1
    THOUGHT_BEGINNING = 2
    THOUGHT = 3
    BEHIND_THOUGHT = 4
    ANSWER = 5


class Split(NamedTuple):
    reasoning: str
    answer: str


class ReasoningParser:
    """One choice's parser."""

    def __init__(self, *, begins_inside: bool) -> None:
        self._at = _At.THOUGHT_BEGINNING if begins_inside else _At.BEGINNING
        self.has_thought: bool | None = True if begins_inside else None
        """None: not known yet."""
        self._unread = ""
        self._reasoning: list[str] = []

    def push(self, text: str) -> Split:
        """What is known now."""
        self._unread += text
        while self._unread and self._step():
            pass
        return self._take(has_answer=self._at is _At.ANSWER)

    def finish(self) -> Split:
        """What is left, once no more text will follow: a thought without an end is a thought."""
        if self._at is _At.THOUGHT:
            self._reasoning.append(self._unread.rstrip())
        self.has_thought = bool(self.has_thought)
        return self._take(has_answer=self._at is _At.BEGINNING)

    def _take(self, *, has_answer: bool) -> Split:
        split = Split("".join(self._reasoning), self._unread if has_answer else "")
        self._reasoning.clear()
        if has_answer:
            self._unread = ""
        return split

    def _step(self) -> bool:
        """Reads on. False: more text is needed, or what is unread is the answer."""
        match self._at:
            case _At.BEGINNING:
                return self._step_at_beginning()
            case _At.THOUGHT_BEGINNING | _At.BEHIND_THOUGHT:
                self._unread = self._unread.lstrip()
                if self._unread:
                    self._at = _At.THOUGHT if self._at is _At.THOUGHT_BEGINNING else _At.ANSWER
                return bool(self._unread)
            case _At.THOUGHT:
                return self._step_in_thought()
            case _At.ANSWER:
                return False

    def _step_at_beginning(self) -> bool:
        text = self._unread.lstrip()
        if may_become(text, OPENS):
            return False
        self.has_thought = text.startswith(OPENS)
        if self.has_thought:
            self._unread = text[len(OPENS) :]
            self._at = _At.THOUGHT_BEGINNING
        else:
            self._at = _At.ANSWER
        return True

    def _step_in_thought(self) -> bool:
        at = self._unread.find(CLOSES)
        num_chars = at if at >= 0 else len(self._unread) - num_chars_held(self._unread, CLOSES)
        thought = self._unread[:num_chars].rstrip()
        self._reasoning.append(thought)
        if at < 0:
            self._unread = self._unread[len(thought) :]
            return False
        self._unread = self._unread[at + len(CLOSES) :]
        self._at = _At.BEHIND_THOUGHT
        return True
