"""Log-probabilities, echoes, tool calls, thoughts and structured answers, as the official client reads them."""

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from producer.contract import Choice, Chunk, PromptEcho, TokenLogprob, TopLogprob, keys
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.held_job import HeldJob

ASK: Any = [{"role": "user", "content": "x"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TOKENS = [
    TokenLogprob(
        token_id=number,
        token=text,
        bytes=list(text.encode()),
        logprob=-0.5,
        top=[TopLogprob(token_id=number, token=text, bytes=list(text.encode()), logprob=-0.5)],
    )
    for number, text in enumerate(("a", "bc"))
]


def answer(job: HeldJob, *chunks: dict[str, Any], prompt: PromptEcho | None = None) -> None:
    """These chunks, and the result that they make."""
    job.begin()
    for at, fields in enumerate(chunks):
        offset = sum(len(earlier.token_ids) for earlier in job.chunks)
        chunk = Chunk(job_id=job.job_id, token_offset=offset, prompt=prompt if at == 0 else None, **fields)
        job.chunks.append(chunk)
        job.seq += 1
        job._append(keys.DATA_FIELD, chunk.to_wire(), publish=True)
    job.write_done("finished")
    choice = Choice.join(0, job.chunks, cut_off="error")
    result = job.result("finished").model_copy(update={"choices": [choice], "prompt": prompt})
    with job.connection.pipeline() as pipe:
        pipe.set(keys.result_key(job.job_id), result.to_wire())
        pipe.hset(f"rq:job:{job.job_id}", "status", "finished")
        pipe.publish(keys.results_channel(job.queue), result.model_copy(update={"choices": []}).to_wire())
        pipe.execute()


def with_logprobs(job: HeldJob) -> None:
    echo = PromptEcho(text="x", token_ids=[9], logprobs=[None]) if job.arguments.get("echo") else None
    first = {"text": "a", "token_ids": [0], "logprobs": TOKENS[:1]}
    answer(job, first, {"text": "bc", "token_ids": [1], "logprobs": TOKENS[1:], "finish_reason": "stop"}, prompt=echo)


def with_a_call(job: HeldJob) -> None:
    call: Any = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    pieces: Any = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city"', ':"Oslo"}')]
    answer(
        job,
        {"reasoning": "hm", "token_ids": [1], "reasoning_tokens": 1},
        {"tool_calls": [call], "token_ids": [2]},
        *({"tool_calls": [piece], "token_ids": [3]} for piece in pieces),
        {"finish_reason": "tool_calls"},
    )


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_chats_logprobs(client: openai.OpenAI, worker: FakeWorker, is_streamed: bool) -> None:
    with worker.serving(with_logprobs):
        got: Any = client.chat.completions.create(
            model="fake", messages=ASK, logprobs=True, top_logprobs=1, stream=is_streamed
        )
        choices = [chunk.choices[0] for chunk in got] if is_streamed else [got.choices[0]]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    got_tokens = [(token.token, token.logprob, token.bytes) for token in tokens]
    assert got_tokens == [("a", -0.5, [97]), ("bc", -0.5, [98, 99])]
    assert tokens[0].top_logprobs[0].token == "a"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_completions_logprobs_behind_its_echo(client: openai.OpenAI, worker: FakeWorker, is_streamed: bool) -> None:
    with worker.serving(with_logprobs):
        got: Any = client.completions.create(model="fake", prompt="x", logprobs=1, echo=True, stream=is_streamed)
        choices = [chunk.choices[0] for chunk in got] if is_streamed else [got.choices[0]]
    assert "".join(choice.text for choice in choices) == "xabc"
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    assert [value for part in logprobs for value in part.token_logprobs] == [None, -0.5, -0.5]
    assert [value for part in logprobs for value in part.text_offset] == [0, 1, 2]
    assert [value for part in logprobs for value in part.top_logprobs] == [None, {"a": -0.5}, {"bc": -0.5}]


def test_a_tool_call_whole_and_in_pieces(client: openai.OpenAI, worker: FakeWorker) -> None:
    with worker.serving(with_a_call):
        whole = client.chat.completions.create(model="fake", messages=ASK, tools=[TOOL])
        *told, last = client.chat.completions.create(
            model="fake", messages=ASK, tools=[TOOL], stream=True, stream_options={"include_usage": True}
        )
    chunks = [chunk.choices[0] for chunk in told]
    for usage in (whole.usage, last.usage):
        assert usage and usage.completion_tokens_details and usage.completion_tokens_details.reasoning_tokens == 1
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls" and message.content is None and message.tool_calls
    function: Any = message.tool_calls[0]
    assert (function.id, function.function.name) == ("call_1", "weather")
    assert function.function.arguments == '{"city":"Oslo"}'
    assert message.to_dict()["reasoning_content"] == "hm"
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert calls[0].id == "call_1" and calls[0].function is not None and calls[0].function.name == "weather"
    assert "".join(call.function.arguments or "" for call in calls if call.function) == '{"city":"Oslo"}'
    assert [chunk.delta.to_dict().get("reasoning_content") for chunk in chunks][1] == "hm"
    assert chunks[-1].finish_reason == "tool_calls"


def test_a_structured_answer_is_parsed(client: openai.OpenAI, worker: FakeWorker) -> None:
    class City(BaseModel):
        name: str
        inhabitants: int

    seen: list[Any] = []

    def as_json(job: HeldJob) -> None:
        seen.append(job.arguments["response_format"])
        answer(job, {"text": '{"name":"Oslo","inhabitants":5}', "token_ids": [1], "finish_reason": "stop"})

    with worker.serving(as_json):
        done = client.chat.completions.parse(model="fake", messages=ASK, response_format=City)
    assert done.choices[0].message.parsed == City(name="Oslo", inhabitants=5)
    assert seen[0]["type"] == "json_schema" and "inhabitants" in str(seen[0])
