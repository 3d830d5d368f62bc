"""A body of OpenAI's Responses API as the chat's body that asks for the same: what chat makes of it counts for both.

Pure: an earlier response is named, and not looked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from producer.errors import InvalidJobError
from producer.openai.responses.items import InputReader

RESPONSES_URL = "/v1/responses"
WITH_LOGPROBS = "message.output_text.logprobs"

# Of fields of a chat or a job: the caller's words, as `producer.openai.request.in_callers_words` has them.
CALLERS_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    r"response_format\.json_schema": "text.format",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
    r"tool_choice\.(?:function|allowed_tools)": "tool_choice",
    r"\]\.function": "]",
}

# What may be included: of the tools that are not served there is nothing to include, and thoughts come as they are.
_INCLUDABLE = {
    WITH_LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
}
# Fields with these values ask for nothing that is not so in any case. `max_tool_calls` limits OpenAI's own tools alone;
# `client_metadata` is how Codex tells OpenAI about itself.
_NEUTRAL_VALUES: dict[str, Any] = {"truncation": "disabled", "n": 1}
_IGNORED = frozenset({"client_metadata", "max_tool_calls", "prompt_cache_options"})
_NOT_SERVED = {
    "access_programs": "leave it out",
    "background_options": "leave it out; priority and deadline say which of several comes first",
    "context_management": "leave it out",
    "conversation": "use previous_response_id, or send all items as input",
    "image": "leave it out",
    "moderation": "leave it out",
    "prompt": "write the prompt out, as instructions and input",
    "truncation": "leave it out; an input beyond the context is refused",
}
_OF_ANOTHER_API = {
    "messages": "use input",
    "response_format": "use text.format",
    "max_tokens": "use max_output_tokens",
    "max_completion_tokens": "use max_output_tokens",
    "logprobs": f"use include: ['{WITH_LOGPROBS}']",
    "n": "a response is one answer; ask again for another",
    "echo": "leave it out",
    "task": "leave it out",
    "inputs": "use input",
}


class AskedResponse(BaseModel):
    """What a response asks for beside its job. `has_instructions`: they are the job's first message. `earlier`: the ids
    of the responses that it continues, the last one's and those that this one had continued."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    background: bool = False
    store: bool = True
    has_instructions: bool = False
    previous_response_id: str | None = None
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ResponseBody:
    """`places`: the items that the chat's messages came from, as `InputReader` has them."""

    chat: dict[str, Any]
    asked: AskedResponse
    places: Mapping[str, str]


def read_response_body(body: Mapping[str, Any]) -> ResponseBody:
    """Raises InvalidJobError naming the field."""
    fields = {name: value for name, value in body.items() if value is not None and not _says_nothing(name, value)}
    for name in fields:
        if (remedy := _OF_ANOTHER_API.get(name)) is not None:
            raise InvalidJobError(f"{name}: {RESPONSES_URL} does not take it; {remedy}", param=name)
        if (remedy := _NOT_SERVED.get(name)) is not None:
            raise InvalidJobError(f"{name}: is OpenAI's, and not served here; {remedy}", param=name)
    instructions = _take_text(fields, "instructions")
    asked = AskedResponse(
        background=_flag(fields, "background", default=False),
        store=_flag(fields, "store", default=True),
        has_instructions=bool(instructions),
        previous_response_id=_take_text(fields, "previous_response_id"),
    )
    if asked.background and not asked.store:
        rule = "background: a response in the background is asked for later, and must be stored; leave out store: false"
        raise InvalidJobError(rule, param="background")
    reader = InputReader(instructions)
    if "input" not in fields:
        raise InvalidJobError("input: is required", param="input")
    reader.read(fields.pop("input"))
    chat: dict[str, Any] = {"messages": reader.messages}
    if "max_output_tokens" in fields:
        chat["max_tokens"] = fields.pop("max_output_tokens")
    chat |= _logprobs(fields.pop("include", []), fields.get("top_logprobs"))
    chat |= _text_fields(fields.pop("text", {}))
    chat |= _reasoning_fields(fields.pop("reasoning", {}))
    chat |= _tool_fields(fields.pop("tools", []), fields.pop("tool_choice", None))
    _check_metadata(fields.get("metadata", {}))
    return ResponseBody({**fields, **chat}, asked, reader.places)


