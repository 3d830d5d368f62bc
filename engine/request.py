"""One request as the parent follows it: its choices, each with its tokens, its detokeniser and its stop strings.

A request for embeddings has a prompt for each of its choices, and no tokens. Knows neither child nor other requests.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.detokenizer import Detokenizer
from engine.finish_rule import FinishRule
from engine.messages import AddSequence, FinishCode
from engine.outputs import ErrorKind, FinishReason, OnOutput, RequestOutput, TokenLogprob
from engine.pooling import Pooling
from engine.sampling_params import SamplingParams
from engine.stop_matcher import StopMatcher
from engine.token_bytes import TokenBytes
from engine.token_logprobs import TokenLogprobs

FINISH_REASONS: dict[int, FinishReason] = {FinishCode.STOP: "stop", FinishCode.LENGTH: "length"}
_STOP = int(FinishCode.STOP)  # an enumeration's member takes several times as long to reach


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a choice is over."""

    reason: FinishReason
    error: str | None = None
    error_kind: ErrorKind | None = None


class Request:
    """Its open choices, in order; the supervisor's thread alone changes it."""

    __slots__ = (
        "cache_key",
        "deadline",
        "finish_rule",
        "is_running",
        "lead",
        "num_cached_tokens",
        "on_output",
        "open_choices",
        "params",
        "pooling",
        "priority",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        pooling: Pooling | None = None,
        priority: int,
        deadline: float | None = None,
        cache_key: str = "",
        finish_rule: FinishRule,
        output_token_ids: Sequence[Sequence[int]] = (),
        on_output: OnOutput,
        token_bytes: TokenBytes,
    ) -> None:
        """`prompts`: token ids, one prompt a choice: the same, or with `pooling` of each what is to be embedded.

        `output_token_ids`: what each choice already has; choices beyond its length have nothing.
        """
        self.request_id = request_id
        self.params = params
        self.pooling = pooling
        self.priority = priority
        self.deadline = deadline
        self.cache_key = cache_key
        self.finish_rule = finish_rule
        self.on_output = on_output
        self.open_choices = [Choice(self, index, prompt, token_bytes) for index, prompt in enumerate(prompts)]
        for choice, token_ids in zip(self.open_choices, output_token_ids, strict=False):
            choice.to_replay = list(token_ids)
            if token_ids:
                choice.prompt_logprobs = None  # they were reported before these tokens
        self.lead: Choice | None = None  # the first to run, whose prompt the others share
        self.num_cached_tokens = 0  # that the lead found: what the request as a whole did not have to compute
        self.is_running = False  # the present child knows its sequences

    @property
    def num_deaths(self) -> int:
        """Of the child, in a row: the largest number of any open choice."""
        return max((choice.num_deaths for choice in self.open_choices), default=0)

    def messages(self) -> Iterator[AddSequence]:
        """What starts its open choices in the child, or carries them on."""
        for choice in self.open_choices:
            yield AddSequence(
                sequence_id=choice.sequence_id,
                prompt_token_ids=choice.prompt,
                params=self.params,
                choice_index=choice.index,
                output_token_ids=list(choice.token_ids),  # the message is pickled on another thread
                priority=self.priority,
                deadline=self.deadline,
                num_scored=None if choice.prompt_logprobs is None else len(choice.prompt_logprobs) - 1,
                group_id=choice.sequence_id - choice.index if self.params.n > 1 else None,  # the first choice's
                cache_key=self.cache_key,
                pooling=None if self.pooling is None else self.pooling.mode,
            )


