"""Chat messages in OpenAI's shapes: text alone, calls a model made, and what the called functions gave."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from producer.contract.rules import ContractModel, FirstFault, JsonObject, NonEmptyText, Text, breaks_rule


class TextPart(ContractModel):
    type: Literal["text"]
    text: Text


class CalledFunctionMessage(ContractModel):
    """Arguments are JSON text, as the model wrote them, or the object that it stands for."""

    name: NonEmptyText
    arguments: Text | JsonObject

    @model_validator(mode="after")
    def _is_an_object(self) -> Self:
        if isinstance(self.arguments, str) and _parse_object(self.arguments) is None:
            rule = f'must be a JSON object as text, such as \'{{"city": "Rome"}}\'; got {self.arguments!r:.60}'
            raise breaks_rule("arguments", rule)
        return self

    @property
    def parsed_arguments(self) -> dict[str, Any]:
        return self.arguments if isinstance(self.arguments, dict) else _parse_object(self.arguments) or {}


class ToolCallMessage(ContractModel):
    """One call that the assistant made in an earlier turn."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunctionMessage


class Message(ContractModel):
    """One chat message. Content is text, or a list of OpenAI text parts; beside tool calls it may be missing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], FirstFault] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCallMessage], FirstFault] | None = Field(default=None, min_length=1)
    tool_call_id: Text | None = None
    reasoning: Text | None = Field(
        default=None,
        validation_alias=AliasChoices("reasoning", "reasoning_content"),
        description="What the assistant thought; whether it is shown to the model is the template's affair.",
    )

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise breaks_rule("content", f"a message of role {self.role!r} needs content")
        for name in ("tool_calls", "reasoning"):
            if getattr(self, name) is not None and self.role != "assistant":
                raise breaks_rule(name, f"only the assistant has {name}; this message is of role {self.role!r}")
        if self.role == "tool" and self.tool_call_id is None:
            raise breaks_rule("tool_call_id", "a message of role 'tool' needs the id of the call that it answers")
        if self.role != "tool" and self.tool_call_id is not None:
            raise breaks_rule("tool_call_id", f"belongs to messages of role 'tool'; this one is of role {self.role!r}")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


def _parse_object(text: str) -> dict[str, Any] | None:
    """Models write nothing for no arguments. None: it is no JSON object."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
