"""How a gateway ends with streams open and clients gone: at once, resumably, and without a word of error in its log."""

import asyncio
import logging
import socket
import threading
import time
from collections import Counter

import httpx2 as httpx
import pytest

from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway, StartGateway
from tests.fakes.held_job import HeldJob
from tests.fakes.waiting import wait_until

NUM_STREAMS = 60
STOP_SECONDS = 30.0
CUT_OFF_SECONDS = 100.0  # what does not end by itself
BODY = {"model": "fake", "prompt": ["x", "y"], "stream": True}


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.ERROR)
    return caplog


class Readers:
    """So many clients, each with a stream of two jobs, on a thread of their own. `ends`: what became of the streams."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._url = f"{gateway.url}/v1/completions"
        self._num_open = 0
        self._are_open = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._read_all()), name="readers")
        self.ends: Counter[str] = Counter()

    def open(self, worker: FakeWorker) -> list[HeldJob]:
        """Returns the jobs, each with its first token, once every client has seen one."""
        self._thread.start()
        jobs = [worker.claim().begin() for _ in range(2 * NUM_STREAMS)]
        for job in jobs:
            job.write("a")
        assert self._are_open.wait(30)
        return jobs

    def wait(self) -> None:
        self._thread.join(30)
        assert self.ends.total() == NUM_STREAMS

    async def _read_all(self) -> None:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=NUM_STREAMS)) as http:
            self.ends.update(await asyncio.gather(*(self._read(http) for _ in range(NUM_STREAMS))))

    async def _read(self, http: httpx.AsyncClient) -> str:
        text = ""
        async with http.stream("POST", self._url, json=BODY) as response:
            async for line in response.aiter_lines():
                if "data:" not in text and line.startswith("data:"):  # before it there may be signs of life
                    self._num_open += 1
                    if self._num_open == NUM_STREAMS:
                        self._are_open.set()
                text += line
        return next((end for end in ("gateway_stopping", "was cancelled") if end in text), text)


def test_many_streams_end_at_once_when_the_gateway_stops(
    start_gateway: StartGateway, worker: FakeWorker, errors: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.gateway.server.EXIT_GRACE_SECONDS", CUT_OFF_SECONDS)
    gateway = start_gateway()
    readers = Readers(gateway)
    readers.open(worker)
    began = time.monotonic()
    gateway.begin_stop()
    readers.wait()
    gateway.stop()
    assert time.monotonic() - began < STOP_SECONDS
    assert set(readers.ends) == {"gateway_stopping"}
    assert not errors.records, errors.text


def test_streams_whose_jobs_are_cancelled_as_the_gateway_stops_end_without_an_error_in_the_log(
    start_gateway: StartGateway, worker: FakeWorker, errors: pytest.LogCaptureFixture
) -> None:
    gateway = start_gateway()
    readers = Readers(gateway)
    for at, job in enumerate(readers.open(worker)):
        if at == NUM_STREAMS:
            gateway.begin_stop()
        job.end("cancelled")
    readers.wait()
    gateway.stop()
    assert set(readers.ends) <= {"gateway_stopping", "was cancelled"}
    assert not errors.records, errors.text


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_ours(
    gateway: RunningGateway, worker: FakeWorker, errors: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        connection.sendall(head.encode())
    line = 'promptmill_http_requests_total{method="POST",route="/v1/completions",status="499"}'
    wait_until(lambda: line in httpx.get(f"{gateway.url}/metrics").text)
    assert not errors.records, errors.text
