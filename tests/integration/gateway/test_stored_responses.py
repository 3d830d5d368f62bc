"""Responses in the background, and what can be done with those that are kept."""

import threading
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent

from producer.contract import ErrorCode, ErrorInfo, keys
from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker, say
from tests.fakes.gateways import RunningGateway, open_client
from tests.fakes.response_judge import bodies_of, judge_events, parse_response
from tests.fakes.waiting import wait_until

URL = "/v1/responses"


def test_what_cannot_be_continued_says_why(client: openai.OpenAI, worker: FakeWorker) -> None:
    def code(response_id: str) -> str | None:
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="fake", input="x", previous_response_id=response_id)
        assert error.value.param == "previous_response_id"
        return error.value.code

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
                with pytest.raises(openai.NotFoundError, match="there is no response"):
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


def test_a_response_under_a_key_is_found_again_when_what_it_continues_is_gone(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    with worker.serving(say("a")):
        first, other = (client.responses.create(model="fake", input=text) for text in ("x", "y"))
        ask: Any = {"model": "fake", "instructions": "Be brief.", "extra_headers": {"Idempotency-Key": "next"}}
        second = client.responses.create(**ask, input="z", previous_response_id=first.id)
        client.responses.delete(first.id)
        assert client.responses.create(**ask, input="z", previous_response_id=first.id) == second
        for changed in ({"previous_response_id": other.id}, {"instructions": "Be long."}, {"temperature": 0.5}):
            with pytest.raises(openai.APIStatusError) as error:
                client.responses.create(**{**ask, "input": "z", "previous_response_id": first.id, **changed})
            wanted = "previous_response_not_found" if "instructions" in changed else "idempotency_conflict"
            assert error.value.code == wanted
        third = client.responses.create(model="fake", input="w", previous_response_id=second.id)
    items = client.responses.input_items.list(third.id, order="asc")
    assert [item.to_dict()["content"][0]["text"] for item in items] == ["x", "a", "z", "a", "w"]  # type: ignore[index]
