"""One choice's text in, content, reasoning and calls out. Knows nothing of tokens, jobs or Redis."""

from dataclasses import replace

from worker.parsing.parsed_text import ParsedText
from worker.parsing.reasoning_parser import ReasoningParser, Split
from worker.parsing.tool_call_parser import ToolCallParser


class OutputParser:
    """A pure stage: joining what it gives depends on the whole text alone."""

    def __init__(self, reasoning: ReasoningParser | None, tool_calls: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._tool_calls = tool_calls

    def push(self, text: str) -> ParsedText:
        """What `text`, behind all that came before, lets be known."""
        split = Split("", text) if self._reasoning is None else self._reasoning.push(text)
        return self._parse_answer(split)

    def finish(self) -> ParsedText:
        """What was held back, once no more text will follow."""
        split = Split("", "") if self._reasoning is None else self._reasoning.finish()
        parsed = self._parse_answer(split)
        if self._tool_calls is None:
            return parsed
        rest = self._tool_calls.finish()
        return replace(parsed, text=parsed.text + rest.text, tool_calls=parsed.tool_calls + rest.tool_calls)

    @property
    def ends_with_calls(self) -> bool:
        """Whether the choice, if it stopped by itself, did so to have tools called."""
        calls = self._tool_calls
        return calls is not None and calls.num_calls > 0 and not calls.is_cut_off

    def _parse_answer(self, split: Split) -> ParsedText:
        if self._tool_calls is None:
            return ParsedText(text=split.answer, reasoning=split.reasoning)
        return replace(self._tool_calls.push(split.answer), reasoning=split.reasoning)
