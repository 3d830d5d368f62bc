"""A step's arrays on their way to the device: whole, and in buffers that are free again."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.runner.transfer import HostToDevice


@pytest.mark.parametrize("packs", [False, True])
def test_arrays_arrive_whole_whatever_their_types_and_shapes(packs: bool) -> None:
    to_device = HostToDevice(torch.device("cpu"), packs=packs)
    rng = np.random.default_rng(0)
    for size in (1, 5, 300, 2):
        arrays: list[np.ndarray[Any, np.dtype[Any]]] = [
            rng.integers(0, 99, size).astype(np.int32),
            rng.integers(0, 99, (size, 3)),
            rng.random(size).astype(np.float32),
            np.zeros(0, np.int64),
            rng.integers(0, 99, (4, size)).astype(np.int32)[:, ::2],
        ]
        tensors = to_device.send(*arrays)
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.dtype == torch.from_numpy(array).dtype and tensor.shape == array.shape
            assert np.array_equal(tensor.numpy(), array)


def test_a_pinned_buffer_is_written_again_only_when_its_copy_is_done() -> None:
    to_device = HostToDevice(torch.device("cpu"), packs=True)
    happened: list[tuple[str, int]] = []
    to_device._copied = [
        SimpleNamespace(  # type: ignore[misc]
            record=lambda i=i: happened.append(("copied", i)), synchronize=lambda i=i: happened.append(("waited", i))
        )
        for i in range(16)
    ]
    for _ in range(40):
        to_device.send(np.arange(3))
    assert [event for event, _ in happened] == ["waited", "copied"] * 40
    assert [buffer for _, buffer in happened[::2]] == [buffer for _, buffer in happened[1::2]]
    assert len({buffer for _, buffer in happened}) == 16
