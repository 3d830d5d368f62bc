"""Memory in huge pages: where it is read in pieces from all over, small pages take long to look up.

A wish, not a need: a system that has none, or none left, hands out small pages, and nothing else differs.
"""

import ctypes
import mmap

from torch import Tensor

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def ask_for_huge_pages(tensor: Tensor) -> None:
    """For the whole pages inside a tensor on the host that nobody has written to yet."""
    if _ADVICE is None:
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - begin
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _ADVICE)
