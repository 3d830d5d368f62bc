"""A GPU's memory as a kernel sees it, more strictly than a GPU has it.

Global memory is that of the launch's tensors and nothing else. Shared memory is full of NaN when a program begins; what
`cp.async` copies is there when it was waited for and not before; and where one warp reads what another one writes, or
writes what another one reads, without a barrier between, that is an error whatever came of it.
"""

import ctypes
from bisect import bisect_right
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # of whatever type an instruction names


class KernelFault(Exception):
    """What a device would trap, or compute by chance."""


class GlobalMemory:
    """Of some buffers, each from an address on."""

    def __init__(self, buffers: list[tuple[int, int]]) -> None:
        """`buffers`: address and number of bytes; equal ones and parts of others may occur."""
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._bytes: list[NDArray[np.uint8]] = []
        for begin, size in sorted(buffers, key=lambda buffer: (buffer[0], -buffer[1])):
            if size and (not self._ends or begin + size > self._ends[-1]):
                self._begins.append(begin)
                self._ends.append(begin + size)
                memory = (ctypes.c_uint8 * size).from_address(begin)
                self._bytes.append(np.ctypeslib.as_array(memory))

    def load(self, addresses: NDArray[np.uint64], width: int, count: int) -> list[Array]:
        """`count` words of `width` bytes from each address on."""
        out = [np.zeros(len(addresses), f"u{width}") for _ in range(count)]
        for lanes, words, places in self._parts(addresses, width, count):
            for i in range(count):
                out[i][lanes] = words[places + i]
        return out

    def store(self, addresses: NDArray[np.uint64], values: list[Array]) -> None:
        for lanes, words, places in self._parts(addresses, values[0].itemsize, len(values)):
            for i, value in enumerate(values):
                words[places + i] = value[lanes]

    def _parts(self, addresses: NDArray[np.uint64], width: int, count: int) -> list[tuple[Array, Array, Array]]:
        """By buffer: which of the addresses lie there, the buffer's words, and their places among these."""
        size = width * count
        if (addresses % np.uint64(size)).any():
            raise KernelFault(f"an access of {size} bytes is not aligned")
        parts = []
        left = np.arange(len(addresses))
        while len(left):
            first = int(addresses[left[0]])
            index = bisect_right(self._begins, first) - 1
            if index < 0 or first + size > self._ends[index]:
                raise KernelFault(f"{size} bytes at {first:#x} are in no buffer")
            begin, end = self._begins[index], self._ends[index]
            here = (addresses[left] >= np.uint64(begin)) & (addresses[left] <= np.uint64(end - size))
            lanes = left[here]
            words = self._bytes[index][: (end - begin) // width * width].view(f"u{width}")
            if begin % width:
                raise KernelFault(f"a buffer at {begin:#x} is read by words of {width} bytes")
            parts.append((lanes, words, ((addresses[lanes] - np.uint64(begin)) // np.uint64(width)).astype(np.int64)))
            left = left[~here]
        return parts


_GRANULE = 2  # bytes
_SEVERAL = -1  # in a warp's place


class SharedMemory:
    """Of one program."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = np.full(-(-num_bytes // 16) * 16, 0xFF, np.uint8)
        granules = len(self.bytes) // _GRANULE
        self._epoch = 1  # ends with a barrier
        self._written, self._read = np.zeros((2, granules), np.int64)  # in which epoch, and by which warp
        self._writer, self._reader = np.zeros((2, granules), np.int32)
        self._copies: list[tuple[Array, Array, Array]] = []  # not committed yet: places, their bytes, warps
        self._groups: deque[list[tuple[Array, Array, Array]]] = deque()
        self._products: list[Array] = []  # not committed yet: what they read
        self._product_groups: deque[list[Array]] = deque()

    def barrier(self) -> None:
        self._epoch += 1

    def load(self, places: Array, width: int, warps: Array) -> Array:
        """uint8 `[num_lanes, width]`."""
        where = self._where(places, width)
        self._note_read(where, warps)
        return self.bytes[where]

    def store(self, places: Array, values: Array, warps: Array) -> None:
        """values: uint8 `[num_lanes, width]`."""
        where = self._where(places, values.shape[1])
        self._note_write(where, warps)
        self.bytes[where] = values

    def load_for_product(self, places: Array) -> Array:
        """uint16 `[num_places]`, for all warps of a group, which read them until they are waited for."""
        where = self._where(places, 2)
        self._note_read(where, np.full(len(places), _SEVERAL))
        self._products.append(where)
        return self.bytes[where].view(np.uint16)[:, 0]

    def commit_products(self) -> None:
        self._product_groups.append(self._products)
        self._products = []

    def wait_for_products(self, num_left: int) -> None:
        """For all groups of products but the last ones."""
        while len(self._product_groups) > num_left:
            for where in self._product_groups.popleft():
                self._note_read(where, np.full(len(where), _SEVERAL))

    def begin_copy(self, places: Array, values: Array, warps: Array) -> None:
        where = self._where(places, values.shape[1])
        self._check_unread(where, warps)
        self._copies.append((where, values, warps))

    def commit(self) -> None:
        self._groups.append(self._copies)
        self._copies = []

    def wait(self, num_left: int) -> None:
        """For all groups of copies but the last ones."""
        while len(self._groups) > num_left:
            for where, values, warps in self._groups.popleft():
                self._note_write(where, warps)
                self.bytes[where] = values

    def _where(self, places: Array, width: int) -> Array:
        if (places % width).any():
            raise KernelFault(f"a shared access of {width} bytes is not aligned")
        if len(places) and (places.min() < 0 or places.max() + width > len(self.bytes)):
            raise KernelFault("a shared access is outside of what the program has")
        return places[:, None] + np.arange(width)

    def _granules(self, where: Array, warps: Array) -> tuple[Array, Array]:
        granules = where[:, ::_GRANULE] // _GRANULE
        return granules.ravel(), np.repeat(warps, granules.shape[1])

    def _check_unread(self, where: Array, warps: Array) -> tuple[Array, Array]:
        granules, by = self._granules(where, warps)
        if ((self._read[granules] == self._epoch) & (self._reader[granules] != by)).any():
            raise KernelFault("a warp writes shared memory that another reads, without a barrier between")
        if ((self._written[granules] == self._epoch) & (self._writer[granules] != by)).any():
            raise KernelFault("two warps write the same shared memory without a barrier between")
        return granules, by

    def _note_write(self, where: Array, warps: Array) -> None:
        granules, by = self._check_unread(where, warps)
        self._written[granules] = self._epoch
        self._writer[granules] = by

    def _note_read(self, where: Array, warps: Array) -> None:
        granules, by = self._granules(where, warps)
        if ((self._written[granules] == self._epoch) & (self._writer[granules] != by)).any():
            raise KernelFault("a warp reads shared memory that another writes, without a barrier between")
        is_other = (self._read[granules] == self._epoch) & (self._reader[granules] != by)
        self._read[granules] = self._epoch
        self._reader[granules] = by
        self._reader[granules[is_other]] = _SEVERAL
