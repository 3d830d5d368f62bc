"""What crosses the pipe between the engine's parent and its child: token ids and numbers, one message a step.

The child knows sequences, not requests: each choice of a request is a sequence of its own, with an id that the parent
gave it. Messages are pickled by `multiprocessing.connection` between two processes of one user.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.pooler import PoolingMode
from engine.sampling_params import SamplingParams
from engine.token_logprobs import TokenLogprobs, concatenate


class FinishCode(IntEnum):
    """Why the child ended a sequence. Stop strings are the parent's affair: it aborts the sequence."""

    NONE = 0  # goes on
    STOP = 1  # a stop token
    LENGTH = 2  # max_tokens, or the context is full
    ERROR = 3  # see StepOutput.errors


# From the parent to its child.


@dataclass(frozen=True, slots=True)
class StartCore:
    """The parent's first message: load this core with this configuration."""

    config: EngineConfig
    core_path: str  # "module:class"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddSequence:
    """Start a sequence, or carry on one that already has output tokens (after a crash, or from a stored stream)."""

    sequence_id: int  # increasing: the order of arrival
    prompt_token_ids: list[int]
    params: SamplingParams
    choice_index: int = 0  # keys the noise together with the seed
    output_token_ids: list[int] = field(default_factory=list)
    priority: int = 0  # lower runs first
    deadline: float | None = None  # epoch seconds; among equal priorities the earlier one runs first, None last
    num_scored: int | None = None  # prompt tokens, behind the first, whose logprobs are known; None: not wanted
    group_id: int | None = None  # of the choices of one request: equal ids, one prompt, whose blocks they share
    cache_key: str = ""  # what besides the tokens sets its keys and values apart: other keys, other blocks
    pooling: PoolingMode | None = None  # not None: its prompt's embedding is wanted, and no token


@dataclass(frozen=True, slots=True)
class AbortSequences:
    """Forget these sequences and free their blocks; unknown ids are passed over."""

    sequence_ids: list[int]


@dataclass(frozen=True, slots=True)
class GetStats:
    """Answered by one `EngineStats`."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the child."""


ParentMessage = StartCore | AddSequence | AbortSequences | GetStats | Shutdown

# From the child to its parent.


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """The child is ready: the model is loaded and the cache allocated."""

    model_dir: str  # the folder with tokenizer.json, once a hub id, GGUF file or the demo model is resolved
    device: str
    dtype: str
    attention: str
    max_model_len: int  # tokens
    is_bound_by_cache: bool = False  # max_model_len is all that the KV cache holds: the model has more
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int  # tokens
    num_kv_blocks: int = 0
    fingerprint: str  # weights, dtype, instruction set or GPU, and build: equal fingerprints, equal arithmetic
    is_batch_invariant: bool = False  # a row of logits is the same to the bit whatever is computed beside it
    runs_ahead: bool = False  # a step is computed before the one before it is read
    step_tokens: int | None = None  # in one step, at most, as measured; None: as the configuration says
    few_prefill_tokens: int | None = None  # prompt tokens in one step while few prompts wait; None: as many as ever
    hidden_size: int = 0  # numbers of an embedding
    can_generate: bool = True  # else its checkpoint has no output layer: it embeds


@dataclass(frozen=True, slots=True)
class StartProgress:
    """How far something has come that a start waits for: it has `start_timeout_seconds` from here on."""

    message: str


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The child's only message if the model cannot be loaded; the message names the remedy."""

    message: str


@dataclass(frozen=True, slots=True)
class CoreFailed:
    """The child's last message: loading or a step failed in a way the core cannot handle, and the child ends."""

    message: str


@dataclass(frozen=True, slots=True)
class Begun:
    """Sent before the work starts: if the child dies from now on, these sequences may be why. Those still waiting are
    not."""

    sequence_ids: list[int]
    waiting: tuple[int, ...] = ()  # whose grammars are ready, and who wait from now on


