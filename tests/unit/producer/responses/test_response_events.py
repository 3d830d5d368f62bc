"""Chunks to response objects and events, with the official client's types as the judge."""

import json
from typing import Any

import pytest

from producer.contract import Choice, Chunk, ErrorCode, ErrorInfo, FinishReason, JobOutcome, Result, TokenLogprob, Usage
from producer.gateway.errors import from_info
from producer.gateway.renderer import KEEP_ALIVE, StreamProgress
from producer.gateway.response_events import ResponseRenderer
from producer.openai.request import parse_body
from producer.openai.responses.body import ResponseFrame
from producer.openai.responses.request import RESPONSES_URL
from producer.subscription import StreamEnd
from tests.fakes.response_judge import judge_events, parse_response

USAGE = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, cached_tokens=2)
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
FAILURE = ErrorInfo(code=ErrorCode.POISON, message="three workers died of it")


def frame(**fields: Any) -> ResponseFrame:
    asked = parse_body(RESPONSES_URL, {"model": "m", "input": "hi", **fields})
    assert asked.response is not None
    return ResponseFrame("j", "resp_j", 5, "m", asked.response, asked.jobs[0])


def chunk(text: str = "", finish_reason: FinishReason | None = None, **fields: Any) -> Chunk:
    return Chunk(job_id="j", text=text, token_ids=[1], finish_reason=finish_reason, **fields)


def call(arguments: str, name: str | None = None, index: int = 0) -> Any:
    if name is None:
        return {"index": index, "function": {"arguments": arguments}}
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"c{index}", "type": "function", "function": function}


def logprob(token: str) -> TokenLogprob:
    return TokenLogprob(token_id=1, token=token, bytes=list(token.encode()), logprob=-0.5)


def bodies(data: bytes) -> list[dict[str, Any]]:
    text = data.decode().replace(KEEP_ALIVE.decode(), "")
    events = [event.split("\n") for event in text.split("\n\n") if event]
    for name, line in events:
        assert name == f"event: {json.loads(line.removeprefix('data: '))['type']}"
    return [json.loads(line.removeprefix("data: ")) for _, line in events]


def stream_of(renderer: ResponseRenderer, chunks: list[Chunk]) -> bytes:
    shown = [renderer.render_start(), *(event for c in chunks for event in renderer.render(c, "1-1"))]
    return b"".join([*shown, renderer.render_end(USAGE)])


SAID = [chunk("Hel"), chunk(""), chunk("lo", "stop")]
THOUGHT = [chunk(reasoning="h"), chunk("a", reasoning="m"), chunk("b", "stop")]
CALLED = [
    chunk("ok", tool_calls=[call('{"a"', "look")]),
    chunk(tool_calls=[call(":1}"), call("{}", "see", 1)]),
    chunk("", "tool_calls"),
]
LOGPROBS = [
    chunk("a", logprobs=[logprob("a")]),
    chunk("", logprobs=[logprob("b")]),
    chunk("bc", "stop", logprobs=[logprob("c")]),
]


