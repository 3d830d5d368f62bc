"""What the fakes make of a request for embeddings: vectors that follow from the token ids alone, one a step."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.outputs import RequestOutput
from engine.pooling import Pooling

HIDDEN_SIZE = 8


def expected_vector(prompt_token_ids: list[int], dimensions: int | None = None) -> NDArray[np.float32]:
    """What the fakes answer."""
    return Pooling(dimensions=dimensions).finish(hidden_state(prompt_token_ids))


def hidden_state(prompt_token_ids: list[int]) -> NDArray[np.float32]:
    """`[HIDDEN_SIZE]`, as a child gives it."""
    weights = np.arange(1, len(prompt_token_ids) + 1, dtype=np.float32)
    places = np.arange(1, HIDDEN_SIZE + 1, dtype=np.float32)
    angles = np.outer(np.array(prompt_token_ids, np.float32) * weights, places)
    return np.asarray(np.cos(angles).sum(axis=0), np.float32)


@dataclass
class EmbeddingRequest:
    """As far as `FakeEngine` looks at a request."""

    request_id: str
    prompts: list[list[int]]
    dimensions: int | None
    on_output: Callable[[RequestOutput], None]
    priority: int = 0
    deadline: float | None = None
    cache_key: str = ""
    stored: list[list[int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    open_choices: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [[0] for _ in self.prompts]  # a turn each
        self.num_tokens = [0] * len(self.prompts)
        self.open_choices = list(range(len(self.prompts)))

    @property
    def prompt_token_ids(self) -> list[int]:
        return [token_id for prompt in self.prompts for token_id in prompt]

    def take(self, index: int, token_ids: list[int], *, is_replay: bool = False) -> None:
        self.open_choices = [choice for choice in self.open_choices if choice != index]
        self.on_output(
            RequestOutput(
                request_id=self.request_id,
                index=index,
                token_offset=0,
                token_ids=[],
                text="",
                embedding=expected_vector(self.prompts[index], self.dimensions),
                finish_reason="stop",
                finished=not self.open_choices,
            )
        )
