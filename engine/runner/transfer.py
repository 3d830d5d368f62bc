"""Brings a step's arrays to the device and its tokens back: on CUDA through pinned memory, in copies to be waited for
only where the values are needed.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes; any dtype may view the packed buffer at such an offset
_NUM_BUFFERS = 16  # a step sends nine times at most: the copy of the buffer whose turn it is was done long since


class HostToDevice:
    """Sends arrays to one device."""

    def __init__(self, device: torch.device, *, packs: bool | None = None) -> None:
        """`packs`: send the arrays as one copy; None: where there is a copy at all."""
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._packs = self._is_cuda if packs is None else packs
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * _NUM_BUFFERS
        self._copied = [torch.cuda.Event() for _ in self._buffers if self._is_cuda]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._shared: list[tuple[NDArray[Any], Tensor]] = []  # what was sent last, unpacked

    def send(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Return the arrays as tensors on the device, in order; unpacked ones share the arrays' memory."""
        if not self._packs:
            return self._share(arrays)
        offsets = np.cumsum([0, *(_aligned(array.nbytes) for array in arrays)])
        buffer = self._next_buffer(int(offsets[-1]))
        host = buffer.numpy()
        for array, offset in zip(arrays, offsets, strict=False):
            host[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        packed = buffer[: int(offsets[-1])].to(self._device, non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
        return [_view(packed, int(offset), array) for array, offset in zip(arrays, offsets, strict=False)]

    def _share(self, arrays: tuple[NDArray[Any], ...]) -> list[Tensor]:
        """An array that was at the same place the last time, with whatever it holds now, is the same tensor."""
        if len(self._shared) != len(arrays):
            self._shared = [(array, torch.from_numpy(array)) for array in arrays]
        for i, array in enumerate(arrays):
            if self._shared[i][0] is not array:
                self._shared[i] = array, torch.from_numpy(array)
        return [tensor for _, tensor in self._shared]

    def _next_buffer(self, num_bytes: int) -> Tensor:
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        if self._copied:
            self._copied[self._turn].synchronize()
        if self._buffers[self._turn].numel() < num_bytes:
            self._buffers[self._turn] = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
        return self._buffers[self._turn]


def start_reading(tensor: Tensor) -> Callable[[], NDArray[Any]]:
    """Begin to bring a tensor to the host, as it is now; call the result to wait for it, nothing launched later."""
    if tensor.device.type != "cuda":
        values: NDArray[Any] = tensor.numpy().copy()
        return lambda: values
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> NDArray[Any]:
        copied.synchronize()
        return host.numpy()

    return wait


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _view(packed: Tensor, offset: int, array: NDArray[Any]) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    num_bytes = prod(array.shape) * array.itemsize
    return packed[offset : offset + num_bytes].view(dtype).view(array.shape)
