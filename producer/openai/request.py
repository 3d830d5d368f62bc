"""OpenAI's request bodies to jobs; our own sampling fields may stand beside OpenAI's. Pure: no file, no connection.

What OpenAI's API takes and we do not serve is refused by name, unless it says nothing about the answer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from producer.contract import ErrorInfo, JobRequest
from producer.enqueue import build_request
from producer.errors import InvalidJobError
from producer.openai.embeddings import (
    EMBEDDING_NAMES,
    EMBEDDINGS_URL,
    check_fields,
    embedding_request,
    encoding_of,
    split_inputs,
)
from producer.openai.responses.request import CALLERS_NAMES, RESPONSES_URL, AskedResponse, read_response_body

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
URLS = (CHAT_URL, COMPLETIONS_URL, EMBEDDINGS_URL, RESPONSES_URL)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat goes on until the model stops
MAX_PROMPTS = 128  # of one request

# They say nothing about the answer: whom it is for, how it is billed, kept or cached.
_IGNORED_FIELDS = frozenset(
    {"user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Fields that ask for nothing with this one value, which clients send without being asked to.
_NEUTRAL_VALUES: dict[str, Any] = {"modalities": ["text"], "best_of": 1}
# Fields of OpenAI's that ask for what is not served here: what to do instead.
_NOT_SERVED = {
    "audio": "answers are text; leave it out",
    "best_of": "ask for n answers, and choose",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "modalities": "answers are text; leave it out",
    "prediction": "leave it out",
    "reasoning_effort": "leave it out; what a model's own template knows goes into chat_template_kwargs",
    "suffix": "leave it out",
    "verbosity": "leave it out",
    "web_search_options": "leave it out",
}
# What vLLM calls the fields that decide the form of an answer: left out, the answer would have none.
_VLLMS_NAMES = {
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json": "response_format",
    "guided_regex": "regex",
    "structured_outputs": "response_format, regex, choice or grammar",
}


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """What one request asks for: a job a prompt, and how the answer is to come."""

    url: str
    jobs: list[JobRequest]
    is_streamed: bool
    includes_usage: bool  # in a stream; an answer that is not streamed always has it
    callers_names: dict[str, str]  # of our fields, where the caller wrote another of OpenAI's
    encoding: str = "float"  # of embeddings
    response: AskedResponse | None = None  # of /v1/responses

    @property
    def model(self) -> str | None:
        return self.jobs[0].model

    @property
    def is_in_background(self) -> bool:
        return self.response is not None and self.response.background


def parse_body(
    url: str, body: Mapping[str, Any], *, completion_max_tokens: int | None = COMPLETION_MAX_TOKENS
) -> OpenAIRequest:
    """Raises InvalidJobError naming the field, by OpenAI's name for it.

    `completion_max_tokens`: of a completion that names none.
    """
    if url == EMBEDDINGS_URL:
        jobs, names = split_inputs(_embedding_job(body)), callers_names(url, body)
        return OpenAIRequest(url, jobs, False, False, names, encoding_of(body))
    if url == RESPONSES_URL:
        return _parse_response(body)
    is_streamed = _flag(body, "stream", "stream")
    includes_usage = _includes_usage(body.get("stream_options"), is_streamed)
    fields = _meaningful(body)
    fields.pop("stream_options", None)
    _refuse_not_served(fields)
    if not is_streamed:
        fields.pop("stream", None)
    needed = "messages" if url == CHAT_URL else "prompt"
    fields = _chat_fields(fields) if url == CHAT_URL else _completion_fields(fields, completion_max_tokens)
    if needed not in fields:
        raise InvalidJobError(f"{needed}: is required", param=needed)
    prompts = [fields] if url == CHAT_URL else [{**fields, "prompt": prompt} for prompt in _prompts(fields)]
    try:
        jobs = [build_request({**prompt, "stream": is_streamed}) for prompt in prompts]
    except InvalidJobError as error:
        raise _in_callers_words(error, callers_names(url, body)) from error
    return OpenAIRequest(url, jobs, is_streamed, includes_usage, callers_names(url, body))


def request_from_body(
    url: str, body: Mapping[str, Any], *, completion_max_tokens: int | None = COMPLETION_MAX_TOKENS
) -> JobRequest:
    """The one job of a batch line's body, where `stream` means nothing. Raises InvalidJobError."""
    if url == EMBEDDINGS_URL:
        return _embedding_job(body)
    if body.get("idempotency_key") is not None:
        rule = "idempotency_key: a batch's lines are told apart by their custom_id; leave it out"
        raise InvalidJobError(rule, param="idempotency_key")
    transport = ("stream", "stream_options")
    fields = {name: value for name, value in body.items() if name not in transport}
    request = parse_body(url, fields, completion_max_tokens=completion_max_tokens)
    if request.response is not None and request.response.previous_response_id is not None:
        rule = "previous_response_id: a batch's lines stand alone; send the earlier items as input"
        raise InvalidJobError(rule, param="previous_response_id")
    if len(request.jobs) > 1:
        rule = f"prompt: one prompt a request; got {len(request.jobs)}, make a request of each"
        raise InvalidJobError(rule, param="prompt")
    return request.jobs[0].model_copy(update={"stream": True})


