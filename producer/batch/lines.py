"""The lines of OpenAI's Batch API: input lines to requests, outcomes to output lines. Pure: no file, no connection."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from producer.contract import NO_REASON, ErrorInfo, Result
from producer.openai.request import URLS, callers_names, in_callers_words, request_from_body
from producer.openai.response import error_body, response_body, response_id
from producer.openai.responses.body import ResponseFrame
from producer.openai.responses.request import RESPONSES_URL, AskedResponse

MAX_CUSTOM_ID_CHARS = 512
_NO_INPUT = {"role": "user", "content": ""}
ANSWER_ID = "batch_req_"  # + the job's id, or the line's number where there was no job


class BadLineError(Exception):
    """A line that is not a request. `custom_id` is None if none could be read."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One well-formed line of a batch's input; its body is not checked yet."""

    custom_id: str
    url: str
    body: Mapping[str, Any]
    callers_names: Mapping[str, str] = field(default_factory=dict)  # see `producer.openai.request`
    encoding: str = "float"  # of embeddings

    def without_body(self) -> "BatchLine":
        """The line with only what its answer needs: the answer of /v1/responses repeats the request's options."""
        told = {**self.body, "input": [_NO_INPUT]} if self.url == RESPONSES_URL else {}
        return replace(self, body=told)


def parse_line(text: bytes) -> BatchLine:
    """Parse one line. Raises BadLineError for a line without a usable envelope."""
    try:
        line = json.loads(text.decode("utf-8-sig"))  # json would guess UTF-16
    except (ValueError, RecursionError) as error:
        raise BadLineError("invalid_json_line", f"the line is not JSON: {error}") from error
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
    encoding = "base64" if line["body"].get("encoding_format") == "base64" else "float"
    return BatchLine(custom_id, line["url"], line["body"], callers_names(line["url"], line["body"]), encoding)


def answer_line(line: BatchLine, result: Result, *, created: int) -> dict[str, Any]:
    """The output line of a job that ended: an answer, an error with its HTTP status, or that it was cancelled."""
    if result.status in ("cancelled", "stopped"):
        error = {"code": "batch_cancelled", "message": f"job {result.job_id} was {result.status} before its end"}
        return _output(result.job_id, line.custom_id, None, error)
    if result.status == "failed":
        info = in_callers_words(result.error or NO_REASON, line.callers_names)
        return refusal_line(line.custom_id, info, result.job_id)
    if line.url == RESPONSES_URL:
        body = _frame(line, result, created).body_of(result)
    else:
        body = response_body(line.url, [result], created=created, encoding=line.encoding)
    return _output(result.job_id, line.custom_id, {"status_code": 200, "request_id": result.job_id, "body": body}, None)


def _frame(line: BatchLine, result: Result, created: int) -> ResponseFrame:
    """The frame of a line that was checked before it became a job. Its response cannot be retrieved later."""
    asked = AskedResponse(store=False, has_instructions=bool(line.body.get("instructions")))
    request = request_from_body(line.url, line.without_body().body)
    response = response_id(line.url, result.job_id)
    return ResponseFrame(result.job_id, response, created, result.model or "", asked, request)


def refusal_line(custom_id: str, error: ErrorInfo, request_id: str) -> dict[str, Any]:
    """The output line of a request that was refused or failed, with the response that the API would have given."""
    response = {"status_code": int(error.code.http_status), "request_id": request_id, "body": error_body(error)}
    return _output(request_id, custom_id, response, None)


def bad_line(error: BadLineError, *, number: int) -> dict[str, Any]:
    """The output line for input line `number`, which is not a request."""
    info = {"code": error.code, "message": str(error), "line": number}
    return _output(f"line_{number}", error.custom_id, None, info)


def is_failed(answer: Mapping[str, Any]) -> bool:
    """Whether an output line is an error."""
    return answer["error"] is not None or answer["response"]["status_code"] >= 400


def is_refused(answer: Mapping[str, Any]) -> bool:
    """Whether the input line itself is at fault, so that it would fail again."""
    if answer["error"] is not None:
        return "line" in answer["error"]
    return bool(answer["response"]["status_code"] == HTTPStatus.BAD_REQUEST)


def encode_line(line: Mapping[str, Any]) -> bytes:
    """An output line as bytes for the file."""
    # Half a surrogate pair (in a custom_id) cannot be UTF-8; `backslashreplace` makes it JSON's own escape.
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def unanswered_line(custom_id: str, *, code: str, message: str, request_id: str) -> dict[str, Any]:
    """The output line of a request without a response, because its batch ended first."""
    return _output(request_id, custom_id, None, {"code": code, "message": message})


def _output(
    request_id: str, custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    return {"id": f"{ANSWER_ID}{request_id}", "custom_id": custom_id, "response": response, "error": error}
