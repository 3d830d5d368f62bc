"""What a piece of output text is to its reader: content, a thought, a call of a tool."""

from dataclasses import dataclass

from producer.contract import FinishReason, ToolCallDelta


@dataclass(frozen=True, slots=True)
class ParsedText:
    """Joining the pieces of a choice gives all of its content, its reasoning and its calls.

    `num_reasoning_tokens`: how many more of the choice's tokens are known to be of what the model thought.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: FinishReason | None = None
    num_reasoning_tokens: int = 0
