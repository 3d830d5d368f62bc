"""Events of `/v1/responses`: how they end, and that they are read on behind any of them, on any gateway."""

import openai
import pytest

from producer.contract import ErrorCode, ErrorInfo, keys
from tests.fakes.fake_worker import FakeWorker, say
from tests.fakes.gateways import StartGateway, open_client
from tests.fakes.held_job import HeldJob
from tests.fakes.response_judge import bodies_of, judge_events
from tests.fakes.waiting import wait_until


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
    gateway = start_gateway(request_timeout_seconds=5.0 if ends_by == "time" else 60.0)
    with open_client(gateway) as here, open_client(start_gateway()) as there:
        stream = here.responses.create(model="fake", input="x", background=True, stream=True)
        job = worker.claim().begin()
        job.write("a")
        events = bodies_of([next(stream)])
        while events[-1]["type"] != "response.output_text.delta":  # else the gateway may not have read it yet
            events += bodies_of([next(stream)])
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
    with pytest.raises(openai.APIError, match="is void; read it from the beginning"):
        list(stream)
    again.write("b")
    again.write("c", finish_reason="stop")
    again.end()
    response_id = seen[0]["response"]["id"]
    with pytest.raises(openai.APIError, match="is void; read it from the beginning"):
        list(client.responses.retrieve(response_id, stream=True, starting_after=5))
    fresh = bodies_of(client.responses.retrieve(response_id, stream=True))
    assert [event["sequence_number"] for event in fresh] == [0, 1, *range(2_000_002, 2_000_000 + len(fresh))]
    renumbered = [{**event, "sequence_number": at} for at, event in enumerate(fresh)]
    assert judge_events(renumbered).output_text == client.responses.retrieve(response_id).output_text == "bc"
    for at, event in enumerate(fresh):
        rest = client.responses.retrieve(response_id, stream=True, starting_after=event["sequence_number"])
        assert bodies_of(rest) == fresh[at + 1 :]
    with client.responses.stream(response_id=response_id, starting_after=seen[-1]["sequence_number"]) as helper:
        assert [event.sequence_number for event in helper] == [event["sequence_number"] for event in fresh[2:]]


def test_a_response_that_began_anew_and_failed_at_once_is_read_from_the_beginning(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    asked = client.responses.create(model="fake", input="x", background=True)
    job = worker.claim().begin()
    job.write("a")
    job.hand_over()
    worker.claim().begin(reset=True).end("failed", error=ErrorInfo(code=ErrorCode.POISON, message="no"))
    with pytest.raises(openai.APIError, match="is void; read it from the beginning"):
        list(client.responses.retrieve(asked.id, stream=True, starting_after=5))
    *_, failed = bodies_of(client.responses.retrieve(asked.id, stream=True, starting_after=1))
    assert (failed["type"], failed["sequence_number"]) == ("response.failed", 2_000_003)


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
