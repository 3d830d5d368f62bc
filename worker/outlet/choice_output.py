"""The output of one choice, and how much of it is in stream entries already. Knows neither ids nor other choices."""

from dataclasses import dataclass, field

from producer.contract import (
    Choice,
    Chunk,
    FinishReason,
    PromptEcho,
    TokenLogprob,
    ToolCallDelta,
    join_deltas,
    merge_deltas,
    plain_chunk_to_wire,
)
from worker.parsing.parsed_text import ParsedText

_LOGPROB_BYTES = 80  # of one token's logprob as JSON, about


@dataclass(slots=True)
class ChoiceOutput:
    """The output of one choice. Only its job's stream changes it."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_reasoning_tokens: int = 0  # of them
    logprobs: list[TokenLogprob] | None = None  # aligned with token_ids, if requested
    prompt: PromptEcho | None = None  # of the first choice, if requested
    finish_reason: FinishReason | None = None
    num_encoded_texts: int = 0
    num_encoded_reasonings: int = 0
    num_encoded_reasoning_tokens: int = 0
    num_encoded_deltas: int = 0
    num_encoded_tokens: int = 0
    is_prompt_encoded: bool = False
    is_finish_encoded: bool = False

    def take(self, parsed: ParsedText) -> None:
        if parsed.text:
            self.text.append(parsed.text)
        if parsed.reasoning:
            self.reasoning.append(parsed.reasoning)
        self.num_reasoning_tokens += parsed.num_reasoning_tokens
        self.tool_calls += parsed.tool_calls
        self.finish_reason = parsed.finish_reason or self.finish_reason

    def take_content(self, text: str, finish_reason: FinishReason | None) -> None:
        """As `take`, for text that is all content."""
        if text:
            self.text.append(text)
        self.finish_reason = finish_reason or self.finish_reason

    def mark_encoded(self) -> None:
        """Note that all output is in entries."""
        self.num_encoded_tokens = len(self.token_ids)
        self.num_encoded_texts = len(self.text)
        self.num_encoded_reasonings = len(self.reasoning)
        self.num_encoded_reasoning_tokens = self.num_reasoning_tokens
        self.num_encoded_deltas = len(self.tool_calls)
        self.is_prompt_encoded = True
        self.is_finish_encoded = self.finish_reason is not None

    def restore(self, chunk: Chunk) -> None:
        """Add a chunk that an earlier attempt stored."""
        self.token_ids += chunk.token_ids
        if chunk.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *chunk.logprobs]
        self.prompt = chunk.prompt or self.prompt
        calls, num_tokens = tuple(chunk.tool_calls or ()), chunk.reasoning_tokens or 0
        self.take(ParsedText(chunk.text, chunk.reasoning or "", calls, chunk.finish_reason, num_tokens))
        self.mark_encoded()

    def agrees_with(self, token_ids: list[int], parsed: ParsedText) -> bool:
        """Whether this worker gets the restored output from the restored tokens, too."""
        return (
            token_ids == self.token_ids
            and parsed.text == "".join(self.text)
            and parsed.reasoning == "".join(self.reasoning)
            and join_deltas(parsed.tool_calls) == join_deltas(self.tool_calls)
            and self.finish_reason in (None, parsed.finish_reason)
        )

    @property
    def is_pending(self) -> bool:
        return (
            self.num_encoded_tokens < len(self.token_ids)
            or self.num_encoded_texts < len(self.text)
            or self.num_encoded_reasonings < len(self.reasoning)
            or self.num_encoded_deltas < len(self.tool_calls)
            or (self.finish_reason is not None and not self.is_finish_encoded)
        )

    @property
    def num_pending_bytes(self) -> int:
        """About how many bytes are in no entry yet."""
        return (
            8 * (len(self.token_ids) - self.num_encoded_tokens)
            + sum(_LOGPROB_BYTES * (1 + len(entry.top)) for entry in (self.logprobs or [])[self.num_encoded_tokens :])
            + sum(len(text) for text in self.text[self.num_encoded_texts :])
            + sum(len(text) for text in self.reasoning[self.num_encoded_reasonings :])
            + sum(len(delta["function"]["arguments"]) for delta in self.tool_calls[self.num_encoded_deltas :])
        )

    def encode(self, job_id: str, index: int) -> str:
        """Encode the output that is in no entry yet as a chunk's JSON, and count it as encoded."""
        offset, finish_reason = self.num_encoded_tokens, None if self.is_finish_encoded else self.finish_reason
        text, token_ids = "".join(self.text[self.num_encoded_texts :]), self.token_ids[offset:]
        prompt = None if self.is_prompt_encoded else self.prompt
        is_content = (
            self.logprobs is None
            and prompt is None
            and self.num_encoded_reasonings == len(self.reasoning)
            and self.num_encoded_reasoning_tokens == self.num_reasoning_tokens
            and self.num_encoded_deltas == len(self.tool_calls)
        )
        if is_content:
            wire = plain_chunk_to_wire(job_id, index, offset, text, token_ids, finish_reason)
        else:
            wire = Chunk(
                job_id=job_id,
                index=index,
                token_offset=offset,
                text=text,
                token_ids=token_ids,
                logprobs=None if self.logprobs is None else self.logprobs[offset:],
                prompt=prompt,
                tool_calls=merge_deltas(self.tool_calls[self.num_encoded_deltas :]) or None,
                reasoning="".join(self.reasoning[self.num_encoded_reasonings :]) or None,
                reasoning_tokens=(self.num_reasoning_tokens - self.num_encoded_reasoning_tokens) or None,
                finish_reason=finish_reason,
            ).to_wire()
        self.mark_encoded()
        return wire

    def as_choice(self, index: int) -> Choice:
        """The choice that joining its entries gives. It must have ended."""
        assert self.finish_reason is not None, "end_choices() comes before choices()"
        return Choice(
            index=index,
            text="".join(self.text),
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            tool_calls=join_deltas(self.tool_calls),
            reasoning="".join(self.reasoning) or None,
        )
