"""How many tokens a step may compute: what is left for prompts beside its decodes, and less after a memory shortage.

Knows nothing of who runs.
"""

TOKENS_A_WAITING_PROMPT = 16  # of a step, where that is more than `few_prefill_tokens`
STEPS_TO_RECOVER = 64  # steps without a memory shortage after which a reduced budget doubles


class TokenBudget:
    """`max_num_tokens` a step at most; `few_prefill_tokens`: prompt tokens while few prompts wait, None: no fewer."""

    def __init__(self, max_num_tokens: int, few_prefill_tokens: int | None) -> None:
        self._max_num_tokens = max_num_tokens
        self._few_prefill_tokens = few_prefill_tokens
        self._num_tokens = max_num_tokens
        self._steps_since_shortage = 0

    def prefill_tokens(self, *, num_decodes: int, num_prompts: int) -> int:
        """Prompt tokens of a step beside its decodes; num_prompts: that wait, or have begun."""
        left = max(0, self._num_tokens - num_decodes)
        if self._few_prefill_tokens is None:
            return left
        return min(left, max(self._few_prefill_tokens, num_prompts * TOKENS_A_WAITING_PROMPT))

    def reduce(self, num_tokens: int, *, num_decodes: int) -> None:
        """So many tokens did not fit the device: half as many from now on, and the way up is felt again."""
        self._num_tokens = max(num_decodes + 1, num_tokens // 2)
        self._steps_since_shortage = 0

    def recover(self) -> None:
        """A step begins."""
        if self._num_tokens < self._max_num_tokens:
            self._steps_since_shortage += 1
            if self._steps_since_shortage % STEPS_TO_RECOVER == 0:
                self._num_tokens = min(self._max_num_tokens, 2 * self._num_tokens)
