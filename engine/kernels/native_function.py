"""A compiled function as Python calls it: with the bytes of its arguments, alone or as one of a chain.

Knows no function's arguments. A chain is what `promptmill_chain` of rows.c runs: the way through ctypes, paid once.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # half.h's names of number formats

_LINK = struct.Struct("@P2q")  # `chained_call` of rows.c
_ADDRESS = struct.Struct("@P")
_BAND = struct.Struct("@PqI4x")  # `band` of rows.c


class NativeFunction:
    """Takes a pointer to its arguments and returns 0, or else that there was no memory."""

    def __init__(self, library: ctypes.CDLL, name: str, *, rows_at: int = -1) -> None:
        """rows_at: where among its arguments their number of rows stands, int32; -1: they have none."""
        self._function = getattr(library, name)
        self._address = ctypes.cast(self._function, ctypes.c_void_p).value
        self._rows_at = rows_at

    def __call__(self, arguments: bytes) -> None:
        """Raises `MemoryError`."""
        if self._function(arguments):
            raise MemoryError("a compiled kernel could not allocate its room")

    def link(self, arguments: bytes) -> bytes:
        """This call as a part of a chain; arguments: a multiple of 8 bytes."""
        return _LINK.pack(self._address, len(arguments), self._rows_at) + arguments


class Chain:
    """Runs calls one after the other; what one writes the next may read."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.promptmill_chain
        self._function.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int32)
        self._bands_function = library.promptmill_bands

    def __call__(self, num_rows: int, *links: bytes) -> None:
        """links: of `NativeFunction.link`. Raises `MemoryError`, and then the calls behind did not run."""
        self.prepare(*links)(num_rows)

    def prepare(self, *links: bytes) -> "PreparedChain":
        """These calls, to be run as often as what they point to stays where it is, over any number of rows."""
        return PreparedChain(self._function, b"".join(links))

    def prepare_bands(self, bands: Sequence[Sequence[bytes]]) -> "PreparedBands":
        """The same segments of calls for several bands of rows; each call is to compute with one thread."""
        return PreparedBands(self._bands_function, bands)


class PreparedBands:
    """A chain for each of some bands of rows, which threads run side by side."""

    def __init__(self, function: Callable[..., int], bands: Sequence[Sequence[bytes]]) -> None:
        """bands: segments of as many bytes in each."""
        self._function = function
        self._calls = [ctypes.create_string_buffer(calls := b"".join(band), len(calls)) for band in bands]
        ends = [*accumulate(map(len, bands[0]))]
        self._num_segments = len(ends)
        self._ends = (ctypes.c_int64 * len(ends))(*ends)
        self._bands = ctypes.create_string_buffer(_BAND.size * len(bands))

    def __call__(self, num_rows: Sequence[int], *, in_order: bool) -> None:
        """num_rows: of each band; in_order: whether a segment reads what earlier segments of the bands before its own
        have written. Raises `MemoryError`, and then some calls did not run."""
        for i, (calls, count) in enumerate(zip(self._calls, num_rows, strict=True)):
            _BAND.pack_into(self._bands, i * _BAND.size, ctypes.addressof(calls), count, 0)
        sizes = len(self._calls), self._num_segments, in_order, torch.get_num_threads()
        if self._function(self._bands, self._ends, *sizes):
            raise MemoryError("a compiled kernel could not allocate its room")


class PreparedChain:
    """Calls with all of their arguments but the number of rows."""

    def __init__(self, function: Callable[[object, int, int], int], links: bytes) -> None:
        self._function = function
        self._num_bytes = len(links)
        self._calls = ctypes.create_string_buffer(links, len(links))

    def __call__(self, num_rows: int) -> None:
        """Raises `MemoryError`, and then the calls behind did not run."""
        if self._function(self._calls, self._num_bytes, num_rows):
            raise MemoryError("a compiled kernel could not allocate its room")

    def start_from(self, address: int) -> None:
        """Set the first argument of the first call: what it reads, in every function."""
        _ADDRESS.pack_into(self._calls, _LINK.size, address)
