"""A gateway on a real Redis, a fake worker that answers, and the official client, unmodified."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from producer.async_transport import AsyncTransport
from tests.fakes.batches import BatchBench, batch_bench
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.file_stores import PlaceOfFiles
from tests.fakes.gateways import RunningGateway, StartGateway, open_client


@pytest.fixture
def echoing(worker: FakeWorker) -> Iterator[FakeWorker]:
    """Answers every job with its prompt, a word a chunk."""
    with worker.serving(echo):
        yield worker


@pytest.fixture
def gateway(start_gateway: StartGateway) -> RunningGateway:
    return start_gateway()


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with open_client(gateway) as client:
        yield client


@pytest.fixture
async def transport(redis_url: str) -> AsyncIterator[AsyncTransport]:
    transport = AsyncTransport(redis_url)
    yield transport
    await transport.aclose()


@pytest.fixture
async def bench(redis_url: str, tmp_path: Path) -> AsyncIterator[BatchBench]:
    async with batch_bench(redis_url, tmp_path) as bench:
        yield bench


@pytest.fixture
def files_client(start_gateway: StartGateway, place: PlaceOfFiles) -> Iterator[openai.OpenAI]:
    with open_client(start_gateway(**place.settings)) as client:
        yield client
