"""Clients on a real Redis, and a fake worker that does with each job what a test says."""

from collections.abc import AsyncIterator, Iterator

import pytest

from producer import AsyncClient
from tests.fakes.fake_worker import FakeWorker


@pytest.fixture
async def async_client(redis_url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(redis_url) as client:
        yield client


@pytest.fixture
def worker(redis_url: str) -> Iterator[FakeWorker]:
    worker = FakeWorker(redis_url)
    yield worker
    worker.close()
