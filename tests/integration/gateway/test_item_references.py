"""Items of earlier responses that a request names (`item_reference`), through the official client."""

from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from producer.contract import Message, keys
from producer.gateway.item_references import MAX_READS
from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker, say
from tests.fakes.gateways import RunningGateway, StartGateway, open_client
from tests.fakes.held_job import HeldJob
from tests.fakes.response_judge import bodies_of, judge_events

TOOL: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}


def named(*item_ids: str | None) -> list[Any]:
    return [{"type": "item_reference", "id": item_id} for item_id in item_ids]


def think_and_call(job: HeldJob) -> None:
    job.begin()
    job.write("", reasoning="I must look.")
    job.write("Wait.")
    job.write("", tool_calls=[{"index": 0, **CALL}])
    job.write(" There.", finish_reason="tool_calls")
    job.end()


@pytest.fixture
def first(client: openai.OpenAI, worker: FakeWorker) -> Response:
    """A thought, a text, a call and a text, as a stream has them."""
    with worker.serving(think_and_call):
        stream = client.responses.create(model="fake", input="Look.", tools=[TOOL], stream=True)
        return judge_events(bodies_of(stream))


def asked_of(worker: FakeWorker, ask: Callable[[], Response]) -> list[Message]:
    """The messages that a worker is asked."""
    asked: list[list[Message]] = []

    def record(job: HeldJob) -> None:
        asked.append([Message.model_validate(message) for message in job.arguments["messages"]])
        say("x")(job)

    with worker.serving(record):
        ask()
    [messages] = asked
    return messages


def test_items_that_are_named_are_what_the_model_is_asked(
    client: openai.OpenAI, worker: FakeWorker, first: Response
) -> None:
    ids = [item.id for item in first.output]
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "message"]
    question: Any = {"role": "user", "content": "Look."}
    output: Any = {"type": "function_call_output", "call_id": "c1", "output": "18"}
    turn = {"role": "assistant", "reasoning": "I must look.", "content": "Wait. There.", "tool_calls": [CALL]}
    items = [question, *named(*ids, ids[0]), output]
    messages = asked_of(worker, lambda: client.responses.create(model="fake", input=items, instructions="Be brief."))
    expected = [
        {"role": "system", "content": "Be brief."},
        question,
        turn,
        {"role": "tool", "tool_call_id": "c1", "content": "18"},
    ]
    assert messages == [Message.model_validate(message) for message in expected]


def test_what_a_continued_response_brings_is_not_there_twice(
    client: openai.OpenAI, worker: FakeWorker, first: Response
) -> None:
    output: Any = {"type": "function_call_output", "call_id": "c1", "output": "18"}
    with worker.serving(say("It says 18.")):
        second = client.responses.create(model="fake", input=[output], previous_response_id=first.id)
        other = client.responses.create(model="fake", input="Say something else.")
    items = named(*(item.id for item in [*first.output, *second.output, *other.output]))
    ask: dict[str, Any] = {"model": "fake", "input": [*items, {"role": "user", "content": "And?"}]}
    messages = asked_of(worker, lambda: client.responses.create(**ask, previous_response_id=second.id))
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant", "assistant", "user"]
    assert messages[3].text == messages[4].text == "It says 18."
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="fake", input=[*items, output | {"output": 5}], previous_response_id=second.id)
    assert error.value.param == f"input[{len(items)}].output"


def test_a_response_is_read_once_however_often_it_is_named(client: openai.OpenAI, worker: FakeWorker) -> None:
    with worker.serving(say("x")):
        ids = [client.responses.create(model="fake", input="x").output[0].id for _ in range(MAX_READS + 2)]
    question: Any = {"role": "user", "content": "y"}
    worker.connection.config_resetstat()
    messages = asked_of(
        worker, lambda: client.responses.create(model="fake", input=[*named(*ids), *named(*ids), question])
    )
    assert [message.role for message in messages] == ["assistant"] * len(ids) + ["user"]
    calls = worker.connection.info("commandstats")
    assert calls["cmdstat_getex"]["calls"] == len(ids)  # each one's record


