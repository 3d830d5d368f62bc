"""A Redis that speaks TLS, with an authority of one's own: everybody reaches it by one URL."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from producer import AsyncClient, Client, RedisUnavailableError
from tests.fakes.gateways import open_client, running_gateway
from tests.fakes.sentinel_trio import SentinelTrio
from tests.fakes.tls_front import tls_front
from tests.fakes.worker_runs import WorkerThread


@pytest.fixture
def tls_url(redis_url: str, tmp_path: Path) -> Iterator[str]:
    port, ca_file = urlsplit(redis_url).port, tmp_path / "ca.pem"
    assert port is not None
    with tls_front(port, ca_file=ca_file) as tls_port:
        yield f"rediss://127.0.0.1:{tls_port}/0?ssl_ca_certs={ca_file}"


async def test_workers_clients_gateways_and_the_command_line_speak_tls(tls_url: str) -> None:
    with WorkerThread(tls_url), Client(tls_url) as client:
        job = client.submit("Hello", max_tokens=3)
        text = "".join(chunk.text for chunk in job.stream(timeout=30))
        assert text == job.result(timeout=30).text != ""
        async with AsyncClient(tls_url) as asyncio_client:
            assert (await (await asyncio_client.submit("Hello", max_tokens=3)).result(timeout=30)).text
        with running_gateway(tls_url) as gateway, open_client(gateway) as openai_client:
            assert openai_client.completions.create(model="fake", prompt="Hello", max_tokens=3).choices[0].text
        command = [sys.executable, "-m", "producer", "result", job.id, "--redis-url", tls_url]
        assert text.strip() in subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_sentinels_under_an_authority_that_nobody_named_are_not_spoken_with(tmp_path: Path) -> None:
    with SentinelTrio(tmp_path, has_tls=True) as trio:
        url, _, _ = trio.url.partition("?")
        with (
            Client(url) as client,
            pytest.raises(RedisUnavailableError, match=r"with a master of that service; .*ssl_ca_certs"),
        ):
            client.queues()