@dataclass(slots=True)  # not frozen: that alone would cost a thirtieth of a small step beside its model
class StepOutput:
    """The tokens of one step: entry i of each array is one token of one sequence. A sequence may stand in several."""

    sequence_ids: NDArray[np.int64]  # [num_outputs]
    token_ids: NDArray[np.int32]  # [num_outputs]
    finish_codes: NDArray[np.int8]  # [num_outputs] of FinishCode
    errors: dict[int, str] = field(default_factory=dict)
    """Sequences that failed alone, with the reason; they stand in no array."""
    cached_tokens: dict[int, int] = field(default_factory=dict)
    """Sequences that began in this step and found this many of their prompt's tokens in the prefix cache (not 0)."""
    logprobs: TokenLogprobs | None = None
    """Of the entries that asked for them; rows are entries."""
    prompt_logprobs: TokenLogprobs | None = None
    """The next tokens of prompts in order; rows are sequence ids."""
    grammar_errors: dict[int, str] = field(default_factory=dict)
    """Sequences whose grammar does not compile, or cannot go on, with the reason; what they gave before counts."""
    embeddings: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """Sequences that ended with what they were for: `[hidden_size]` each, pooled, as the model gave it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Its arrays cross the pipe as bytes: numpy's own way takes twice as long, on both sides."""
        return _read_step_output, (
            self.sequence_ids.astype(np.int64, copy=False).tobytes(),
            self.token_ids.astype(np.int32, copy=False).tobytes(),
            self.finish_codes.astype(np.int8, copy=False).tobytes(),
            self.errors,
            self.cached_tokens,
            self.logprobs,
            self.prompt_logprobs,
            self.grammar_errors,
            self.embeddings,
        )

    @classmethod
    def nothing(cls, errors: dict[int, str] | None = None) -> "StepOutput":
        """No tokens; perhaps sequences that failed."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int8), errors=errors or {})

    @classmethod
    def of_tokens(cls, sequence_id: int, token_ids: list[int], finish_codes: list[FinishCode]) -> "StepOutput":
        """Some tokens of one sequence."""
        return cls(
            sequence_ids=np.full(len(token_ids), sequence_id, np.int64),
            token_ids=np.array(token_ids, np.int32),
            finish_codes=np.array(finish_codes, np.int8),
        )

    def then(self, other: "StepOutput") -> "StepOutput":
        """Both in one, this first."""
        return StepOutput(
            sequence_ids=np.concatenate((self.sequence_ids, other.sequence_ids)),
            token_ids=np.concatenate((self.token_ids, other.token_ids)),
            finish_codes=np.concatenate((self.finish_codes, other.finish_codes)),
            errors=self.errors | other.errors,
            cached_tokens=self.cached_tokens | other.cached_tokens,
            logprobs=concatenate((self.logprobs, other.logprobs and other.logprobs.moved(len(self.sequence_ids)))),
            prompt_logprobs=concatenate((self.prompt_logprobs, other.prompt_logprobs)),
            grammar_errors=self.grammar_errors | other.grammar_errors,
            embeddings=self.embeddings | other.embeddings,
        )


def _read_step_output(sequence_ids: bytes, token_ids: bytes, finish_codes: bytes, *others: Any) -> StepOutput:
    return StepOutput(
        np.frombuffer(sequence_ids, np.int64),
        np.frombuffer(token_ids, np.int32),
        np.frombuffer(finish_codes, np.int8),
        *others,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Scheduler and memory figures at one moment; counters run from the child's start."""

    num_waiting: int = 0
    num_running: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0  # prefilled, recomputation included
    num_generated_tokens: int = 0
    num_kv_blocks: int = 0
    num_kv_blocks_used: int = 0
    num_kv_blocks_free: int = 0  # those that only the prefix cache still holds included
    num_kv_blocks_cached: int = 0  # free, but with content that a later prompt may share
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache instead of computed
    num_draft_tokens: int = 0  # guessed by prompt lookup and computed
    num_accepted_draft_tokens: int = 0  # of these, those that stand in an output

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


ChildMessage = StartProgress | EngineInfo | StartFailed | CoreFailed | Begun | StepOutput | EngineStats
