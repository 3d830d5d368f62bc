"""`/v1/responses` through the official client: whole, streamed, in the background, later, and what is refused."""

import json
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseStreamEvent
from pydantic import BaseModel

from producer.contract import ErrorCode, ErrorInfo, keys
from tests.fakes.batch_runs import by_id, run
from tests.fakes.batches import jsonl
from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway, StartGateway, open_client, running_gateway
from tests.fakes.held_job import HeldJob
from tests.fakes.response_judge import bodies_of, judge_events, parse_item, parse_response
from tests.fakes.waiting import wait_until

URL = "/v1/responses"
TOOL: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}


def say(*words: str) -> Any:
    """A worker that answers so."""

    def answer(job: HeldJob) -> None:
        job.begin()
        for word in words:
            job.write(word)
        job.write("", finish_reason="stop")
        job.end()

    return answer


def call(job: HeldJob) -> None:
    """One call; then, where its output is among the messages, an answer."""
    job.begin()
    if job.arguments["messages"][-1]["role"] == "tool":
        job.write(f"It says {job.arguments['messages'][-1]['content']}.", finish_reason="stop")
    else:
        function = {"name": "look", "arguments": '{"a":'}
        job.write("", num_tokens=1, reasoning="I must look.")
        job.write("", num_tokens=1, tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": function}])
        job.write("", num_tokens=1, tool_calls=[{"index": 0, "function": {"arguments": "1}"}}])
        job.write("", finish_reason="tool_calls")
    job.end()


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: ")]


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


def test_what_cannot_be_continued_says_why(client: openai.OpenAI, worker: FakeWorker) -> None:
    def refused(response_id: str) -> tuple[str | None, str | None]:
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="fake", input="x", previous_response_id=response_id)
        return error.value.code, error.value.param

    def code(response_id: str) -> str | None:
        found, param = refused(response_id)
        assert param == "previous_response_id"
        return found

    waiting = client.responses.create(model="fake", input="x", background=True)
    assert code("resp_none") == code("chatcmpl-x") == "previous_response_not_found"
    assert code(waiting.id) == "previous_response_not_finished"
    worker.claim().begin().end("failed", error=ErrorInfo(code=ErrorCode.POISON, message="no"))
    assert code(waiting.id) == "previous_response_failed"
    cut_off = client.responses.create(model="fake", input="x", background=True)
    job = worker.claim().begin()
    function = {"name": "look", "arguments": '{"a'}
    job.write(
        "", tool_calls=[{"index": 0, "id": "c", "type": "function", "function": function}], finish_reason="length"
    )
    job.end()
    assert code(cut_off.id) == "previous_response_incomplete"
    assert client.responses.retrieve(cut_off.id).status == "incomplete"


def test_a_response_in_the_background_is_queued_runs_and_ends(client: openai.OpenAI, worker: FakeWorker) -> None:
    asked = client.responses.create(model="fake", input="x", background=True)
    assert (asked.status, asked.background, asked.output) == ("queued", True, [])
    job = worker.claim().begin()
    job.write("Hel")
    assert client.responses.retrieve(asked.id).status == "in_progress"
    job.write("lo", finish_reason="length")
    job.end()
    done = client.responses.retrieve(asked.id)
    assert (done.status, done.output_text) == ("incomplete", "Hello")
    assert done.incomplete_details is not None and done.incomplete_details.reason == "max_output_tokens"
    parse_response(done.to_dict())


def test_a_response_in_the_background_can_be_cancelled(client: openai.OpenAI, worker: FakeWorker) -> None:
    queued = client.responses.create(model="fake", input="x", background=True)
    assert client.responses.cancel(queued.id).status == "cancelled"
    assert client.responses.cancel(queued.id) == client.responses.retrieve(queued.id)
    events = bodies_of(client.responses.retrieve(queued.id, stream=True))
    assert judge_events(events).status == "cancelled" and events[-1]["type"] == "response.incomplete"
    with worker.serving(say("x")):
        done = client.responses.create(model="fake", input="x", background=True)
        wait_until(lambda: client.responses.retrieve(done.id).status == "completed")
        assert client.responses.cancel(done.id).status == "completed"
        plain = client.responses.create(model="fake", input="x")
        with pytest.raises(openai.BadRequestError, match="not asked for with background"):
            client.responses.cancel(plain.id)


def test_a_running_response_that_is_cancelled_keeps_what_it_said(client: openai.OpenAI, worker: FakeWorker) -> None:
    stream = client.responses.create(model="fake", input="x", background=True, stream=True)
    job = worker.claim().begin()
    job.write("Hel")
    events: list[ResponseStreamEvent] = []
    for event in stream:
        events.append(event)
        if event.type == "response.output_text.delta":
            break
    asked = events[0]
    assert asked.type == "response.created" and asked.response.status == "queued"
    cancelled: list[Any] = []
    cancelling = threading.Thread(target=lambda: cancelled.append(client.responses.cancel(asked.response.id)))
    cancelling.start()
    wait_until(job.is_cancelled)
    job.write("", finish_reason="cancelled")
    job.end("cancelled")
    cancelling.join(30)
    [response] = cancelled
    assert (response.status, response.output_text) == ("cancelled", "Hel")
    events += list(stream)
    assert judge_events(bodies_of(events)) == response


