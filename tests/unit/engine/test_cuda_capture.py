"""What is asked of CUDA for a capture, of one that is not there."""

import weakref
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from engine.runner.cuda_graphs import CudaCapture


class FakeCuda:
    """Pools as torch has them, named by numbers from 7 on: it captures into none whose graphs are gone, nor into one
    that a capture has left open."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.spoilt: Iterator[bool] = iter(())  # of each capture: whether it cannot be ended
        self.new_pool = count(7).__next__
        self.graphs: dict[int, weakref.WeakSet[FakeGraph]] = {}  # by pool
        self.open_pools: set[int] = set()

    def new_graph(self) -> "FakeGraph":
        return FakeGraph(self, next(self.spoilt, False))

    def close(self, device: int, pool: int) -> None:
        self.happened.append(f"close {pool}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda, is_spoilt: bool) -> None:
        self._cuda = cuda
        self._is_spoilt = is_spoilt

    def capture_begin(self, *, pool: int, capture_error_mode: str) -> None:
        self._pool = pool
        self._cuda.happened.append(f"begin in pool {pool}, errors {capture_error_mode}")
        assert self._cuda.graphs.get(pool, {self}), "a pool without a graph is gone"
        assert pool not in self._cuda.open_pools, "it is open"
        self._cuda.open_pools.add(pool)
        self._cuda.graphs.setdefault(pool, weakref.WeakSet()).add(self)

    def capture_end(self) -> None:
        self._cuda.happened.append("end")
        if self._is_spoilt:
            raise torch.AcceleratorError("the capture is invalid")
        self._cuda.open_pools.remove(self._pool)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    happened = cuda.happened

    class Stream:
        def __enter__(self) -> None:
            happened.append("enter")

        def __exit__(self, *exception: object) -> None:
            happened.append("leave")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", cuda.new_pool)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("empty cache"))
    free_bytes = iter(range(10_000, 0, -300))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free_bytes), 10_000))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", cuda.new_graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.close, False)
    return cuda


def attempt(*what: str, pool: int = 7) -> list[str]:
    """What happens around that."""
    return ["wait", "enter", f"begin in pool {pool}, errors global", *what, "leave"]


def test_a_capture_is_on_a_stream_of_its_own(cuda: FakeCuda) -> None:
    capture = CudaCapture()
    capture(lambda: cuda.happened.append("run"))
    assert (capture.num_captured, capture.num_bytes) == (1, 300) and capture.seconds > 0
    assert cuda.happened == attempt("run", "end")


def test_a_pool_outlives_the_graphs_that_were_captured_into_it(cuda: FakeCuda) -> None:
    capture = CudaCapture()
    for _ in range(3):
        capture(lambda: None)
    assert cuda.happened == 3 * attempt("end")
    del capture
    assert not cuda.graphs[7], "what captures keeps it, and nobody else"


def test_a_capture_that_fails_leaves_its_stream_and_its_pool(cuda: FakeCuda) -> None:
    def wait_for_the_device() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    cuda.spoilt, capture = iter([True]), CudaCapture()
    with pytest.raises(RuntimeError, match="not permitted"):
        capture(wait_for_the_device)
    assert cuda.happened == attempt("end", "close 7")
    capture(lambda: None)
    assert cuda.happened[6:] == attempt("end", pool=8)


@pytest.mark.parametrize("is_spoilt", [False, True])  # what had no memory was an allocation, or a kernel's launch
def test_a_capture_without_memory_is_tried_again_with_what_was_cached(cuda: FakeCuda, is_spoilt: bool) -> None:
    def run() -> None:
        if "empty cache" not in cuda.happened:
            raise torch.OutOfMemoryError("CUDA out of memory")

    cuda.spoilt = iter([is_spoilt])
    CudaCapture()(run)
    first = attempt("end", *["close 7"] * is_spoilt)
    assert cuda.happened == [*first, "empty cache", *attempt("end", pool=8 if is_spoilt else 7)]