@pytest.mark.parametrize(
    ("chunks", "status", "items"),
    [
        (SAID, "completed", [("message", "completed")]),
        (THOUGHT, "completed", [("reasoning", "completed"), ("message", "completed")]),
        (
            CALLED,
            "completed",
            [("message", "completed"), ("function_call", "completed"), ("function_call", "completed")],
        ),
        (LOGPROBS, "completed", [("message", "completed")]),
        ([chunk("Hel", "length")], "incomplete", [("message", "incomplete")]),
        ([chunk("Hel", "deadline")], "incomplete", [("message", "incomplete")]),
        ([chunk(reasoning="h", finish_reason="length")], "incomplete", [("reasoning", "incomplete")]),
        (
            [chunk(reasoning="h", finish_reason="stop")],
            "completed",
            [("reasoning", "completed"), ("message", "completed")],
        ),
        (
            [chunk(tool_calls=[call("{", "look")], finish_reason="length")],
            "incomplete",
            [("function_call", "incomplete")],
        ),
        ([chunk("", "stop")], "completed", [("message", "completed")]),
        ([chunk("", "length")], "incomplete", [("message", "incomplete")]),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_a_stream_is_openais_and_ends_with_the_response_that_is_retrieved(
    chunks: list[Chunk], status: str, items: list[tuple[str, str]], background: bool
) -> None:
    asked = frame(background=background)
    renderer = ResponseRenderer(asked, starts_at_once=background)
    events = bodies(stream_of(renderer, chunks))
    assert [event["type"] for event in events[:2]] == [
        "response.created",
        "response.queued" if background else "response.in_progress",
    ]
    last = judge_events(events)
    assert last.status == status and [(item.type, item.status) for item in last.output] == items  # type: ignore[union-attr]
    assert (last.incomplete_details is not None) == (status == "incomplete")
    choice = Choice.join(0, chunks, cut_off="error")
    result = Result(job_id="j", status="finished", choices=[choice], usage=USAGE)
    assert asked.body_of(result) == events[-1]["response"]


def test_logprobs_of_text_that_was_held_back_come_with_the_text() -> None:
    events = bodies(stream_of(ResponseRenderer(frame()), LOGPROBS))
    deltas = [[entry["token"] for entry in e["logprobs"]] for e in events if e["type"] == "response.output_text.delta"]
    assert deltas == [["a"], ["b", "c"]]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert [entry["token"] for entry in done["logprobs"]] == ["a", "b", "c"]


def test_text_behind_a_call_is_a_message_of_its_own() -> None:
    chunks = [chunk("a"), chunk(tool_calls=[call("{}", "look")]), chunk("b", "tool_calls")]
    last = judge_events(bodies(stream_of(ResponseRenderer(frame()), chunks)))
    assert [item.type for item in last.output] == ["message", "function_call", "message"] and last.output_text == "ab"
    assert len({item.id for item in last.output}) == 3


@pytest.mark.parametrize("chunks", [SAID, THOUGHT, CALLED, LOGPROBS])
def test_whoever_has_seen_events_up_to_a_number_is_given_exactly_the_others(chunks: list[Chunk]) -> None:
    asked = frame(background=True)
    whole = bodies(stream_of(ResponseRenderer(asked, starts_at_once=True), chunks))
    for number in range(len(whole) + 2):
        rest = stream_of(ResponseRenderer(asked, starting_after=number, starts_at_once=True), chunks)
        assert bodies(rest) == whole[number + 1 :]
        assert rest.startswith(KEEP_ALIVE) == (number >= 1)


def test_a_job_that_fails_or_is_cancelled_ends_its_response() -> None:
    ends: list[tuple[JobOutcome, str, str]] = [("failed", "failed", "failed"), ("cancelled", "cancelled", "incomplete")]
    for outcome, status, kind in ends:
        renderer = ResponseRenderer(frame())
        shown = b"".join(renderer.render(chunk("a"), "1-1"))
        progress = StreamProgress("j", "1-1", StreamEnd(outcome, USAGE))
        events = bodies(shown + renderer.render_error(from_info(FAILURE), [progress]))
        last = judge_events(events)
        assert (last.status, events[-1]["type"]) == (status, f"response.{kind}")
        assert last.output_text == "a" and last.output[0].status == "incomplete"  # type: ignore[union-attr]
        choice = Choice(index=0, text="a", token_ids=[1], finish_reason="error")
        result = Result(job_id="j", status=outcome, choices=[choice], usage=USAGE, error=FAILURE)
        assert frame().body_of(result) == events[-1]["response"]
        if status == "failed":
            assert last.error is not None and (last.error.code, last.error.message) == ("server_error", FAILURE.message)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "invalid_prompt"),
        (ErrorCode.DEADLINE_EXCEEDED, "server_error"),
        (ErrorCode.MODEL_NOT_FOUND, "server_error"),
        (ErrorCode.ENGINE_ERROR, "server_error"),
    ],
)
def test_a_failure_is_the_prompts_only_where_the_request_was_wrong(code: ErrorCode, told: str) -> None:
    result = Result(job_id="j", status="failed", error=ErrorInfo(code=code, message="why"))
    error = parse_response(frame().body_of(result)).error
    assert error is not None and (error.code, error.message) == (told, "why")


def test_a_stream_that_a_gateway_ends_says_so_and_takes_no_number_that_another_would_miss() -> None:
    renderer = ResponseRenderer(frame(), starts_at_once=False)
    shown = bodies(b"".join(renderer.render(chunk("a"), "1-1")))
    progress = StreamProgress("j", "1-1", None)
    assert renderer.rest_path(progress) == f"/v1/responses/resp_j?stream=true&starting_after={len(shown) - 1}"
    [event] = bodies(renderer.render_error(from_info(FAILURE), [progress]))
    assert (event["type"], event["code"], event["message"]) == ("error", "poison", FAILURE.message)
    assert event["error"]["message"] == FAILURE.message  # which OpenAI's client raises
    assert event["sequence_number"] == len(shown) - 1
    waiting = ResponseRenderer(frame(background=True), starts_at_once=True)
    number = bodies(waiting.render_start())[-1]["sequence_number"]
    assert waiting.rest_path(progress).endswith(f"&starting_after={number}")
    assert [event["type"] for event in bodies(waiting.render_error(from_info(FAILURE), [progress]))] == ["error"]
    unseen = ResponseRenderer(frame(store=False))
    assert unseen.rest_path(progress) == "/v1/jobs/j"
    assert bodies(unseen.render_error(from_info(FAILURE), [progress]))[0]["type"] == "response.created"


def test_a_response_says_what_was_asked() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    body = frame(
        instructions="Be brief.",
        max_output_tokens=9,
        metadata={"a": "b"},
        temperature=0.5,
        top_p=0.9,
        text={"format": schema},
        store=False,
        previous_response_id="resp_i",
    ).body("in_progress")
    told = parse_response(body)
    assert (told.id, told.created_at, told.model, told.status, told.output) == ("resp_j", 5, "m", "in_progress", [])
    assert (told.instructions, told.max_output_tokens, told.metadata) == ("Be brief.", 9, {"a": "b"})
    assert (told.temperature, told.top_p, told.previous_response_id) == (0.5, 0.9, "resp_i")
    assert (body["text"]["format"], body["store"], told.usage) == (schema, False, None)
    for choice in ("auto", "required", "none", {"type": "function", "name": "look"}):
        body = frame(tools=[TOOL], tool_choice=choice).body("queued")
        assert parse_response(body).tools[0].type == "function"
        assert body["tool_choice"] == choice and body["tools"] == [{**TOOL, "description": None}]
    used = parse_response(frame().body("completed", usage=USAGE)).usage
    assert used is not None and (used.input_tokens, used.output_tokens, used.total_tokens) == (3, 4, 7)
    assert used.input_tokens_details.cached_tokens == 2