def test_an_item_that_is_not_there_is_not_found(client: openai.OpenAI, worker: FakeWorker, first: Response) -> None:
    with worker.serving(say("x")):
        unstored, deleted, expired = (
            client.responses.create(model="fake", input="x", store=at > 0).output[0].id or "" for at in range(3)
        )
    job_ids = [item_id.removeprefix("msg_") for item_id in (deleted, expired)]
    client.responses.delete(f"resp_{job_ids[0]}")
    worker.connection.delete(f"rq:job:{job_ids[1]}", keys.result_key(job_ids[1]), f"rq:results:{job_ids[1]}")
    [listed] = [item.id for item in client.responses.input_items.list(first.id)]
    call_id = f"fc_{first.id.removeprefix('resp_')}"
    for item_id in (
        unstored,
        deleted,
        expired,
        listed,
        f"{call_id}_1",
        call_id,
        "msg_none",
        "msg_é",
        "msg_",
        "x",
        "",
    ):
        with pytest.raises(openai.NotFoundError, match="send the item itself") as error:
            client.responses.create(model="fake", input=[{"role": "user", "content": "x"}, *named(item_id)])
        assert (error.value.param, error.value.code) == ("input[1].id", "item_not_found"), item_id
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="fake", input=named(None))
    assert refused.value.param == "input[0].id"


def test_an_item_of_a_response_that_has_not_ended_is_to_be_waited_for(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    waiting = client.responses.create(model="fake", input="x", background=True)
    item = named(waiting.id.replace("resp_", "msg_"))
    with pytest.raises(openai.BadRequestError, match="wait for it") as error:
        client.responses.create(model="fake", input=item)
    assert (error.value.param, error.value.code) == ("input[0].id", "item_not_finished")
    client.responses.cancel(waiting.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="fake", input=item)


def test_an_item_is_its_keys_own(redis_url: str, gateway: RunningGateway, worker: FakeWorker) -> None:
    mine, other = new_key(redis_url, "mine"), new_key(redis_url, "other", "--tenant", "acme")
    with open_client(gateway, api_key=mine) as client, worker.serving(say("x")):
        done = client.responses.create(model="fake", input="x")
        items = [*named(done.output[0].id), {"role": "user", "content": "y"}]
        assert client.responses.create(model="fake", input=items).output_text == "x"
    with open_client(gateway, api_key=other) as client, pytest.raises(openai.NotFoundError) as error:
        client.responses.create(model="fake", input=items)
    assert error.value.code == "item_not_found"


def test_items_that_are_named_count_as_if_they_were_sent(start_gateway: StartGateway, worker: FakeWorker) -> None:
    with open_client(start_gateway(max_body_bytes=2048)) as client:
        with worker.serving(say("x" * 1000)):
            ids = [client.responses.create(model="fake", input="x").output[0].id for _ in range(2)]
            assert client.responses.create(model="fake", input=named(ids[0], ids[0], ids[0])).status == "completed"
        with pytest.raises(openai.APIStatusError, match="--max-body-bytes") as error:
            client.responses.create(model="fake", input=named(*ids))
    assert (error.value.status_code, error.value.code) == (413, "request_too_large")


def test_items_that_are_named_count_for_what_a_worker_takes(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.announce("fake", max_request_bytes=10_000)
    with worker.serving(say("x" * 6_000)):
        ids = [client.responses.create(model="fake", input="x").output[0].id for _ in range(2)]
        assert client.responses.create(model="fake", input=named(ids[0])).status == "completed"
    with pytest.raises(openai.BadRequestError, match="10000") as error:
        client.responses.create(model="fake", input=named(*ids))
    assert error.value.code == "context_length_exceeded"
