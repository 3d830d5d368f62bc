"""When a sequence of token ids is over: at a stop token, or at its length. Shared by both halves, so that a replay of
stored tokens in the parent ends where the child ended it. Stop strings are `engine.stop_matcher`'s affair."""

from dataclasses import dataclass
from typing import Self

from engine.messages import FinishCode
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRule:
    """Of one request: its choices share it."""

    max_total_tokens: int  # prompt and output; reaching it ends the sequence with LENGTH
    stop_token_ids: tuple[int, ...]  # end of sequence included, unless ignored

    @classmethod
    def of(
        cls, params: SamplingParams, num_prompt_tokens: int, *, max_len: int, eos_token_ids: tuple[int, ...]
    ) -> Self:
        """`max_len`: tokens of prompt and output that fit the context and the cache."""
        # A sequence samples one token at least; that of a request for none is dropped where it arrives.
        wanted = max_len if params.max_tokens is None else num_prompt_tokens + max(params.max_tokens, 1)
        return cls(
            max_total_tokens=min(wanted, max_len),
            stop_token_ids=(
                *(() if params.ignore_eos and params.grammar is None else eos_token_ids),
                *params.stop_token_ids,
            ),
        )

    def code(self, token_id: int, num_tokens: int) -> FinishCode:
        """What an output token means that makes the sequence `num_tokens` long, prompt included."""
        if token_id in self.stop_token_ids:
            return FinishCode.STOP
        return FinishCode.LENGTH if num_tokens >= self.max_total_tokens else FinishCode.NONE
