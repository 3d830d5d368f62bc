"""What torch and Triton raise for a device's memory and health, as the engine's own errors.

Few of these have a class of their own: a launch of Triton's, a matrix library and the driver raise a plain
`RuntimeError`, whose first words tell. An error of a device that is not about memory stays for every call after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import DeviceLostError, DeviceMemoryError

_OF_DEVICE = ("CUDA error:", "CUDA driver error:", "Triton Error [CUDA]:")
_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")  # the last of a CPU's allocator


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn what torch and Triton raise for a device's memory and health into the engine's own errors."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_of_memory(error):
            raise DeviceMemoryError(str(error)) from None
        if is_of_device(error):
            raise DeviceLostError(str(error)) from error
        raise


def is_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of whichever kind: nothing is broken."""
    is_its_own = isinstance(error, torch.OutOfMemoryError | MemoryError)  # the latter of numpy, or of a kernel of ours
    return is_its_own or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_MEMORY))


def is_of_device(error: BaseException) -> bool:
    """Whether a device said no, for want of memory or for good."""
    is_its_own = isinstance(error, torch.AcceleratorError)
    return is_its_own or (isinstance(error, RuntimeError) and str(error).startswith(_OF_DEVICE))
