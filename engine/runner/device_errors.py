"""What torch raises for a device's memory and health, as the engine's own errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import DeviceLostError, DeviceMemoryError


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn what torch raises for a device's memory and health into the engine's own errors."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:  # the latter of numpy, or of a kernel of ours
        raise DeviceMemoryError(str(error)) from None
    except torch.AcceleratorError as error:
        raise DeviceLostError(str(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU allocator has no class of its own
            raise
        raise DeviceMemoryError(str(error)) from None
