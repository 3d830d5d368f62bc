"""The request bodies in our OpenAPI document: OpenAI's fields, and every other field of the contract beside them.

They describe; `producer.openai.request` and the contract check, so that errors come in our words and OpenAI's shape.
"""

from typing import Any

from producer.contract import JobRequest
from producer.contract.embedding import EMBED_FIELDS, EMBED_ONLY
from producer.openai.embeddings import EMBEDDINGS_URL
from producer.openai.request import CHAT_URL
from producer.openai.responses.request import RESPONSES_URL, WITH_LOGPROBS

_NOT_IN_BODIES = frozenset({"v", "task", "prompt", "messages", "model", "stream", "logprobs", "max_tokens"})
_NOT_IN_RESPONSES = frozenset({"n", "echo", "response_format", "tools", "tool_choice"})  # they have others' names there
_NEEDED = {CHAT_URL: "messages", EMBEDDINGS_URL: "input", RESPONSES_URL: "input"}


def body_of(url: str) -> dict[str, Any]:
    """What a route passes as `openapi_extra`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(url)}}}}


def _schema(url: str) -> dict[str, Any]:
    contract = JobRequest.model_json_schema(ref_template="#/$defs/{model}")
    definitions = contract.pop("$defs", {})
    properties = {name: schema for name, schema in contract["properties"].items() if _is_in_body(name, url)}
    common: dict[str, Any] = {
        "model": {"type": "string", "description": "GET /v1/models lists what is served."},
        "user": {"type": "string", "description": "Passed over."},
    }
    if url == EMBEDDINGS_URL:
        own = _embedding_properties()
    else:
        own = {CHAT_URL: _chat_properties, RESPONSES_URL: _response_properties}.get(url, _completion_properties)(
            contract
        )
        own["stream"] = {"type": "boolean", "default": False}
        own["stream_options"] = {"type": "object", "properties": {"include_usage": {"type": "boolean"}}}
    required = ["model", _NEEDED.get(url, "prompt")]
    schema = {"type": "object", "required": required, "properties": {**common, **own, **properties}}
    return dict(_inline(schema, definitions))


def _is_in_body(name: str, url: str) -> bool:
    if url == EMBEDDINGS_URL:
        return name in EMBED_FIELDS - _NOT_IN_BODIES and name != "inputs"
    return name not in _NOT_IN_BODIES | EMBED_ONLY and not (url == RESPONSES_URL and name in _NOT_IN_RESPONSES)


def _chat_properties(contract: dict[str, Any]) -> dict[str, Any]:
    limit = {"type": "integer", "minimum": 1}
    return {
        "messages": contract["properties"]["messages"],
        "max_tokens": limit,
        "max_completion_tokens": limit,
        "logprobs": {"type": "boolean"},
    }


def _embedding_properties() -> dict[str, Any]:
    return {
        "input": _prompts_schema(),
        "encoding_format": {"type": "string", "enum": ["float", "base64"], "default": "float"},
    }


def _prompts_schema() -> dict[str, Any]:
    text, token_ids = {"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "integer", "minimum": 0}}
    prompts = [{"type": "array", "minItems": 1, "items": kind} for kind in (text, token_ids)]
    return {"anyOf": [text, {**token_ids, "minItems": 1}, *prompts]}


def _response_properties(contract: dict[str, Any]) -> dict[str, Any]:
    text, flag, listed = {"type": "string"}, {"type": "boolean"}, {"type": "array", "items": {"type": "object"}}
    tool = {"type": {"const": "function"}, "name": text, "parameters": {"type": "object"}, "strict": flag}
    return {
        "input": {
            "anyOf": [text, {**listed, "minItems": 1}],
            "description": "Text, or messages, calls, their outputs, references to items.",
        },
        "instructions": text,
        "previous_response_id": text,
        "background": flag,
        "store": {**flag, "default": True},
        "include": {"type": "array", "items": {"enum": [WITH_LOGPROBS]}},
        "max_output_tokens": {"type": "integer", "minimum": 1},
        "text": {"type": "object", "properties": {"format": {"type": "object", "properties": {"type": text}}}},
        "tools": {"type": "array", "items": {"type": "object", "required": ["type", "name"], "properties": tool}},
        "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]},
    }


def _completion_properties(contract: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": _prompts_schema(),
        "max_tokens": {"type": "integer", "minimum": 0, "default": 16},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 20, "description": "The number of alternatives."},
    }


def _inline(value: Any, definitions: dict[str, Any]) -> Any:
    """References resolved in place: a body's schema has no name of its own to refer to."""
    if isinstance(value, dict):
        if "$ref" in value:
            return _inline(definitions[value["$ref"].rpartition("/")[2]], definitions)
        return {name: _inline(inner, definitions) for name, inner in value.items()}
    return [_inline(item, definitions) for item in value] if isinstance(value, list) else value
