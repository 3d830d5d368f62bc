"""A model over two GPUs: NCCL's sums, alone and within graphs, with steps computed ahead."""

from pathlib import Path

import pytest
import torch

from engine import InferenceEngine, SamplingParams
from tests.fakes.reference import random_prompts
from tests.fakes.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_two_gpus_give_the_tokens_of_a_cpu(deterministic: bool, cuda_graphs: bool, tmp_path: Path) -> None:
    folder = str(make_tiny_model("qwen3", tmp_path))
    prompts = random_prompts((1, 5, 40, 130, 300, 17))
    params = [SamplingParams(max_tokens=40, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(6)]
    tokens = []
    for fields in (
        {"device": "cpu"},
        {"device": "cuda", "tensor_parallel_size": 2, "deterministic": deterministic, "cuda_graphs": cuda_graphs},
    ):
        with InferenceEngine(folder, dtype="float32", max_num_seqs=8, num_kv_blocks=128, **fields) as engine:
            tokens.append([output.token_ids for output in engine.generate_batch(prompts, params)])
    assert tokens[0] == tokens[1]
