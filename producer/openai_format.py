"""OpenAI's shapes to ours and back: request bodies to `JobRequest`, results to response bodies, batch lines to both.

Pure: no file, no connection. What OpenAI's API takes and we do not serve is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from producer.contract import Choice, ErrorCode, ErrorInfo, JobRequest, Result, Usage
from producer.enqueue import build_request
from producer.errors import InvalidJobError

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
URLS = (CHAT_URL, COMPLETIONS_URL)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat goes on until the model stops
MAX_CUSTOM_ID_CHARS = 512

# Say nothing about the answer: whom it is for, how it is billed or kept. `stream` is the transport's business.
_IGNORED_FIELDS = frozenset({"user", "store", "service_tier", "stream", "stream_options", "safety_identifier"})
_FINISH_REASONS = {"deadline": "length", "cancelled": "stop", "error": "stop"}  # what OpenAI has no word for


class BadLineError(Exception):
    """A line that is no request at all. `custom_id` is None where it has none that could be read."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of a batch's input: well formed, its body not looked at yet."""

    custom_id: str
    url: str
    body: Mapping[str, Any]


def parse_line(text: bytes) -> BatchLine:
    """Raises BadLineError for a line without a usable envelope."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLineError("invalid_json_line", f"the line is no JSON: {error}") from error
    if not isinstance(line, dict):
        raise BadLineError("invalid_json_line", "the line must be a JSON object with custom_id, method, url and body")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        rule = f"custom_id: must be text of 1 to {MAX_CUSTOM_ID_CHARS} characters; got {custom_id!r:.80}"
        raise BadLineError("missing_custom_id", rule)
    if line.get("method", "POST") != "POST":
        raise BadLineError("invalid_method", f"method: must be POST; got {line['method']!r:.80}", custom_id)
    if line.get("url") not in URLS:
        rule = f"url: must be {' or '.join(URLS)}; got {line.get('url')!r:.80}"
        raise BadLineError("invalid_url", rule, custom_id)
    if not isinstance(line.get("body"), dict):
        raise BadLineError("invalid_body", "body: must be an object, the request's own fields", custom_id)
    return BatchLine(custom_id, line["url"], line["body"])


def request_from_body(url: str, body: Mapping[str, Any]) -> JobRequest:
    """The job a request body asks for; our own sampling fields may stand beside OpenAI's.

    Raises InvalidJobError naming the field, by OpenAI's name for it.
    """
    fields = {name: value for name, value in body.items() if value is not None and name not in _IGNORED_FIELDS}
    return build_request(_chat_fields(fields) if url == CHAT_URL else _completion_fields(fields))


def response_body(url: str, result: Result, *, created: int) -> dict[str, Any]:
    """The body of a successful response. `created`: epoch seconds."""
    is_chat = url == CHAT_URL
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{result.job_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": result.model or "",
        "choices": [_chat_choice(choice) if is_chat else _completion_choice(choice) for choice in result.choices],
        "usage": usage_body(result.usage),
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def error_body(error: ErrorInfo) -> dict[str, Any]:
    status = error.code.http_status
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": str(error.code)}}


def invalid_job_info(error: InvalidJobError) -> ErrorInfo:
    return ErrorInfo(code=error.code, message=str(error), param=error.param)


def answer_line(line: BatchLine, result: Result, *, created: int) -> dict[str, Any]:
    """The output line of a job that ended: an answer, an error with its HTTP status, or that it was cancelled."""
    if result.status in ("cancelled", "stopped"):
        error = {"code": "batch_cancelled", "message": f"job {result.job_id} was {result.status} before its end"}
        return _output(result.job_id, line.custom_id, None, error)
    if result.status == "failed":
        info = result.error or ErrorInfo(code=ErrorCode.INTERNAL, message="the worker gave no reason")
        return refusal_line(line.custom_id, info, result.job_id)
    body = response_body(line.url, result, created=created)
    return _output(result.job_id, line.custom_id, {"status_code": 200, "request_id": result.job_id, "body": body}, None)


def refusal_line(custom_id: str, error: ErrorInfo, request_id: str) -> dict[str, Any]:
    """The output line of a request that was refused, or failed: the response a server would have given."""
    response = {"status_code": int(error.code.http_status), "request_id": request_id, "body": error_body(error)}
    return _output(request_id, custom_id, response, None)


def bad_line(error: BadLineError, *, number: int) -> dict[str, Any]:
    """The output line of input line `number`, which is no request."""
    info = {"code": error.code, "message": str(error), "line": number}
    return _output(f"line_{number}", error.custom_id, None, info)


def _output(
    request_id: str, custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    return {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": error}


def _chat_fields(fields: dict[str, Any]) -> dict[str, Any]:
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message) for message in fields["messages"]]
    if "prompt" in fields:
        raise InvalidJobError(f"prompt: {CHAT_URL} takes messages; use {COMPLETIONS_URL} for a prompt", param="prompt")
    return fields


def _completion_fields(fields: dict[str, Any]) -> dict[str, Any]:
    if "messages" in fields:
        rule = f"messages: {COMPLETIONS_URL} takes a prompt; use {CHAT_URL} for messages"
        raise InvalidJobError(rule, param="messages")
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(part, (str, list)) for part in prompt):
        if len(prompt) > 1:
            rule = f"prompt: one prompt a request; got {len(prompt)}, make a request of each"
            raise InvalidJobError(rule, param="prompt")
        fields["prompt"] = prompt[0]
    if type(fields.get("logprobs")) is int:  # a number of alternatives here, a yes or no in a chat
        fields["top_logprobs"], fields["logprobs"] = fields["logprobs"], True
    fields.setdefault("max_tokens", COMPLETION_MAX_TOKENS)
    return fields


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None}


def _chat_choice(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["tool_calls"] = choice.tool_calls
    return {
        "index": choice.index,
        "message": message,
        "logprobs": None,
        "finish_reason": finish_reason_body(choice.finish_reason),
    }


def _completion_choice(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": None,
        "finish_reason": finish_reason_body(choice.finish_reason),
    }


def finish_reason_body(reason: str) -> str:
    """OpenAI's word for one of our finish reasons."""
    return _FINISH_REASONS.get(reason, reason)
