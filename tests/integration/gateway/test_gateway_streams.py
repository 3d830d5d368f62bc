"""Streamed answers through the official client, and what is on the wire; a job's stream again from a cursor on."""

import json
import socket
import threading
from typing import Any

import httpx2 as httpx
import openai
import pytest

from producer.contract import ErrorCode, ErrorInfo
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway, StartGateway, open_client
from tests.fakes.held_job import HeldJob
from tests.fakes.waiting import wait_until

HELLO: Any = [{"role": "user", "content": "one two"}]


def events(text: str) -> list[Any]:
    """The JSON of every event but the last, which must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_a_chat_is_streamed_with_its_role_its_words_its_end_and_its_usage(
    client: openai.OpenAI, echoing: FakeWorker
) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta.to_dict() for chunk in chunks[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "one "}, {"content": "two "}, {}]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 10


def test_a_completion_is_streamed_for_every_choice_of_every_prompt(client: openai.OpenAI, echoing: FakeWorker) -> None:
    texts: dict[int, str] = {}
    for chunk in client.completions.create(model="fake", prompt=["a b", "c"], n=2, stream=True):
        assert chunk.usage is None and "usage" not in chunk.model_fields_set
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "a b ", 1: "a b ", 2: "c ", 3: "c "}


async def test_the_asyncio_client_streams_too(gateway: RunningGateway, echoing: FakeWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="fake", messages=HELLO, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "one two "


def test_the_wire_has_no_ids_and_a_silent_stream_is_kept_alive(start_gateway: StartGateway, worker: FakeWorker) -> None:
    gateway = start_gateway(keep_alive_seconds=0.05)
    with httpx.stream(
        "POST", f"{gateway.url}/v1/completions", json={"model": "fake", "prompt": "x", "stream": True}, timeout=30
    ) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        job = worker.claim()
        lines = response.iter_lines()
        assert [next(lines) for _ in range(3)] == [": keep-alive"] * 3
        assert "promptmill_open_streams 1.0" in httpx.get(f"{gateway.url}/metrics").text
        job.begin().write("a", finish_reason="stop")
        job.end()
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    assert not [line for line in rest if line.startswith(("id:", "retry:"))]
    first = json.loads(next(line for line in rest if line.startswith("data: "))[6:])
    assert first["promptmill"] == {"job_id": response.headers["x-promptmill-job-id"], "cursor": "1-1"}
    wait_until(lambda: "promptmill_open_streams 0.0" in httpx.get(f"{gateway.url}/metrics").text)


def test_the_client_reads_a_stream_that_was_kept_alive(start_gateway: StartGateway, worker: FakeWorker) -> None:
    with open_client(start_gateway(keep_alive_seconds=0.05)) as client:
        stream = client.completions.create(model="fake", prompt="x", stream=True)
        job = worker.claim().begin()
        job.write("a")
        texts = [next(iter(stream)).choices[0].text]
        later = threading.Timer(0.3, lambda: (job.write("b", finish_reason="stop"), job.end()))
        later.start()
        texts += [chunk.choices[0].text for chunk in stream]
        later.join()
    assert texts == ["a", "b"]


def test_an_early_failure_has_a_status_and_a_late_one_an_event(gateway: RunningGateway, worker: FakeWorker) -> None:
    error = ErrorInfo(code=ErrorCode.CONTEXT_LENGTH_EXCEEDED, message="too long", param="prompt")

    def fail_at_once(job: HeldJob) -> None:
        job.begin().end("failed", error=error)

    def fail_later(job: HeldJob) -> None:
        job.begin().write("a")
        job.end("failed", error=ErrorInfo(code=ErrorCode.POISON, message="three workers died of it"))

    with open_client(gateway) as client:
        with worker.serving(fail_at_once), pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="fake", prompt="x", stream=True)
        assert refused.value.code == "context_length_exceeded"
        seen = []
        with worker.serving(fail_later), pytest.raises(openai.APIError, match="three workers died of it"):
            for chunk in client.completions.create(model="fake", prompt="x", stream=True):
                seen.append(chunk.choices[0].text)
        assert seen == ["a"]


def test_a_stream_whose_attempt_began_anew_says_so_instead_of_repeating(
    client: openai.OpenAI, worker: FakeWorker, gateway: RunningGateway
) -> None:
    stream = client.completions.create(model="fake", prompt="x", stream=True)
    job = worker.claim().begin()
    job.write("a")
    assert next(iter(stream)).choices[0].text == "a"
    job.hand_over()
    again = worker.claim().begin(reset=True)
    again.write("b", finish_reason="stop")
    again.end()
    with pytest.raises(openai.APIError, match="is void; ask again"):
        list(stream)
    seen = events(httpx.get(f"{gateway.url}/v1/jobs/{job.job_id}/stream?after=1-1", timeout=30).text)
    assert seen[0]["promptmill"]["reset"] and seen[0]["choices"] == []
    assert seen[1]["choices"][0]["text"] == "b"


def test_a_client_that_does_not_read_is_held_to_the_time_of_a_request(
    start_gateway: StartGateway, worker: FakeWorker
) -> None:
    gateway = start_gateway(request_timeout_seconds=2.0, keep_alive_seconds=0.05)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", gateway.port))
        body = json.dumps({"model": "fake", "prompt": "x", "stream": True})
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        job = worker.claim().begin()
        for _ in range(8):
            job.write("a" * (1 << 20), num_tokens=1)
        wait_until(job.is_cancelled)


def test_who_leaves_cancels_the_job_unless_it_is_detached(gateway: RunningGateway, worker: FakeWorker) -> None:
    for headers, is_cancelled in (({}, True), ({"X-Promptmill-Detach": "true"}, False)):
        with open_client(gateway) as client:
            stream = client.completions.create(model="fake", prompt="x", stream=True, extra_headers=headers)
            job = worker.claim().begin()
            job.write("a")
            next(iter(stream))
            stream.close()
        if is_cancelled:
            wait_until(job.is_cancelled)
        else:
            job.write("b", finish_reason="stop")
            job.end()
            text = httpx.get(f"{gateway.url}/v1/jobs/{job.job_id}/stream?after=1-1", timeout=30).text
            assert [event["choices"][0]["text"] for event in events(text)[:-1]] == ["b"]
            assert text.endswith("data: [DONE]\n\n")


def test_a_job_is_looked_up_and_cancelled_by_either_of_its_names(gateway: RunningGateway, worker: FakeWorker) -> None:
    with httpx.Client(base_url=gateway.url, timeout=30) as http, open_client(gateway) as client:
        stream = client.chat.completions.create(model="fake", messages=HELLO, stream=True, n=1)
        job = worker.claim().begin()
        job.write("half")
        chunk = next(iter(stream))
        found = http.get(f"/v1/jobs/{chunk.id}").json()
        assert (found["id"], found["status"], found["response"]) == (job.job_id, "running", None)
        assert http.delete(f"/v1/jobs/{job.job_id}").json()["cancelled"] is True
        assert job.is_cancelled()
        job.end("cancelled")
        with pytest.raises(openai.APIError, match="was cancelled"):
            list(stream)
        ended = http.get(f"/v1/jobs/{job.job_id}").json()
        assert ended["status"] == "cancelled" and ended["response"]["choices"][0]["message"]["content"] == "half"
        assert http.get("/v1/jobs/nothing").json()["error"]["code"] == "job_not_found"


def test_stopping_ends_streams_with_the_place_to_go_on_from(start_gateway: StartGateway, worker: FakeWorker) -> None:
    stopping, other = start_gateway(), start_gateway()
    with open_client(stopping) as client:
        stream = client.completions.create(model="fake", prompt="x", stream=True)
        job = worker.claim().begin()
        job.write("a")
        assert next(iter(stream)).choices[0].text == "a"
        stopping.begin_stop()
        with pytest.raises(openai.APIError) as error:
            list(stream)
    assert error.value.code == "gateway_stopping" and f"/v1/jobs/{job.job_id}/stream?after=1-1" in error.value.message
    job.write("b", finish_reason="stop")
    job.end()
    text = httpx.get(f"{other.url}/v1/jobs/{job.job_id}/stream?after=1-1", timeout=30).text
    assert events(text)[0]["choices"][0]["text"] == "b"
