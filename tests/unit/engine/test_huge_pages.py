"""Huge pages are asked for, and harmless where they cannot be had."""

import re
from pathlib import Path

import pytest
import torch

from engine.kernels import huge_pages
from engine.kernels.huge_pages import ask_for_huge_pages

_NUM_BYTES = 8 << 20


def flags_at(address: int) -> list[str]:
    """What the kernel keeps of the mapping around an address."""
    found: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            found = line.split()[1:]
    return found


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without transparent huge pages"
)
def test_the_pages_of_a_tensor_are_advised_to_be_huge() -> None:
    tensor = torch.empty(_NUM_BYTES, dtype=torch.uint8)
    middle = tensor.data_ptr() + _NUM_BYTES // 2
    assert "hg" not in flags_at(middle)
    ask_for_huge_pages(tensor)
    assert "hg" in flags_at(middle)


def test_a_tensor_smaller_than_a_page_is_left_alone() -> None:
    tensor = torch.zeros(1, dtype=torch.uint8)
    ask_for_huge_pages(tensor)
    assert tensor.item() == 0


def test_nothing_is_asked_where_the_system_has_no_such_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_ADVICE", None)
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda *_: pytest.fail("no library is called"))
    ask_for_huge_pages(torch.empty(_NUM_BYTES, dtype=torch.uint8))
