"""Clients on a real Redis."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from producer import AsyncClient


@pytest.fixture
async def async_client(redis_url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(redis_url) as client:
        yield client


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Of a batch run: its input and its output."""
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"
