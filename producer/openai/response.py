"""Turns results into OpenAI's response bodies; has the parts that whole and streamed answers share. Pure."""

from collections.abc import Sequence
from typing import Any

from producer.contract import Choice, ErrorInfo, PromptEcho, Result, TokenLogprob, Usage
from producer.openai.embeddings import EMBEDDINGS_URL, embeddings_body
from producer.openai.logprobs import chat_logprobs, completion_logprobs
from producer.openai.request import CHAT_URL, COMPLETIONS_URL
from producer.openai.responses.body import RESPONSE_PREFIX
from producer.openai.responses.request import RESPONSES_URL

_ID_PREFIXES = {
    CHAT_URL: "chatcmpl-",
    COMPLETIONS_URL: "cmpl-",
    EMBEDDINGS_URL: "embd-",
    RESPONSES_URL: RESPONSE_PREFIX,
}
RESPONSE_PREFIXES = tuple(_ID_PREFIXES.values())

# Finish reasons that OpenAI does not have.
_FINISH_REASONS = {"deadline": "length", "cancelled": "stop", "error": "stop"}


def response_id(url: str, job_id: str) -> str:
    return f"{_ID_PREFIXES[url]}{job_id}"


def response_body(url: str, results: Sequence[Result], *, created: int, encoding: str = "float") -> dict[str, Any]:
    """The body of a successful response: the choices of the first job, then of the second, and so on.

    `created`: epoch seconds; `encoding`: of embeddings.
    """
    if url == EMBEDDINGS_URL:
        return embeddings_body(results, add_usage([result.usage for result in results]), encoding=encoding)
    render = _chat_choice if url == CHAT_URL else _completion_choice
    choices = [render(choice, result) for result in results for choice in result.choices]
    return {
        "id": response_id(url, results[0].job_id),
        "object": "chat.completion" if url == CHAT_URL else "text_completion",
        "created": created,
        "model": results[0].model or "",
        "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
        "usage": usage_body(add_usage([result.usage for result in results])),
    }


def add_usage(usages: Sequence[Usage]) -> Usage:
    return Usage(**{name: sum(getattr(usage, name) for usage in usages) for name in Usage.model_fields})


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def error_body(error: ErrorInfo) -> dict[str, Any]:
    status = error.code.http_status
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": str(error.code)}}


def finish_reason_body(reason: str) -> str:
    """OpenAI's name for one of our finish reasons."""
    return _FINISH_REASONS.get(reason, reason)


def _chat_choice(choice: Choice, result: Result) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = choice.tool_calls
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    return {
        "index": choice.index,
        "message": message,
        "logprobs": chat_logprobs(choice.logprobs) if choice.logprobs is not None else None,
        "finish_reason": finish_reason_body(choice.finish_reason),
    }


def _completion_choice(choice: Choice, result: Result) -> dict[str, Any]:
    """One choice of a completion. With `echo` the prompt comes first."""
    text, logprobs = choice.text, list[TokenLogprob | None](choice.logprobs or ())
    has_logprobs, first_text = choice.logprobs is not None, ""
    if result.prompt is not None:
        text = result.prompt.text + text
        has_logprobs = has_logprobs or result.prompt.logprobs is not None
        logprobs = [*(result.prompt.logprobs or ()), *logprobs]
        first_text = first_token_text(result.prompt)
    return {
        "index": choice.index,
        "text": text,
        "logprobs": completion_logprobs(logprobs, text_offset=0, first_text=first_text) if has_logprobs else None,
        "finish_reason": finish_reason_body(choice.finish_reason),
    }


def first_token_text(prompt: PromptEcho) -> str:
    """The text of the prompt's first token: the prompt's text without the bytes of its other tokens."""
    data = prompt.text.encode()
    num_others = sum(len(entry.bytes) for entry in prompt.logprobs or () if entry is not None)
    return data[: max(0, len(data) - num_others)].decode(errors="replace")
