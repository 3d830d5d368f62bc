"""What is raised for a device is told apart by class and by words: too little memory, a broken device, or neither."""

import pytest
import torch

from engine.errors import DeviceLostError, DeviceMemoryError
from engine.runner.device_errors import device_errors


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), DeviceMemoryError),
        (torch.AcceleratorError("CUDA error: out of memory"), DeviceMemoryError),  # of a graph, or of pinned memory
        (RuntimeError("Triton Error [CUDA]: out of memory"), DeviceMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), DeviceMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), DeviceMemoryError),
        (MemoryError("a compiled kernel could not allocate its room"), DeviceMemoryError),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceLostError),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), DeviceLostError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"), DeviceLostError),
        (RuntimeError("CUDA driver error: unspecified launch failure"), DeviceLostError),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), RuntimeError),
        (ValueError("a bad value"), ValueError),
    ],
)
def test_errors_of_a_device_are_told_apart_from_those_of_a_request(
    raised: Exception, expected: type[Exception]
) -> None:
    with pytest.raises(expected) as caught, device_errors():
        raise raised
    assert caught.type is expected and str(caught.value) == str(raised)