class Choice:
    """One answer: one sequence of the child."""

    __slots__ = (
        "detokenizer",
        "had_begun",
        "index",
        "is_at_risk",
        "new_logprobs",
        "new_texts",
        "num_cached_tokens",
        "num_deaths",
        "num_delivered",
        "num_replayed",
        "prompt",
        "prompt_logprobs",
        "request",
        "sequence_id",
        "stop_matcher",
        "to_replay",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, prompt: list[int], token_bytes: TokenBytes) -> None:
        self.request = request
        self.index = index
        self.prompt = prompt
        self.num_cached_tokens = 0  # of it
        self.is_at_risk = False  # the present child has begun to work on it
        self.had_begun = False  # when the present child was given it: its prompt was computed before
        self.num_deaths = 0  # of the child while this ran, in a row, without a new token of its own
        self.sequence_id = -1  # given on arrival
        self.token_ids: list[int] = []
        self.num_delivered = 0  # of them
        self.new_texts: list[str] = []  # not delivered
        self.new_logprobs: list[TokenLogprob] = []  # likewise, where they are wanted
        self.to_replay: list[int] = []  # tokens it came with, until they are replayed
        self.num_replayed = 0
        # So far, if they are wanted; the first choice reports them, with its first output.
        wants_prompt = request.params.prompt_logprobs is not None and index == 0
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if wants_prompt else None
        self.detokenizer = Detokenizer(token_bytes, prompt)
        self.stop_matcher = StopMatcher(request.params.stop) if request.params.stop else None

    def accept(self, token_id: int, code: int) -> FinishReason | None:
        """Takes a token and the text it releases; why the choice ends with it. A stop token has no text."""
        self.token_ids.append(token_id)
        text = "" if code == _STOP else self.detokenizer.push(token_id)
        if self.stop_matcher is not None:
            text = self.stop_matcher.push(text, may_end=len(self.token_ids) >= self.request.params.min_tokens)
            if self.stop_matcher.is_matched:
                self.new_texts.append(text)
                return "stop"
        if text:
            self.new_texts.append(text)
        if not code:
            return None
        self.release()
        return FINISH_REASONS[code]

    def replay(self) -> FinishReason | None:
        """Takes the tokens it came with as if they came from the child, up to the one that ends it."""
        reason: FinishReason | None = None
        rule, num_prompt_tokens = self.request.finish_rule, len(self.prompt)
        for count, token_id in enumerate(self.to_replay, start=1):
            reason = self.accept(token_id, rule.code(token_id, num_prompt_tokens + count))
            if reason is not None:
                break
        self.to_replay = []
        self.num_replayed = len(self.token_ids)
        return reason

    @property
    def has_begun(self) -> bool:
        """Whether a child has given it a token."""
        return len(self.token_ids) > self.num_replayed

    def release(self) -> None:
        """Takes the text held back, once no more will follow: it is no stop string."""
        if self.stop_matcher is not None:
            self.new_texts.append(self.stop_matcher.flush())

    def accept_prompt(self, logprobs: TokenLogprobs, entry: int) -> None:
        """Takes the log-probabilities of the prompt's next token."""
        known, num_top = self.prompt_logprobs, self.request.params.prompt_logprobs
        if known is not None and num_top is not None and len(known) < len(self.prompt):
            known.append(_token_logprob(self.prompt[len(known)], logprobs, entry, num_top))

    def accept_logprob(self, token_id: int, logprobs: TokenLogprobs | None, entry: int | None) -> None:
        """Takes those of one token, where they are wanted."""
        num_top = self.request.params.logprobs
        if logprobs is not None and entry is not None and num_top is not None:
            self.new_logprobs.append(_token_logprob(token_id, logprobs, entry, num_top))

    def output(
        self, ending: Ending | None, *, is_replay: bool = False, embedding: NDArray[np.float32] | None = None
    ) -> RequestOutput:
        """What is new for the caller: tokens since the last output, perhaps the end."""
        token_offset, self.num_delivered = self.num_delivered, len(self.token_ids)
        text, self.new_texts = "".join(self.new_texts), []
        logprobs: list[TokenLogprob] | None = None
        if self.request.params.logprobs is not None and not is_replay:
            logprobs, self.new_logprobs = self.new_logprobs, []
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        if prompt_logprobs is not None and len(prompt_logprobs) < len(self.prompt):
            prompt_logprobs = None  # it ended before its prompt was computed
        return RequestOutput(
            request_id=self.request.request_id,
            index=self.index,
            token_offset=token_offset,
            token_ids=self.token_ids[token_offset:],
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=ending.reason if ending else None,
            error=ending.error if ending else None,
            error_kind=ending.error_kind if ending else None,
            finished=not self.request.open_choices,
            num_cached_tokens=self.num_cached_tokens if self.request.pooling else self.request.num_cached_tokens,
            is_replay=is_replay,
            embedding=embedding,
        )


def _token_logprob(token_id: int, logprobs: TokenLogprobs, entry: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token_id, float(logprobs.logprobs[entry]), logprobs.top(entry, num_top))
