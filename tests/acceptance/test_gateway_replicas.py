"""Gateways as processes and real signals: one that is killed loses nothing, one told to stop leaves in order."""

import json
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.held_job import HeldJob
from tests.fakes.response_judge import bodies_of, judge_events
from tests.fakes.waiting import wait_until

NUM_STREAMS = 12
NUM_WORDS = 60

Start = Callable[[], GatewayProcess]


class Reader(threading.Thread):
    """Streams one completion; when the connection breaks it goes on at the other replica, behind its last cursor."""

    def __init__(self, urls: list[str], number: int) -> None:
        super().__init__(name=f"reader-{number}")
        self.urls = urls
        self.text = ""
        self.num_connections = 0
        self.job_id = ""
        self._cursor = ""
        self._number = number
        self.seen = threading.Semaphore(0)  # once an event
        self._is_done = False

    def run(self) -> None:
        first = self.urls[0]
        body = {"model": "fake", "prompt": f"stream {self._number}", "stream": True}
        self._read("POST", f"{first}/v1/completions", body)
        while not self._is_done:
            self._read("GET", f"{self.urls[1]}/v1/jobs/{self.job_id}/stream?after={self._cursor}", None)

    def _read(self, method: str, url: str, body: object) -> None:
        self.num_connections += 1
        try:
            with httpx.stream(method, url, json=body, timeout=60) as response:
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self._is_done = True
                    elif line.startswith("data: "):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError:
            return

    def _take(self, event: dict[str, object]) -> None:
        ours = event.get("promptmill")
        if not isinstance(ours, dict):
            return
        self.job_id, self._cursor = ours["job_id"], ours["cursor"]
        for choice in event["choices"]:  # type: ignore[attr-defined]
            self.text += choice["text"]
        self.seen.release()


def test_streams_of_a_killed_replica_go_on_at_another_with_every_token_once(
    start_process: Start, worker: FakeWorker
) -> None:
    killed, other = start_process(), start_process()
    readers = [Reader([killed.url, other.url], number) for number in range(NUM_STREAMS)]
    for reader in readers:
        reader.start()
    jobs: list[HeldJob] = [worker.claim().begin() for _ in readers]
    for word in range(NUM_WORDS):
        for job in jobs:
            last = word == NUM_WORDS - 1
            job.write(f"{word} ", finish_reason="length" if last else None)
        if word == NUM_WORDS // 3:
            for reader in readers:
                assert reader.seen.acquire(timeout=30)  # who has seen nothing does not know what to go on with
            killed.kill()
    for job in jobs:
        job.end()
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    expected = "".join(f"{word} " for word in range(NUM_WORDS))
    assert [reader.text for reader in readers] == [expected] * NUM_STREAMS
    assert all(reader.num_connections > 1 for reader in readers)


def test_a_response_of_a_killed_replica_is_read_on_at_another_event_by_event(
    start_process: Start, worker: FakeWorker
) -> None:
    """Also one that was not asked for in the background: nobody was left to cancel it."""
    killed, other = start_process(), start_process()
    with _client(killed.url) as here, _client(other.url) as there:
        streams = [
            here.responses.create(model="fake", input="x", stream=True, background=background)
            for background in (True, False)
        ]
        jobs = {job.job_id: job for job in (worker.claim().begin() for _ in streams)}
        for job in jobs.values():
            job.write("0 ")
        seen: list[list[dict[str, Any]]] = [[] for _ in streams]
        for events, stream in zip(seen, streams, strict=True):
            while not events or events[-1]["type"] != "response.output_text.delta":
                events += bodies_of([next(stream)])
        killed.kill()
        for events, stream in zip(seen, streams, strict=True):
            with pytest.raises(openai.APIError):
                events += bodies_of(stream)
                raise AssertionError("a stream that was cut off looked whole")
        for word in range(1, NUM_WORDS):
            for job in jobs.values():
                job.write(f"{word} ", finish_reason="stop" if word == NUM_WORDS - 1 else None)
        rests = [
            there.responses.retrieve(
                events[0]["response"]["id"], stream=True, starting_after=events[-1]["sequence_number"]
            )
            for events in seen
        ]
        for job in jobs.values():
            job.end()
        expected = "".join(f"{word} " for word in range(NUM_WORDS))
        for events, rest in zip(seen, rests, strict=True):
            response = judge_events([*events, *bodies_of(rest)])
            assert response.output_text == expected
            assert there.responses.retrieve(response.id).output_text == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_answers_end_and_then_the_gateway_leaves_with_zero(
    start_process: Start, worker: FakeWorker, number: signal.Signals
) -> None:
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and a gateway leaves it so
    gateway = start_process()
    signal.signal(number, inherited)
    answers: list[httpx.Response] = []
    body = {"model": "fake", "prompt": "x"}
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=60))
    )
    asking.start()
    job = worker.claim().begin()
    gateway.process.send_signal(number)
    wait_until(lambda: not gateway.answers())  # it takes no more
    job.write("the answer", finish_reason="stop")
    job.end()
    asking.join(30)
    assert answers[0].json()["choices"][0]["text"] == "the answer"
    assert gateway.process.wait(30) == 0


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
