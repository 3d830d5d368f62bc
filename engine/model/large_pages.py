"""Memory that is read all over, in pages of 2 MiB where Linux has them: a core finds them with far fewer look-ups.

A decode's attention over scattered blocks takes a quarter less time so (AMD Zen 4, in a virtual machine).
"""

import ctypes
import mmap

from torch import Tensor

_MIN_BYTES = 64 << 20  # above what malloc may have taken from its heap, which is not ours to advise on


def prefer_large_pages(x: Tensor) -> None:
    """Ask for them, before the memory is touched. Linux may have none to give; elsewhere this does nothing."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or x.device.type != "cpu" or x.nbytes < _MIN_BYTES:
        return
    start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (x.data_ptr() + x.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
