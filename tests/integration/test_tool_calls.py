"""Calls of tools from the client through the worker and back, on a fake engine whose answers are scripted."""

import json
from typing import Any

import pytest
import redis

from producer import Client, JobFailedError
from producer.contract import Chunk, join_deltas, keys
from tests.fakes.chat_templates import HERMES, LLAMA, QWEN3
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.worker_runs import WorkerThread

CALL = ["<tool_", 'call>\n{"name": "add", ', '"arguments": {"a', '": 1, ', '"b": 2}}\n</tool', "_call>"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "1 + 2?"}], "max_tokens": 100}


def run(redis_url: str, script: list[str], template: str = HERMES, **fields: Any) -> tuple[list[Chunk], Any]:
    """The chunks and the first choice of one job's result."""
    settings = fields.pop("settings", {})
    engine = FakeEngine(chat_template=template, script=script)
    with WorkerThread(redis_url, engine, **settings), Client(redis_url) as client:
        job = client.submit(**{**CHAT, **fields}, job_id="job-1")
        chunks = list(job.stream())
        result = job.result(timeout=30)
    assert result.status == "finished", result.error
    return chunks, result.choices[0]


def test_a_call_is_streamed_in_pieces_and_whole_in_the_result(redis_url: str) -> None:
    chunks, choice = run(redis_url, ["Let me ", "see.\n", *CALL], tools=TOOLS)
    assert choice.text == "Let me see." and choice.finish_reason == "tool_calls"
    (call,) = choice.tool_calls
    assert call["function"] == {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert join_deltas(delta for chunk in chunks for delta in chunk.tool_calls or ()) == [call]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == choice.token_ids == list(range(8))
    assert chunks[-1].finish_reason == "tool_calls"


def test_every_attempt_gives_a_call_the_same_id_and_every_choice_its_own(redis_url: str) -> None:
    engine = FakeEngine(chat_template=HERMES, script=CALL * 2)
    with WorkerThread(redis_url, engine), Client(redis_url) as client:
        first = client.submit(**CHAT, tools=TOOLS, n=2, job_id="job-1").result(timeout=30)
    with redis.Redis.from_url(redis_url) as connection:
        connection.delete(keys.result_key("job-1"), keys.stream_key("job-1"), "rq:job:job-1")
    with WorkerThread(redis_url, FakeEngine(chat_template=HERMES, script=CALL * 2)), Client(redis_url) as client:
        again = client.submit(**CHAT, tools=TOOLS, n=2, job_id="job-1").result(timeout=30)
    ids = [call["id"] for choice in first.choices for call in choice.tool_calls or ()]
    assert len(set(ids)) == 4
    assert ids == [call["id"] for choice in again.choices for call in choice.tool_calls or ()]


def test_llamas_calls_need_no_marker(redis_url: str) -> None:
    _, choice = run(
        redis_url, ['{"name": "add", ', '"parameters": {}}'], LLAMA, tools=TOOLS, settings={"tool_parser": "llama"}
    )
    assert (choice.text, choice.tool_calls[0]["function"]) == ("", {"name": "add", "arguments": "{}"})


def test_a_thought_is_told_from_the_answer_without_tools_too(redis_url: str) -> None:
    chunks, choice = run(redis_url, ["<think>", "\nIt is", " 3.\n</th", "ink>\n\n", "3", ""], QWEN3)
    assert (choice.text, choice.reasoning, choice.tool_calls, choice.finish_reason) == ("3", "It is 3.", None, "stop")
    assert "".join(chunk.reasoning or "" for chunk in chunks) == "It is 3."
    assert sum(chunk.reasoning_tokens or 0 for chunk in chunks) == 4


@pytest.mark.parametrize(
    ("fields", "settings"),
    [({}, {}), ({"tools": TOOLS, "tool_choice": "none"}, {}), ({"tools": TOOLS}, {"tool_parser": "none"})],
    ids=["no tools", "choice none", "parser none"],
)
def test_where_calls_are_not_asked_for_the_text_is_all_of_it(
    redis_url: str, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    _, choice = run(redis_url, CALL, **fields, settings=settings)
    assert (choice.text, choice.tool_calls, choice.finish_reason) == ("".join(CALL), None, "stop")


def test_one_call_at_most_is_given_where_calls_must_not_be_parallel(redis_url: str) -> None:
    _, choice = run(redis_url, [*CALL, "\n", *CALL], tools=TOOLS, parallel_tool_calls=False)
    assert len(choice.tool_calls) == 1 and choice.text == ""


def test_a_worker_that_could_not_read_the_calls_refuses_tools(redis_url: str) -> None:
    template = "{% for tool in tools or [] %}{{ tool }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    with (
        WorkerThread(redis_url, FakeEngine(chat_template=template)),
        Client(redis_url) as client,
        pytest.raises(JobFailedError, match="--tool-parser") as caught,
    ):
        client.submit(**CHAT, tools=TOOLS).result(timeout=30)
    result = caught.value.result
    error = result.error if result is not None else None
    assert error is not None and (error.code, error.param) == ("unsupported", "tools")


def test_a_template_of_the_operators_own_takes_the_place_of_the_models(redis_url: str, tmp_path: Any) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(HERMES)
    settings = {"chat_template": str(path)}
    _, choice = run(redis_url, CALL, "no place for tools", tools=TOOLS, settings=settings)
    assert json.loads(choice.tool_calls[0]["function"]["arguments"]) == {"a": 1, "b": 2}
