"""What callers of the engine receive: values only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineDiedError, EngineError, EngineNotRunningError, InvalidRequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]

ErrorKind = Literal["refused", "grammar", "poison", "died", "stopped"]
"""Why a request ended with `error`.

- `refused`: the core refused or failed this request alone;
- `grammar`: its grammar does not compile or cannot go on;
- `poison`: the engine's process died three times in a row while it ran, without a new token for it;
- `died`: the engine's process cannot be started again;
- `stopped`: the engine was stopped.

The last two may be tried again elsewhere."""


class TokenLogprob(NamedTuple):
    """A token under the model's own distribution: before temperature, penalties, bias and filters."""

    token_id: int
    logprob: float  # natural logarithm
    top: list[tuple[int, float]]  # the likeliest tokens at its place and their logprobs, the likeliest first


@dataclass(slots=True, kw_only=True)  # not frozen: making one would take four times as long
class RequestOutput:
    """What one message of the child meant for one choice: new tokens, the text they released, perhaps the end.

    Joining `text`, `token_ids` and `logprobs` over a choice's outputs gives its whole answer. A token whose text is
    held back (half a character, the beginning of a stop string) stands in `token_ids` at once; its text comes later.

    A choice that was submitted with output tokens first gets one output with `is_replay`: those tokens, the text they
    release and, if they complete the choice, its end. Tokens beyond that end are not taken.
    """

    request_id: str
    index: int  # the choice
    token_offset: int  # the choice's tokens before these
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None  # of `token_ids`; None: not asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with choice 0's first; the first token has none
    finish_reason: FinishReason | None = None  # of this choice
    error: str | None = None
    error_kind: ErrorKind | None = None
    finished: bool = False  # the whole request: every choice has ended, and this is its last output
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache instead of being computed
    embedding: NDArray[np.float32] | None = None  # of prompt number `index`, where that was asked for, with its end
    is_replay: bool = False  # these tokens came with the request


OnOutput: TypeAlias = Callable[[RequestOutput], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutput:
    """One finished choice of a request. `text` ends before a stop string or stop token; `token_ids` include it."""

    request_id: str
    index: int  # the choice, below `SamplingParams.n`
    text: str
    token_ids: list[int]
    finished: bool
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprob] | None = None  # of `token_ids`; None: not asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  # of choice 0; the first token has none
    error: str | None = None
    error_kind: ErrorKind | None = None


def raise_for_error(output: RequestOutput | GenerationOutput) -> None:
    """Raises `EngineDiedError`, `EngineNotRunningError` or `EngineError` if the choice ended with an error."""
    if output.error_kind is not None:
        raise _ERRORS[output.error_kind](f"request {output.request_id}: {output.error}")


_ERRORS: dict[ErrorKind, type[EngineError]] = {
    "refused": EngineError,
    "grammar": InvalidRequestError,
    "poison": EngineDiedError,
    "died": EngineDiedError,
    "stopped": EngineNotRunningError,
}
