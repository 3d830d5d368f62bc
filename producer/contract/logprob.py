"""Log-probabilities of tokens as they travel: the model's own, before temperature, penalties, bias and filters."""

from pydantic import BaseModel, ConfigDict


class TopLogprob(BaseModel):
    """One token and the natural logarithm of its probability.

    `bytes` is what the token adds to the text: joined over an answer's tokens they are its text as UTF-8, also where a
    character is cut between tokens. `token` is the same as text, with U+FFFD for part of a character; a special token
    adds no bytes, and `token` is its spelling.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    token_id: int
    token: str
    bytes: list[int]
    logprob: float  # finite; at least MIN_LOGPROB


class TokenLogprob(TopLogprob):
    """A token of an answer or a prompt, and the `top_logprobs` likeliest tokens at its place, the likeliest first."""

    top: list[TopLogprob] = []


class PromptEcho(BaseModel):
    """The prompt as the model read it, for `echo`. The first token has no log-probability: nothing precedes it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None  # aligned with `token_ids`; with `logprobs` alone


MIN_LOGPROB = -9999.0  # what stands for minus infinity, which JSON cannot hold
