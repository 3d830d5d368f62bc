"""How one request samples: values only, checked on construction."""

from dataclasses import dataclass
from math import isfinite

from engine.field_types import check_field_types, require
from engine.grammar_spec import GrammarSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. The order of filters is temperature, then min-p, top-k, top-p.

    `temperature` 0 is greedy. `top_k` None is off. `max_tokens` None runs until the context is full.
    `seed` keys the noise together with choice, position and token id, so that equal seeds give equal outputs
    whatever shares the batch. `grammar` is what the output must be a sentence of; `ignore_eos` has no effect on where a
    grammar ends. Raises `InvalidRequestError` naming the field.
    """

    max_tokens: int | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1", self.max_tokens)
        require(self.n >= 1, "n", "must be at least 1", self.n)
        require(
            isfinite(self.temperature) and self.temperature >= 0, "temperature", "must be 0 or more", self.temperature
        )
        require(0 < self.top_p <= 1, "top_p", "must lie in (0, 1]", self.top_p)
        require(self.top_k is None or self.top_k >= 1, "top_k", "must be at least 1, or None for off", self.top_k)
        require(0 <= self.min_p <= 1, "min_p", "must lie in [0, 1]", self.min_p)
        require(all(self.stop), "stop", "must not hold an empty string", self.stop)
