"""One sequence: a prompt, what came of it so far, and how to go on. Owns the checks that a sequence can run here.

While a sequence waits it holds its own tokens; while it runs, the row of its slot in `SequenceSlots` does. Knows
nothing of scheduling, of KV blocks beyond the digests of its own, or of text.
"""

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import ContextLengthError, InvalidRequestError
from engine.finish_rule import FinishRule
from engine.messages import AddSequence, FinishCode, StepOutput
from engine.pooler import Pooler
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.grammar.matcher import GrammarMatcher
    from engine.prompt_lookup.drafter import Drafter


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """What the scheduler knows of a sequence, wherever it is."""

    sequence_id: int  # increasing: the order of arrival, kept through preemption
    params: SamplingParams
    choice_index: int
    priority: int  # lower runs first
    deadline: float = inf  # epoch seconds; among equal priorities the earlier one runs first
    num_prompt_tokens: int
    finish_rule: FinishRule
    token_ids: NDArray[np.int32]  # prompt and output so far; stale while the sequence runs
    slot: int | None = None  # its row in SequenceSlots while it runs
    drafter: "Drafter | None" = None  # None: it is not to be guessed
    grammar: "GrammarMatcher | None" = None  # its place in it; moves with the tokens
    group_id: int | None = None  # sequences of one group have one prompt and share its blocks
    cache_key: str = ""  # sequences of different keys share no blocks
    block_digests: list[bytes] = field(default_factory=list)  # of its full blocks, as far as somebody asked
    num_indexed_blocks: int = 0  # leading blocks known to the prefix index; of the present slot
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache when it first ran
    early_stop_ids: tuple[int, ...] = ()  # the stop tokens that min_tokens rules out at first
    num_to_score: int = 0  # leading prompt positions from which the log-probability of the next token is wanted
    num_scored: int = 0  # of them, those that were reported; stale while the sequence runs
    pooler: Pooler | None = None  # of one whose embedding is wanted: it ends with its prompt, and samples nothing

    @property
    def num_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled; only while it waits."""
        return len(self.token_ids)

    @property
    def num_findable(self) -> int:
        """Leading tokens that need not be computed where their keys and values are found: nothing else is wanted of
        them. The last one always is, for its logits or its hidden state. Only while it waits."""
        if self.num_scored < self.num_to_score:
            return self.num_scored
        return min(self.num_tokens - 1, self.num_tokens if self.pooler is None else self.pooler.num_passed)

    def report(self, token_ids: list[int], num_tokens: int) -> StepOutput:
        """Output tokens that follow its first `num_tokens`, up to the one that ends it."""
        codes: list[FinishCode] = []
        for token_id in token_ids:
            codes.append(self.finish_rule.code(token_id, num_tokens + len(codes) + 1))
            if codes[-1] != FinishCode.NONE:
                break
        return StepOutput.of_tokens(self.sequence_id, token_ids[: len(codes)], codes)

    def extend(self, token_ids: list[int]) -> StepOutput:
        """Append output tokens, up to the one that ends it, and report them. Only while it waits."""
        taken = self.report(token_ids, self.num_tokens)
        self.token_ids = np.concatenate((self.token_ids, taken.token_ids))
        return taken

    @property
    def urgency(self) -> tuple[int, float, int]:
        """The order of everything: the lowest is the most urgent. The last part, arrival, makes it total."""
        return self.priority, self.deadline, self.sequence_id

    def is_before(self, other: "Sequence") -> bool:
        """Whether it may take the other's place: arrival alone is no reason."""
        return (self.priority, self.deadline) < (other.priority, other.deadline)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLimits:
    """What any sequence must fit."""

    vocab_size: int
    max_len: int  # tokens of prompt and output that the context and the whole KV cache hold
    eos_token_ids: tuple[int, ...]
    described: str  # where max_len comes from, for the error message


def create_sequence(message: AddSequence, limits: SequenceLimits) -> Sequence:
    """Check a message and make it a sequence.

    Raises `ContextLengthError` if the prompt leaves no room for a single token, where one is wanted,
    `InvalidRequestError` for an empty prompt, a token id outside the vocabulary, or output that is complete already.
    """
    num_prompt_tokens = len(message.prompt_token_ids)
    if not num_prompt_tokens:
        raise InvalidRequestError("prompt must hold at least one token", param="prompt")
    num_more = 1 if message.pooling is None else 0
    if num_prompt_tokens + num_more > limits.max_len:
        raise ContextLengthError(
            f"prompt has {num_prompt_tokens} tokens{' and needs room for one more' if num_more else ''}, but "
            f"{limits.max_len} fit here ({limits.described}); shorten the prompt or serve the model with more room",
            param="prompt",
        )
    token_ids = _checked_tokens(message, limits.vocab_size)
    rule = FinishRule.of(message.params, num_prompt_tokens, max_len=limits.max_len, eos_token_ids=limits.eos_token_ids)
    if message.output_token_ids and rule.code(message.output_token_ids[-1], len(token_ids)) is not FinishCode.NONE:
        raise InvalidRequestError(
            f"sequence {message.sequence_id} comes with all the output it may have", param="output_token_ids"
        )
    return Sequence(
        sequence_id=message.sequence_id,
        params=message.params,
        choice_index=message.choice_index,
        priority=message.priority,
        deadline=inf if message.deadline is None else message.deadline,
        num_prompt_tokens=num_prompt_tokens,
        finish_rule=rule,
        group_id=message.group_id,
        cache_key=message.cache_key,
        token_ids=token_ids,
        early_stop_ids=tuple(i for i in rule.stop_token_ids if 0 <= i < limits.vocab_size)
        if message.params.min_tokens
        else (),
        num_to_score=0 if message.num_scored is None else num_prompt_tokens - 1,
        num_scored=message.num_scored or 0,
        pooler=None if message.pooling is None else Pooler(message.pooling, num_prompt_tokens),
    )


def _checked_tokens(message: AddSequence, vocab_size: int) -> NDArray[np.int32]:
    token_ids = np.array([*message.prompt_token_ids, *message.output_token_ids], dtype=np.int64)
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"prompt holds token id {wrong}, which is not in the model's vocabulary of {vocab_size}", param="prompt"
        )
    return token_ids.astype(np.int32)
