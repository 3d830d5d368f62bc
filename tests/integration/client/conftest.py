"""Clients on a real Redis."""

from collections.abc import AsyncIterator

import pytest

from producer import AsyncClient


@pytest.fixture
async def async_client(redis_url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(redis_url) as client:
        yield client
