"""How one request samples: values only, checked on construction."""

from dataclasses import dataclass
from typing import Any

from engine.field_types import check_field_types, require
from engine.grammar_spec import GrammarSpec

MAX_LOGPROBS = 20  # alternatives a token
MAX_STOP_CHARS = 1 << 16  # of all stop strings
MAX_TEMPERATURE = 1000  # with which all tokens are equally likely, nearly


def has_filter(top_p: Any, top_k: Any, min_p: Any) -> Any:
    """Whether a token is drawn from fewer than all: elementwise, of arrays or tensors. A top_k that is off is 0."""
    return (top_p < 1) | (top_k > 0) | (min_p > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request.

    What changes the distribution is applied in this order: `logit_bias`, `repetition_penalty` (over prompt and output),
    `frequency_penalty` and `presence_penalty` (over the output), `min_tokens`, temperature, min-p, top-k, top-p. All
    of it is a pure function of the tokens so far. Log-probabilities are the model's own, before any of it.

    `temperature` 0 is greedy. `top_k` None is off. `max_tokens` None runs until the context is full; 0 computes the
    prompt and gives no token. `seed` keys the noise together with choice, position and token id, so that equal seeds
    give equal outputs whatever shares the batch. `grammar` is what the output must be a sentence of; `ignore_eos` has
    no effect on where a grammar ends. Raises `InvalidRequestError` naming the field.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    """No stop token is sampled, and no stop string ends the answer, before it has so many tokens."""
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that occurs in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each occurrence in the output."""
    repetition_penalty: float = 1.0
    """The logit of every token of prompt and output is divided by this if positive, else multiplied; 1 is off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    logprobs: int | None = None
    """Report each token's log-probability, and those of this many likeliest tokens; None is off."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, with choice 0. Such a prompt is computed whole, without the prefix cache."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    visible_token_ids: tuple[int, ...] = ()
    """Special tokens that appear in the text as they are spelt; the others add nothing to it."""
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "must be at least 0", self.max_tokens)
        require(self.min_tokens >= 0, "min_tokens", "must be at least 0", self.min_tokens)
        limit = f"must be at most max_tokens ({self.max_tokens})"
        require(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", limit, self.min_tokens)
        are_ids = all(token_id >= 0 for token_id in self.visible_token_ids)
        require(are_ids, "visible_token_ids", "must be token ids", self.visible_token_ids)
        require(self.n >= 1, "n", "must be at least 1", self.n)
        _require_in(self.temperature, "temperature", 0, MAX_TEMPERATURE)
        require(0 < self.top_p <= 1, "top_p", "must lie in (0, 1]", self.top_p)
        require(self.top_k is None or self.top_k >= 1, "top_k", "must be at least 1, or None for off", self.top_k)
        _require_in(self.min_p, "min_p", 0, 1)
        require(all(self.stop), "stop", "must not hold an empty string", self.stop)
        is_short = sum(map(len, self.stop)) <= MAX_STOP_CHARS
        require(is_short, "stop", f"must have at most {MAX_STOP_CHARS} characters in all", self.stop)
        require(not (self.min_tokens and self.grammar), "min_tokens", "must be 0 with a grammar", self.min_tokens)
        _require_in(self.presence_penalty, "presence_penalty", -2, 2)
        _require_in(self.frequency_penalty, "frequency_penalty", -2, 2)
        _require_in(self.repetition_penalty, "repetition_penalty", 0.01, 100)
        _require_in(self.logprobs, "logprobs", 0, MAX_LOGPROBS)
        _require_in(self.prompt_logprobs, "prompt_logprobs", 0, MAX_LOGPROBS)
        ids = [token_id for token_id, _ in self.logit_bias]
        require(len(set(ids)) == len(ids), "logit_bias", "must name each token id once", self.logit_bias)
        for token_id, bias in self.logit_bias:
            require(token_id >= 0, "logit_bias", "must name token ids, from 0 on", token_id)
            require(-100 <= bias <= 100, "logit_bias", "must lie in [-100, 100]", bias)


def _require_in(value: float | None, param: str, low: float, high: float) -> None:
    require(value is None or low <= value <= high, param, f"must lie in [{low}, {high}]", value)