def _says_nothing(name: str, value: Any) -> bool:
    return name in _IGNORED or value == _NEUTRAL_VALUES.get(name, ...)


def _flag(fields: dict[str, Any], name: str, *, default: bool) -> bool:
    value = fields.pop(name, default)
    if not isinstance(value, bool):
        raise InvalidJobError(f"{name}: must be true or false; got {value!r:.60}", param=name)
    return value


def _take_text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.pop(name, None)
    if value is not None and not isinstance(value, str):
        raise InvalidJobError(f"{name}: must be text; got {value!r:.60}", param=name)
    return value


def _logprobs(include: Any, top_logprobs: Any) -> dict[str, Any]:
    if not isinstance(include, list) or not all(isinstance(name, str) for name in include):
        raise InvalidJobError(f"include: must be a list of texts; got {include!r:.60}", param="include")
    if unknown := sorted(set(include) - _INCLUDABLE):
        raise InvalidJobError(f"include: {unknown[0]!r:.60} is not supported; leave it out", param="include")
    if WITH_LOGPROBS not in include and top_logprobs:
        rule = f"top_logprobs: needs include: ['{WITH_LOGPROBS}']; include them, or leave it out"
        raise InvalidJobError(rule, param="top_logprobs")
    return {"logprobs": True} if WITH_LOGPROBS in include else {}


def _text_fields(text: Any) -> dict[str, Any]:
    """`text` as a chat's response_format and verbosity."""
    given = _inner(text, "text", ("format", "verbosity"))
    if "format" not in given:
        return given
    form = _inner(given.pop("format"), "text.format", None)
    kind = form.pop("type", None)
    inner = {"json_schema": form} if kind == "json_schema" else form
    return {**given, "response_format": {"type": kind, **inner}}


def _reasoning_fields(reasoning: Any) -> dict[str, Any]:
    """A summary that is `auto` is the one that there is: the thoughts themselves."""
    given = _inner(reasoning, "reasoning", ("effort", "summary", "generate_summary", "context", "mode"))
    others = [name for name, value in given.items() if name != "effort" and value != "auto"]
    if others:
        rule = f"reasoning.{others[0]}: is OpenAI's, and not served here; leave it out: thoughts come as they are"
        raise InvalidJobError(rule, param=f"reasoning.{others[0]}")
    return {"reasoning_effort": given["effort"]} if "effort" in given else {}


def _inner(value: Any, param: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    """What an object asks for. `known`: the names that it may have; None leaves that to the contract."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidJobError(f"{param}: must be an object; got {value!r:.60}", param=param)
    unknown = sorted(set(map(str, value)) - set(known)) if known is not None else []
    if unknown:
        raise InvalidJobError(f"{param}.{unknown[0]:.60}: unknown field; leave it out", param=f"{param}.{unknown[0]}")
    return {name: inner for name, inner in value.items() if inner is not None}


def _tool_fields(tools: Any, choice: Any) -> dict[str, Any]:
    """Tools, and the choice among them, in the chat's form. Of no tools, `auto` is no choice."""
    if not isinstance(tools, list):
        raise InvalidJobError(f"tools: must be a list; got {tools!r:.60}", param="tools")
    given = {"tools": [_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)]} if tools else {}
    if choice is None or (choice == "auto" and not tools):
        return given
    return {**given, "tool_choice": _choice(choice) if isinstance(choice, Mapping) else choice}


def _tool(tool: Any, where: str) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    _check_function(tool, where)
    return {"type": "function", "function": _inner({k: v for k, v in tool.items() if k != "type"}, where, None)}


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [_tool(tool, "tool_choice.tools") for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    _check_function(choice, "tool_choice")
    return {"type": "function", "function": {name: value for name, value in choice.items() if name != "type"}}


def _check_function(value: Mapping[str, Any], where: str) -> None:
    if value.get("type") != "function":
        rule = f"must be 'function': OpenAI's own tools are not served here; got {value.get('type')!r:.60}"
        raise InvalidJobError(f"{where}.type: {rule}", param=f"{where}.type")


def _check_metadata(metadata: Any) -> None:
    """A response gives them back as text."""
    for name, value in metadata.items() if isinstance(metadata, Mapping) else ():
        if not isinstance(value, str):
            rule = f"metadata: values must be text; {name!r:.60} has {value!r:.60}"
            raise InvalidJobError(rule, param="metadata")
