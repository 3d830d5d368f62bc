"""What is asked of CUDA for a capture, of one that is not there."""

import pytest
import torch

from engine.runner.cuda_graphs import CudaCapture


class _FakeGraph:
    def __init__(self, happened: list[str], fails: bool) -> None:
        self._happened = happened
        self._fails = fails

    def capture_begin(self, *, pool: int, capture_error_mode: str) -> None:
        self._happened.append(f"begin in pool {pool}, errors {capture_error_mode}")

    def capture_end(self) -> None:
        self._happened.append("end")
        if self._fails:
            raise torch.AcceleratorError("the capture is invalid")


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a CUDA that is not there."""
    calls: list[str] = []

    class Stream:
        def __enter__(self) -> None:
            calls.append("enter")

        def __exit__(self, *exception: object) -> None:
            calls.append("leave")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty cache"))
    free_bytes = iter(range(10_000, 0, -300))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free_bytes), 10_000))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _FakeGraph(calls, fails=False))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: calls.append(f"close {pool}"), False)
    return calls


def test_a_capture_is_on_a_stream_of_its_own(happened: list[str]) -> None:
    capture = CudaCapture()
    capture(lambda: happened.append("run"))
    assert (capture.num_captured, capture.num_bytes) == (1, 300) and capture.seconds > 0
    assert happened == ["wait", "enter", "begin in pool 7, errors global", "run", "end", "leave"]


def test_a_capture_that_fails_leaves_its_stream_and_its_pool(
    happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_for_the_device() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _FakeGraph(happened, fails=True))
    with pytest.raises(torch.AcceleratorError):
        CudaCapture()(wait_for_the_device)
    assert happened == ["wait", "enter", "begin in pool 7, errors global", "end", "close 7", "leave"]


def test_a_capture_without_memory_is_tried_again_with_what_was_cached(happened: list[str]) -> None:
    def run() -> None:
        if "empty cache" not in happened:
            raise torch.OutOfMemoryError("CUDA out of memory")

    CudaCapture()(run)
    attempt = ["wait", "enter", "begin in pool 7, errors global", "end", "leave"]
    assert happened == [*attempt, "empty cache", *attempt]
