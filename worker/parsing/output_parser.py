"""One choice's text in, content, reasoning and calls out. Knows nothing of jobs or Redis."""

from collections.abc import Sequence

from producer.contract import FinishReason
from worker.parsing.parsed_text import ParsedText
from worker.parsing.reasoning_parser import ReasoningParser
from worker.parsing.thought_tokens import ThoughtTokens
from worker.parsing.tool_call_parser import ToolCallParser


class OutputParser:
    """A pure stage: joining what it gives depends on the whole text alone."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tool_calls: ToolCallParser | None,
        thought_tokens: ThoughtTokens | None = None,
    ) -> None:
        self._reasoning = reasoning
        self._thought_tokens = thought_tokens
        self._tool_calls = tool_calls

    def read(
        self, text: str, finish_reason: FinishReason | None = None, *, token_ids: Sequence[int] = ()
    ) -> ParsedText:
        """What `text`, behind all that came before, lets be known; with a reason to finish, nothing is held back.

        `token_ids`: that came with it.
        """
        reasoning, answer = ("", text) if self._reasoning is None else self._reasoning.push(text)
        if finish_reason is not None and self._reasoning is not None:
            rest = self._reasoning.finish()
            reasoning, answer = reasoning + rest.reasoning, answer + rest.answer
        num_tokens = 0
        if self._reasoning is not None and self._thought_tokens is not None:
            num_tokens = self._thought_tokens.push(token_ids, has_thought=self._reasoning.has_thought)
        calls = self._tool_calls
        if calls is None:
            return ParsedText(answer, reasoning, (), finish_reason, num_tokens)
        content, deltas = calls.push(answer)
        if finish_reason is not None:
            more_content, more_deltas = calls.finish()
            content, deltas = content + more_content, deltas + more_deltas
            if finish_reason == "stop" and calls.num_calls > 0 and not calls.is_cut_off:
                finish_reason = "tool_calls"
        return ParsedText(content, reasoning, tuple(deltas), finish_reason, num_tokens)
