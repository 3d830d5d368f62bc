"""One sequence: a prompt, what came of it so far, and how to go on. Owns the checks that a sequence can run here.

While a sequence waits it holds its own tokens; while it runs, the row of its slot in `SequenceSlots` does. Knows
nothing of scheduling, of KV blocks beyond the digests of its own, or of text.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.errors import ContextLengthError, InvalidRequestError
from engine.messages import AddSequence, FinishCode
from engine.sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """What the scheduler knows of a sequence, wherever it is."""

    sequence_id: int  # increasing: the order of arrival, kept through preemption
    params: SamplingParams
    choice_index: int
    priority: int  # lower runs first
    num_prompt_tokens: int
    max_total_tokens: int  # prompt and output; reaching it ends the sequence with LENGTH
    stop_token_ids: tuple[int, ...]  # end of sequence included, unless ignored
    token_ids: NDArray[np.int32]  # prompt and output so far; stale while the sequence runs
    slot: int | None = None  # its row in SequenceSlots while it runs
    cache_key: bytes = b""  # whatever besides the tokens changes its keys and values
    block_digests: list[bytes] = field(default_factory=list)  # of its full blocks, as far as somebody asked
    num_indexed_blocks: int = 0  # leading blocks known to the prefix index; of the present slot
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache when it first ran

    @property
    def num_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled; only while it waits."""
        return len(self.token_ids)

    @property
    def initial_finish_code(self) -> FinishCode:
        """STOP or LENGTH if the output it came with is already complete."""
        if self.num_tokens > self.num_prompt_tokens and int(self.token_ids[-1]) in self.stop_token_ids:
            return FinishCode.STOP
        return FinishCode.LENGTH if self.num_tokens >= self.max_total_tokens else FinishCode.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLimits:
    """What any sequence must fit."""

    vocab_size: int
    max_len: int  # tokens of prompt and output that the context and the whole KV cache hold
    eos_token_ids: tuple[int, ...]
    described: str  # where max_len comes from, for the error message


def create_sequence(message: AddSequence, limits: SequenceLimits) -> Sequence:
    """Check a message and make it a sequence.

    Raises `ContextLengthError` if the prompt leaves no room for a single token, `InvalidRequestError` for an empty
    prompt or a token id outside the vocabulary.
    """
    num_prompt_tokens = len(message.prompt_token_ids)
    if not num_prompt_tokens:
        raise InvalidRequestError("prompt must hold at least one token", param="prompt")
    if num_prompt_tokens + 1 > limits.max_len:
        raise ContextLengthError(
            f"prompt has {num_prompt_tokens} tokens and needs room for one more, but {limits.max_len} fit here "
            f"({limits.described}); shorten the prompt or serve the model with more room",
            param="prompt",
        )
    params = message.params
    eos = () if params.ignore_eos else limits.eos_token_ids
    wanted = limits.max_len if params.max_tokens is None else num_prompt_tokens + params.max_tokens
    return Sequence(
        sequence_id=message.sequence_id,
        params=params,
        choice_index=message.choice_index,
        priority=message.priority,
        num_prompt_tokens=num_prompt_tokens,
        max_total_tokens=min(wanted, limits.max_len),
        stop_token_ids=(*eos, *params.stop_token_ids),
        token_ids=_checked_tokens(message, limits.vocab_size),
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
