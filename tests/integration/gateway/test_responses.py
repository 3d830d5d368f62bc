"""`/v1/responses` through the official client: answers, calls, conversations, batches, and what is refused."""

import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel

from tests.fakes.batch_runs import by_id, run
from tests.fakes.batches import jsonl
from tests.fakes.fake_worker import FakeWorker, say
from tests.fakes.gateways import RunningGateway, open_client, running_gateway
from tests.fakes.held_job import HeldJob
from tests.fakes.response_judge import bodies_of, judge_events, parse_item, parse_response
from tests.fakes.waiting import wait_until

URL = "/v1/responses"
TOOL: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}


def call(job: HeldJob) -> None:
    """One call; then, where its output is among the messages, an answer."""
    job.begin()
    if job.arguments["messages"][-1]["role"] == "tool":
        job.write(f"It says {job.arguments['messages'][-1]['content']}.", finish_reason="stop")
    else:
        function = {"name": "look", "arguments": '{"a":'}
        job.write("", num_tokens=1, reasoning="I must look.", reasoning_tokens=1)
        job.write("", num_tokens=1, tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": function}])
        job.write("", num_tokens=1, tool_calls=[{"index": 0, "function": {"arguments": "1}"}}])
        job.write("", finish_reason="tool_calls")
    job.end()


def test_a_text_is_answered_and_its_response_is_kept(client: openai.OpenAI, worker: FakeWorker) -> None:
    with worker.serving(say("Hello ", "you")):
        done = client.responses.create(
            model="fake", input="Hi", instructions="Be brief.", max_output_tokens=9, metadata={"a": "b"}
        )
    parse_response(done.to_dict())
    assert done.id.startswith("resp_") and (done.status, done.output_text) == ("completed", "Hello you")
    assert (done.instructions, done.max_output_tokens, done.metadata) == ("Be brief.", 9, {"a": "b"})
    assert done.usage is not None and done.usage.total_tokens == 2 + len("Hello you")
    assert client.responses.retrieve(done.id) == done


async def test_the_asyncio_client_is_answered_too(gateway: RunningGateway, worker: FakeWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        with worker.serving(say("a", "b")):
            done = await client.responses.create(model="fake", input="Hi")
            stream = await client.responses.create(model="fake", input="Hi", stream=True)
            events = bodies_of([event async for event in stream])
            async with client.responses.stream(model="fake", input="Hi") as helper:
                parsed = await helper.get_final_response()
        again = bodies_of([event async for event in await client.responses.retrieve(done.id, stream=True)])
    assert judge_events(events).output_text == judge_events(again).output_text == parsed.output_text == "ab"
    assert events[-1]["response"]["id"] != done.id == again[-1]["response"]["id"]


def test_what_a_response_asks_for_reaches_the_worker_as_a_chats_does(client: openai.OpenAI, worker: FakeWorker) -> None:
    seen: list[dict[str, Any]] = []

    def record(job: HeldJob) -> None:
        seen.append(job.arguments)
        say("x")(job)

    chat_tool: Any = {"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}
    with worker.serving(record):
        client.responses.create(model="fake", input="Hi", temperature=0.5, tools=[TOOL], extra_body={"top_k": 5})
        client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "Hi"}],
            temperature=0.5,
            tools=[chat_tool],
            extra_body={"top_k": 5},
        )
    assert seen[0] == seen[1]


def test_a_stream_is_what_openai_documents_and_its_helper_takes_it(client: openai.OpenAI, worker: FakeWorker) -> None:
    class Answer(BaseModel):
        city: str

    with worker.serving(say('{"city":', ' "Paris"}')):
        stream = client.responses.create(model="fake", input="Hi", stream=True)
        events = bodies_of(stream)
        with client.responses.stream(model="fake", input="Hi", text_format=Answer) as helper:
            helped: list[Any] = list(helper)
            final = helper.get_final_response()
        parsed = client.responses.parse(model="fake", input="Hi", text_format=Answer)
    last = judge_events(events)
    assert client.responses.retrieve(last.id).to_dict() == events[-1]["response"]
    assert [event["type"] for event in events] == [event.type for event in helped]
    assert final.output_parsed == parsed.output_parsed == Answer(city="Paris")
    assert final.text is not None and final.text.format is not None and final.text.format.type == "json_schema"


