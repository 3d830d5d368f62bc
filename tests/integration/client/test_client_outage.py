"""Redis goes away and comes back with its data, while clients wait."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer import Client
from tests.fakes.fake_worker import FakeWorker
from worker.embedded_redis import EmbeddedRedis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(data_dir=tmp_path) as server:
        yield server


def test_a_stream_and_a_result_survive_a_restart_of_redis(server: EmbeddedRedis) -> None:
    worker = FakeWorker(server.url)
    with Client(server.url) as client:
        job = client.submit("a")
        held = worker.claim().begin()
        stream = job.stream(timeout=60)
        texts: list[str] = []
        for word in ("one ", "two "):
            held.write(word)
            texts.append(next(stream).text)
        results: list[str] = []
        waiting = threading.Thread(target=lambda: results.append(job.result(timeout=60).text))
        waiting.start()
        worker.connection.config_set("appendfsync", "always")
        server.kill()
        restarting = threading.Thread(target=server.start)
        restarting.start()
        restarting.join(60)
        held.write("three ", finish_reason="stop")
        held.end()
        texts += [chunk.text for chunk in stream]
        waiting.join(60)
    worker.close()
    assert texts == ["one ", "two ", "three "]
    assert results == ["one two three "]