def test_a_failure_is_a_status_before_the_stream_begins_and_the_responses_own_end_after(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    too_long = ErrorInfo(code=ErrorCode.CONTEXT_LENGTH_EXCEEDED, message="messages: too long", param="messages")

    def fail(job: HeldJob) -> None:
        job.begin()
        if job.arguments["messages"][-1]["content"] == "late":
            job.write("a")
        job.end("failed", error=too_long)

    with worker.serving(fail):
        for is_streamed in (False, True):
            with pytest.raises(openai.BadRequestError, match="input: too long") as error:
                client.responses.create(model="fake", input="early", stream=is_streamed)
            assert (error.value.code, error.value.param) == ("context_length_exceeded", "input")
        for input, background in (("late", False), ("late", True), ("early", True)):
            stream = client.responses.create(model="fake", input=input, stream=True, background=background)
            events = bodies_of(stream)
            last = judge_events(events)
            assert last.status == "failed" and last.error is not None and last.error.code == "invalid_prompt"
            assert last.error.message == "input: too long"
            assert client.responses.retrieve(last.id).to_dict() == events[-1]["response"]


def test_a_stream_is_gone_on_with_behind_any_event(client: openai.OpenAI, worker: FakeWorker) -> None:
    with worker.serving(say("a", "b", "c")):
        stream = client.responses.create(model="fake", input="x", stream=True)
        whole = bodies_of(stream)
    response_id = whole[0]["response"]["id"]
    for number in range(len(whole)):
        rest = client.responses.retrieve(response_id, stream=True, starting_after=number)
        assert bodies_of(rest) == whole[number + 1 :]
    again = client.responses.retrieve(response_id, stream=True)
    assert bodies_of(again) == whole
    with client.responses.stream(response_id=response_id, starting_after=3) as helper:
        assert [event.sequence_number for event in helper] == list(range(4, len(whole)))
        assert helper.get_final_response().output_text == "abc"


def test_a_stream_that_is_left_goes_on_live_on_another_gateway(start_gateway: StartGateway, worker: FakeWorker) -> None:
    with open_client(start_gateway()) as here, open_client(start_gateway()) as there:
        stream = here.responses.create(model="fake", input="x", background=True, stream=True)
        events = bodies_of(next(stream) for _ in range(2))
        assert [event["type"] for event in events] == ["response.created", "response.queued"]
        job = worker.claim().begin()
        job.write("a")
        while events[-1]["type"] != "response.output_text.delta":
            events += bodies_of([next(stream)])
        stream.close()
        response_id = events[0]["response"]["id"]
        rest = there.responses.retrieve(response_id, stream=True, starting_after=events[-1]["sequence_number"])
        job.write("b")
        events += bodies_of([next(rest)])
        assert not job.is_cancelled()
        job.hand_over()
        next_job = worker.claim().begin()
        next_job.write("c", finish_reason="stop")
        next_job.end()
        events += bodies_of(rest)
    assert judge_events(events).output_text == "abc"


@pytest.mark.parametrize("ends_by", ["time", "stop"])
def test_a_stream_that_its_gateway_ends_says_where_the_rest_is(
    start_gateway: StartGateway, worker: FakeWorker, ends_by: str
) -> None:
    gateway = start_gateway(request_timeout_seconds=1.0 if ends_by == "time" else 60.0)
    with open_client(gateway) as here, open_client(start_gateway()) as there:
        stream = here.responses.create(model="fake", input="x", background=True, stream=True)
        job = worker.claim().begin()
        job.write("a")
        events = bodies_of([next(stream)])
        if ends_by == "stop":
            gateway.begin_stop()
        with pytest.raises(openai.APIError) as ended:
            for event in stream:
                events += bodies_of([event])
        response_id, last = events[0]["response"]["id"], events[-1]["sequence_number"]
        assert f"GET /v1/responses/{response_id}?stream=true&starting_after={last}" in str(ended.value)
        assert not job.is_cancelled()
        job.write("b", finish_reason="stop")
        job.end()
        events += bodies_of(there.responses.retrieve(response_id, stream=True, starting_after=last))
    assert judge_events(events).output_text == "ab"


def test_who_leaves_a_stream_cancels_it_unless_it_is_in_the_background(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    for background in (False, True):
        stream = client.responses.create(model="fake", input="x", stream=True, background=background)
        job = worker.claim().begin()
        job.write("a")
        event = next(stream)
        assert event.type == "response.created"
        stream.close()
        if not background:
            wait_until(job.is_cancelled)
        job.write("", finish_reason="stop")
        job.end("finished" if background else "cancelled")
        status = client.responses.retrieve(event.response.id).status
        assert status == ("completed" if background else "cancelled")


def test_a_response_that_began_anew_is_never_spliced(client: openai.OpenAI, worker: FakeWorker) -> None:
    stream = client.responses.create(model="fake", input="x", background=True, stream=True)
    job = worker.claim().begin()
    job.write("a")
    seen = bodies_of(next(stream) for _ in range(6))
    assert seen[-1]["type"] == "response.output_text.delta"
    job.hand_over()
    again = worker.claim().begin(reset=True)
    with pytest.raises(openai.APIError, match="begin anew"):
        list(stream)
    again.write("b")
    again.write("c", finish_reason="stop")
    again.end()
    response_id = seen[0]["response"]["id"]
    with pytest.raises(openai.APIError, match="begin anew"):
        list(client.responses.retrieve(response_id, stream=True, starting_after=5))
    fresh = bodies_of(client.responses.retrieve(response_id, stream=True))
    assert judge_events(fresh).output_text == client.responses.retrieve(response_id).output_text == "bc"


def test_events_are_kept_for_an_hour_and_the_response_for_as_long_as_its_result(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    asked = client.responses.create(model="fake", input="x", background=True)
    job = worker.claim().begin()
    job.write("ab", finish_reason="stop")
    job.end()
    job.expire_stream()
    with pytest.raises(openai.NotFoundError, match="kept for 1 h") as error:
        client.responses.retrieve(asked.id, stream=True, starting_after=2)
    assert error.value.code == "events_expired"
    events = bodies_of(client.responses.retrieve(asked.id, stream=True))
    assert judge_events(events) == client.responses.retrieve(asked.id)
    job.connection.delete(f"rq:job:{job.job_id}", keys.result_key(job.job_id))
    with pytest.raises(openai.NotFoundError, match="kept for 24 h"):
        client.responses.retrieve(asked.id)


def test_a_response_that_was_deleted_or_not_to_be_stored_is_not_there(
    client: openai.OpenAI, worker: FakeWorker, gateway: RunningGateway
) -> None:
    def is_gone(response_id: str) -> bool:
        for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError) as error:
                ask(response_id)
            assert error.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError):
            client.responses.input_items.list(response_id)
        return True

    with worker.serving(say("x")):
        unstored = client.responses.create(model="fake", input="x", store=False)
        stored = client.responses.create(model="fake", input="x")
    assert is_gone(unstored.id)
    assert client.responses.retrieve(stored.id).output_text == "x"
    deleted = httpx.delete(f"{gateway.url}{URL}/{stored.id}").json()
    assert deleted == {"id": stored.id, "object": "response", "deleted": True}
    assert is_gone(stored.id)
    job_id = stored.id.removeprefix("resp_")
    left = [f"rq:job:{job_id}", keys.result_key(job_id), keys.stream_key(job_id), f"rq:results:{job_id}"]
    assert worker.connection.exists(*left) == 0
    waiting = client.responses.create(model="fake", input="x", background=True)
    client.responses.delete(waiting.id)
    assert is_gone(waiting.id)
    assert worker.connection.llen(f"rq:queue:{keys.DEFAULT_QUEUE}") == 0


def test_a_response_is_its_keys_own(redis_url: str, gateway: RunningGateway, worker: FakeWorker) -> None:
    mine, other = new_key(redis_url, "mine"), new_key(redis_url, "other", "--tenant", "acme")
    operator = new_key(redis_url, "ops", "--operator")
    with open_client(gateway, api_key=mine) as client, worker.serving(say("x")):
        done = client.responses.create(model="fake", input="x")
    for key, finds in ((mine, True), (operator, True), (other, False)):
        with open_client(gateway, api_key=key) as client:
            if finds:
                assert client.responses.retrieve(done.id) == done
                continue
            for ask in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
                with pytest.raises(openai.NotFoundError, match="not known here"):
                    ask(done.id)
            with pytest.raises(openai.NotFoundError):
                client.responses.input_items.list(done.id)
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(done.id, stream=True)
            with pytest.raises(openai.BadRequestError) as error:
                client.responses.create(model="fake", input="x", previous_response_id=done.id)
            assert error.value.code == "previous_response_not_found"


def test_a_response_under_a_key_is_the_same_when_it_is_asked_again(client: openai.OpenAI, worker: FakeWorker) -> None:
    headers = {"Idempotency-Key": "one"}
    asked = client.responses.create(model="fake", input="x", background=True, extra_headers=headers)
    again = client.responses.create(model="fake", input="x", background=True, extra_headers=headers)
    assert (again.id, again.status) == (asked.id, "queued")
    with pytest.raises(openai.ConflictError):
        client.responses.create(model="fake", input="y", background=True, extra_headers=headers)
    with pytest.raises(openai.ConflictError):
        messages: Any = [{"role": "user", "content": "x"}]
        client.chat.completions.create(model="fake", messages=messages, extra_headers=headers)
    with worker.serving(say("a", "b")):
        stream = client.responses.create(model="fake", input="x", background=True, stream=True, extra_headers=headers)
        assert judge_events(bodies_of(stream)).id == asked.id


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