def _parse_response(body: Mapping[str, Any]) -> OpenAIRequest:
    given = read_response_body(body)
    try:
        asked = parse_body(CHAT_URL, given.chat)
    except InvalidJobError as error:
        named = {re.escape(ours): item for ours, item in given.places.items() if ours in str(error)}  # of thousands
        raise _in_callers_words(error, {**named, **CALLERS_NAMES}) from error
    if given.asked.background:  # whoever asks for its events later is to get them as they come
        asked.jobs[0] = asked.jobs[0].model_copy(update={"stream": True})
    return replace(asked, url=RESPONSES_URL, callers_names=CALLERS_NAMES, response=given.asked)


def _embedding_job(body: Mapping[str, Any]) -> JobRequest:
    fields = _meaningful(body)
    check_fields(fields)
    try:
        return embedding_request(fields)
    except InvalidJobError as error:
        raise _in_callers_words(error, EMBEDDING_NAMES) from error


def _meaningful(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something about the answer."""
    return {name: value for name, value in body.items() if value is not None and not _says_nothing(name, value)}


def _says_nothing(name: str, value: Any) -> bool:
    return name in _IGNORED_FIELDS or (name not in JobRequest.model_fields and value == _NEUTRAL_VALUES.get(name, ...))


def _refuse_not_served(fields: Mapping[str, Any]) -> None:
    rules = {name: f"is OpenAI's, and not served here; {_NOT_SERVED[name]}" for name in fields if name in _NOT_SERVED}
    rules |= {name: f"is vLLM's name; use {_VLLMS_NAMES[name]}" for name in fields if name in _VLLMS_NAMES}
    if rules:
        raise InvalidJobError("; ".join(f"{name}: {rule}" for name, rule in rules.items()), param=next(iter(rules)))


def _flag(body: Mapping[str, Any], name: str, param: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidJobError(f"{param}: must be true or false; got {value!r:.60}", param=param)
    return bool(value)


def _includes_usage(options: Any, is_streamed: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, Mapping):
        raise InvalidJobError(f"stream_options: must be an object; got {options!r:.60}", param="stream_options")
    if not is_streamed:
        raise InvalidJobError("stream_options: only with stream: true; leave it out", param="stream_options")
    unknown = sorted(set(options) - {"include_usage", "include_obfuscation"})
    if unknown:
        param = f"stream_options.{unknown[0]}"
        raise InvalidJobError(f"{param}: unknown field; leave it out", param=param)
    return _flag(options, "include_usage", "stream_options.include_usage")


def _chat_fields(fields: dict[str, Any]) -> dict[str, Any]:
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message) for message in fields["messages"]]
    if isinstance(choice := fields.get("tool_choice"), Mapping) and choice.get("type") == "allowed_tools":
        fields = _with_allowed_tools(fields, choice.get("allowed_tools"))
    if "prompt" in fields:
        raise InvalidJobError(f"prompt: {CHAT_URL} takes messages; use {COMPLETIONS_URL} for a prompt", param="prompt")
    return fields


def _with_allowed_tools(fields: dict[str, Any], allowed: Any) -> dict[str, Any]:
    """OpenAI's choice among some of the tools: the job has those, and no others. Raises InvalidJobError."""
    param = "tool_choice.allowed_tools"
    try:
        mode, names = allowed["mode"], {tool["function"]["name"] for tool in allowed["tools"]}
        if mode not in ("auto", "required"):
            raise ValueError
    except (LookupError, TypeError, ValueError):
        rule = "must have a mode, 'auto' or 'required', and tools, each with the name of its function"
        raise InvalidJobError(f"{param}: {rule}; got {allowed!r:.60}", param=param) from None
    given = fields.get("tools")
    named = [(_function_name(tool), tool) for tool in given] if isinstance(given, list) else []
    unknown = sorted(names.difference(name for name, _ in named), key=str)
    if named and unknown:
        raise InvalidJobError(f"{param}: names {unknown[0]!r:.60}, which is not among the tools", param=param)
    kept = [tool for name, tool in named if name in names or name is None]  # what is no tool is told of later
    return {**fields, "tool_choice": mode, **({"tools": kept} if named else {})}


def _function_name(tool: Any) -> str | None:
    try:
        name = tool["function"]["name"]
    except (LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _completion_fields(fields: dict[str, Any], max_tokens: int | None) -> dict[str, Any]:
    if "messages" in fields:
        rule = f"messages: {COMPLETIONS_URL} takes a prompt; use {CHAT_URL} for messages"
        raise InvalidJobError(rule, param="messages")
    if type(fields.get("logprobs")) is int:  # a number of alternatives here, a yes or no in a chat
        fields["top_logprobs"], fields["logprobs"] = fields["logprobs"], True
    return fields if max_tokens is None else {"max_tokens": max_tokens, **fields}


def callers_names(url: str, body: Mapping[str, Any]) -> dict[str, str]:
    """What the caller calls those of our fields that OpenAI has other names for."""
    if url == CHAT_URL and body.get("max_completion_tokens") is not None:
        return {"max_tokens": "max_completion_tokens"}
    if url == COMPLETIONS_URL and type(body.get("logprobs")) is int:
        return {"top_logprobs": "logprobs"}
    return dict({EMBEDDINGS_URL: EMBEDDING_NAMES, RESPONSES_URL: CALLERS_NAMES}.get(url, {}))


def in_callers_words(error: ErrorInfo, names: Mapping[str, str], *, first_index: int = 0) -> ErrorInfo:
    """The error about the fields as the caller wrote them; `names` as `callers_names` gives them, patterns of ours.

    `first_index`: of the job's inputs among those of its request.
    """
    message, param = _numbered(error.message, first_index), _numbered(error.param or "", first_index)
    for ours, theirs in names.items():
        message, param = (re.sub(rf"\b{ours}(?!\w)", theirs, text) for text in (message, param))
    return error.model_copy(update={"message": message, "param": param or None})


def _numbered(text: str, first_index: int) -> str:
    return re.sub(r"\binputs\[(\d+)\]", lambda match: f"inputs[{int(match[1]) + first_index}]", text)


def _in_callers_words(error: InvalidJobError, names: Mapping[str, str]) -> InvalidJobError:
    info = in_callers_words(error.info, names)
    return InvalidJobError(info.message, param=info.param, code=info.code)


def _prompts(fields: Mapping[str, Any]) -> list[Any]:
    """A completion's prompt may be a text, token ids, or a list of either: one job each."""
    prompt = fields.get("prompt")
    if not (isinstance(prompt, list) and prompt and all(isinstance(part, str | list) for part in prompt)):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidJobError(f"prompt: at most {MAX_PROMPTS} prompts a request; got {len(prompt)}", param="prompt")
    return prompt


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None}
