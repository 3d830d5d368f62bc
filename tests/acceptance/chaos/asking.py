"""How a client asks gateways of which any may be away: one of them, and again, until it has its answer."""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

from tests.fakes.fake_tokenizer import VOCAB_SIZE, FakeTokenizer, text_of

REQUEST_SECONDS = 30.0
PAUSE_SECONDS = 0.3

Ask = Callable[[str], httpx.Response]  # given the gateway's URL


class RunIsOverError(Exception):
    """Nothing more is asked."""


@dataclass(slots=True)
class Asking:
    """`run` is for a thread of its own; what went wrong is in `problems`."""

    name: str
    urls: Sequence[str]
    is_over: threading.Event
    rng: random.Random
    keeps_all: bool = True
    """Whether what Redis has acknowledged stays: else what was seen may be taken back."""
    problems: list[str] = field(default_factory=list)

    def run(self) -> None:
        try:
            with httpx.Client(timeout=REQUEST_SECONDS) as client:
                self.go(client)
        except RunIsOverError:
            self.problems.append("came to no end")
        except Exception as error:  # of any type: it is what this run looks for
            self.problems.append(repr(error))

    def go(self, client: httpx.Client) -> None:
        raise NotImplementedError

    @property
    def has_begun(self) -> bool:
        """Whether what it waits for has been made."""
        raise NotImplementedError

    def until(self, ask: Ask, *statuses: int) -> dict[str, Any]:
        """The body of the first answer with one of these. Raises AssertionError for one that says: never."""
        while True:
            answer = self.ask(ask)
            if answer is not None and answer.status_code in (statuses or (200,)):
                return dict(answer.json())
            if answer is not None and answer.status_code < 500 and answer.status_code not in (408, 429):
                raise AssertionError(f"{answer.status_code} {answer.text}")
            self.pause()

    def ask(self, ask: Ask) -> httpx.Response | None:
        """None: nobody knows what became of it."""
        try:
            return ask(self.rng.choice(self.urls))
        except httpx.TransportError:
            return None

    def pause(self) -> None:
        if self.is_over.wait(PAUSE_SECONDS):
            raise RunIsOverError


def answer_text(body: dict[str, Any], index: int = 0) -> str:
    """What the fake engine says to a completion with a seed."""
    first = sum(FakeTokenizer().encode(body["prompt"])) + int(body["seed"]) + 31 * index
    return text_of([(first + 7 * at) % VOCAB_SIZE for at in range(body["max_tokens"])])
