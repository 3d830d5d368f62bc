"""The memory of a CPU's KV cache is to lie in large pages."""

import sys
from pathlib import Path

import pytest
import torch

from engine.model.large_pages import prefer_large_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has this advice")


def flags_of(address: int) -> list[str]:
    """Linux' flags of the mapping around an address."""
    is_around = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            is_around = first <= address < last
        elif is_around and name == "VmFlags:":
            return rest
    raise AssertionError("no such mapping")


def test_linux_is_asked_for_large_pages_throughout_a_large_tensor_alone() -> None:
    large, small = torch.empty(64 << 20, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)
    large_address, small_address = large.data_ptr(), small.data_ptr()
    assert "hg" not in flags_of(large_address + (32 << 20))
    for x in (large, small):
        prefer_large_pages(x)
    for offset in (1 << 20, 32 << 20, 63 << 20):
        assert "hg" in flags_of(large_address + offset)
    assert "hg" not in flags_of(small_address)
