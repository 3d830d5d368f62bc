"""The parts of the runner that only CUDA has: the packed pinned copy, the measured cache size, its errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.runner.transfer import HostToDevice
from engine.sampling_params import SamplingParams
from tests.fakes.core_driver import run_to_end
from tests.fakes.tiny_models import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Iterator[Path]:
    yield make_tiny_model("llama", tmp_path)


def test_arrays_arrive_whole_in_one_pinned_copy_while_earlier_ones_are_still_in_use() -> None:
    to_device = HostToDevice(torch.device("cuda"))
    sent = []
    for step in range(50):
        arrays: list[NDArray[Any]] = [np.full((step + 1, 3), step), np.full(7, step, np.int32), np.full(5, 0.5 + step)]
        sent.append((arrays, to_device.send(*arrays)))
        torch.cuda.synchronize()
    for arrays, tensors in sent:
        for array, tensor in zip(arrays, tensors, strict=True):
            assert np.array_equal(tensor.cpu().numpy(), array)


def test_the_cache_is_sized_by_what_the_largest_step_leaves_and_tokens_equal_the_cpus(tiny_llama: Path) -> None:
    outputs = []
    for device, num_kv_blocks in (("cuda", None), ("cpu", 64)):
        config = EngineConfig(
            model_path=str(tiny_llama),
            device=device,
            dtype="float32",
            max_num_seqs=8,
            max_num_tokens=64,
            num_kv_blocks=num_kv_blocks,
            kv_memory_fraction=0.05,
        )
        core = EngineCore(config)
        assert core.info.num_kv_blocks >= 64
        for i in range(6):
            params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
            core.add(AddSequence(sequence_id=i, prompt_token_ids=[20 + i] * (1 + 17 * i), params=params))
        outputs.append(run_to_end(core, 6))
    assert outputs[0] == outputs[1]
