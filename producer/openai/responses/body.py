"""The response object of OpenAI's Responses API: what was asked, how it stands, what came of it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from producer.contract import NO_REASON, JobOutcome, JobRequest, Result, Usage
from producer.contract.tool import NamedToolChoice
from producer.openai.request import in_callers_words
from producer.openai.responses.output import ResponseOutput
from producer.openai.responses.request import CALLERS_NAMES, AskedResponse

RESPONSE_PREFIX = "resp_"


@dataclass(frozen=True, slots=True)
class ResponseFrame:
    """A response as it was asked for: the same in all that is told of it. `created`: epoch seconds."""

    job_id: str
    response_id: str
    created: int
    model: str
    asked: AskedResponse
    request: JobRequest

    def body(
        self,
        status: str,
        *,
        output: Sequence[dict[str, Any]] = (),
        usage: Usage | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        request, asked = self.request, self.asked
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": asked.background,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.messages[0].text if asked.has_instructions and request.messages else None,
            "max_output_tokens": request.max_tokens,
            "metadata": request.metadata,
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": asked.store,
            "temperature": request.temperature,
            "text": {"format": _text_format(request)},
            "tool_choice": _tool_choice(request),
            "tools": [_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": _usage(usage) if usage is not None else None,
        }

    def body_of(self, result: Result) -> dict[str, Any]:
        """Of a job that has ended. Its error is about the fields as the caller wrote them."""
        output = ResponseOutput(self.job_id)
        if result.choices:
            output = ResponseOutput.of_choice(self.job_id, result.choices[0])
        status, error = status_of(result.status, output), None
        if status == "failed":
            info = in_callers_words(result.error or NO_REASON, CALLERS_NAMES)
            error = error_of(info.code.http_status, info.message, info.param)
        return self.body(status, output=output.items, usage=result.usage, error=error)


def status_of(outcome: JobOutcome, output: ResponseOutput) -> str:
    """Of a response whose job has ended."""
    if outcome == "finished":
        return "completed" if output.is_whole else "incomplete"
    return "failed" if outcome == "failed" else "cancelled"


def error_of(http_status: int, message: str, param: str | None) -> dict[str, Any]:
    """A response's error: OpenAI has a closed list of codes, of which none is that the time was over."""
    code = "invalid_prompt" if http_status == HTTPStatus.BAD_REQUEST else "server_error"
    return {"code": code, "message": message, "param": param}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _text_format(request: JobRequest) -> dict[str, Any]:
    form = request.response_format or {"type": "text"}
    return {"type": form["type"], **form.get("json_schema", {})}


def _tool_choice(request: JobRequest) -> Any:
    choice = request.tool_choice
    if isinstance(choice, NamedToolChoice):
        return {"type": "function", "name": choice.function.name}
    return choice or "auto"


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "description": None, "parameters": None, "strict": None, **tool["function"]}