def test_a_call_is_made_and_its_output_is_answered(client: openai.OpenAI, worker: FakeWorker) -> None:
    with worker.serving(call):
        stream = client.responses.create(model="fake", input="Look.", tools=[TOOL], stream=True)
        first = judge_events(bodies_of(stream))
        thought, made = first.output
        assert thought.type == "reasoning" and thought.content and thought.content[0].text == "I must look."
        assert first.usage is not None and first.usage.output_tokens_details.reasoning_tokens == 1
        assert client.responses.retrieve(first.id).usage == first.usage
        assert isinstance(made, ResponseFunctionToolCall) and (made.name, made.arguments) == ("look", '{"a":1}')
        output: Any = {"type": "function_call_output", "call_id": made.call_id, "output": "18"}
        by_id = client.responses.create(model="fake", input=[output], tools=[TOOL], previous_response_id=first.id)
        sent: Any = [{"role": "user", "content": "Look."}, *(item.to_dict() for item in first.output), output]
        by_items = client.responses.create(model="fake", input=sent, tools=[TOOL])
    assert by_id.output_text == by_items.output_text == "It says 18."
    assert by_id.previous_response_id == first.id
    for response in (by_id, by_items):
        items = list(client.responses.input_items.list(response.id, order="asc"))
        assert [item.type for item in items] == ["message", "reasoning", "function_call", "function_call_output"]


def test_a_conversation_goes_on_without_the_earlier_instructions(client: openai.OpenAI, worker: FakeWorker) -> None:
    seen: list[list[tuple[str, str]]] = []

    def record(job: HeldJob) -> None:
        seen.append([(message["role"], message["content"]) for message in job.arguments["messages"]])
        say(f"answer {len(seen)}")(job)

    with worker.serving(record):
        last = None
        for at in range(3):
            last = client.responses.create(
                model="fake",
                input=f"question {at + 1}",
                instructions=f"rule {at + 1}",
                previous_response_id=last.id if last is not None else None,
            )
    assert last is not None
    said = [
        ("user", "question 1"),
        ("assistant", "answer 1"),
        ("user", "question 2"),
        ("assistant", "answer 2"),
        ("user", "question 3"),
    ]
    assert seen == [[("system", f"rule {at + 1}"), *said[: 2 * at + 1]] for at in range(3)]
    page = client.responses.input_items.list(last.id, limit=2)
    assert [item.id for item in page] == [item.id for item in client.responses.input_items.list(last.id)]
    raw = httpx.get(str(client.base_url) + f"responses/{last.id}/input_items?order=asc&limit=5").json()
    assert [parse_item(item).type for item in raw["data"]] == ["message"] * 5
    texts = [item["content"][0]["text"] for item in raw["data"]]
    assert texts == [text for _, text in said] and raw["has_more"] is False


def test_what_is_wrong_is_a_bad_request_that_names_the_field(client: openai.OpenAI, worker: FakeWorker) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"extra_body": {"conversation": "c"}}, "conversation"),
        ({"extra_body": {"prompt": {"id": "p"}}}, "prompt"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(**{"model": "fake", "input": "x", **fields})
        assert error.value.param == param and param.partition("[")[0] in str(error.value)
    with pytest.raises(openai.BadRequestError, match="only with stream=true"):
        client.responses.with_raw_response.retrieve("resp_x", starting_after=3)


def test_a_responses_job_shows_it_and_is_streamed_as_a_response(
    client: openai.OpenAI, worker: FakeWorker, gateway: RunningGateway
) -> None:
    with worker.serving(say("x")):
        done = client.responses.create(model="fake", input="x", store=False)
    shown = httpx.get(f"{gateway.url}/v1/jobs/{done.id}").json()
    assert shown["response"] == done.to_dict() and shown["url"] == URL
    refused = httpx.get(f"{gateway.url}/v1/jobs/{done.id}/stream")
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "job_is_a_response"


def test_responses_are_asked_for_in_batches_and_files(low: FakeWorker, redis_url: str, tmp_path: Path) -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    body = {"model": "fake", "input": "a b", "instructions": "Be brief.", "text": {"format": schema}}
    lines = [
        {"custom_id": "good", "method": "POST", "url": URL, "body": {**body, "stream": True}},
        {"custom_id": "bad", "method": "POST", "url": URL, "body": {**body, "input": [{"role": "user"}]}},
        {"custom_id": "alone", "method": "POST", "url": URL, "body": {**body, "previous_response_id": "resp_1"}},
    ]
    with (
        low.serving(say("Hello ", "you")),
        running_gateway(redis_url, files=str(tmp_path)) as gateway,
        open_client(gateway) as client,
    ):
        file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
        wait_until(lambda: client.batches.retrieve(made.id).status == "completed")
        batch = client.batches.retrieve(made.id)
        [good] = [json.loads(text) for text in client.files.content(str(batch.output_file_id)).text.splitlines()]
        errors = [json.loads(text) for text in client.files.content(str(batch.error_file_id)).text.splitlines()]
        files = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        files[0].write_bytes(jsonl(lines))
        run(redis_url, files, priority_class="low")
    for told in (good["response"]["body"], by_id(files[1])["good"]["response"]["body"]):
        response = parse_response(told)
        assert (response.output_text, response.instructions, response.model) == ("Hello you", "Be brief.", "fake")
        assert told["text"]["format"] == schema and told["store"] is False
    params = {error["custom_id"]: error["response"]["body"]["error"]["param"] for error in errors}
    assert params == {"bad": "input[0].content", "alone": "previous_response_id"}
