"""A model over several processes: the tokens of one process, whoever dies, and nobody left behind."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from engine import InferenceEngine, ModelLoadError, SamplingParams
from tests.fakes.echo_engines import child_pid, wait_for_restarts
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.processes import children_of, wait_until_gone
from tests.fakes.reference import generate, random_prompts
from tests.fakes.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(600)

LENGTHS = (1, 5, 40, 130, 300, 17)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=7, n=2, ignore_eos=True)
SMALL_STEPS: dict[str, Any] = {"max_num_seqs": 8, "max_num_tokens": 64, "num_kv_blocks": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[InferenceEngine]:
    """Over two ranks, in steps so small that prompts come in chunks and sequences are preempted."""
    with engine_over(2, folder) as engine:
        yield engine


def engine_over(num_ranks: int, folder: Path) -> InferenceEngine:
    return InferenceEngine(str(folder), device="cpu", dtype="float32", tensor_parallel_size=num_ranks, **SMALL_STEPS)


def greedy_reference(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return [generate(model, prompt, 12, eos_token_id=None) for prompt in prompts]


def tokens(engine: InferenceEngine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [output.token_ids for output in engine.generate_batch(prompts, params)]


def test_two_ranks_give_the_tokens_of_generate(engine: InferenceEngine, folder: Path) -> None:
    prompts = random_prompts(LENGTHS)
    assert tokens(engine, prompts, GREEDY) == greedy_reference(folder, prompts)
    assert engine.info.device == "cpu x2" and engine.info.is_batch_invariant


def test_two_ranks_give_the_embeddings_of_one(engine: InferenceEngine, folder: Path) -> None:
    prompts = random_prompts(LENGTHS)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        states = torch.stack([model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts])
    together = engine.embed(prompts)
    np.testing.assert_allclose(together, torch.nn.functional.normalize(states, dim=1).numpy(), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([engine.embed([prompt]) for prompt in prompts]), together)


def test_three_ranks_give_the_tokens_of_generate_for_a_model_with_normed_heads(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3", tmp_path, num_key_value_heads=3)
    prompts = random_prompts(LENGTHS)
    with engine_over(3, folder) as engine:
        assert tokens(engine, prompts, GREEDY) == greedy_reference(folder, prompts)
        together = choices(engine, prompts)
        assert [choices(engine, [prompt])[0] for prompt in prompts] == together


def test_a_seeded_prompt_is_answered_alike_alone_among_others_and_from_the_prefix_cache(
    engine: InferenceEngine,
) -> None:
    prompts = random_prompts(LENGTHS)
    together = choices(engine, prompts)
    before = engine.get_stats()["num_cached_tokens"]
    assert [choices(engine, [prompt])[0] for prompt in prompts] == together
    assert engine.get_stats()["num_cached_tokens"] > before
    assert together[3][0] != together[3][1]


def choices(engine: InferenceEngine, prompts: list[list[int]]) -> list[list[list[int]]]:
    """The token ids of both choices of each prompt."""
    recorders = [OutputRecorder() for _ in prompts]
    for at, (prompt, recorder) in enumerate(zip(prompts, recorders, strict=True)):
        engine.submit(f"choices-{at}", prompt, SAMPLED, on_output=recorder)
    for recorder in recorders:
        recorder.wait_for_end()
    return [
        [
            [token for output in recorder.outputs if output.index == index for token in output.token_ids]
            for index in range(SAMPLED.n)
        ]
        for recorder in recorders
    ]


def test_a_killed_follower_costs_a_restart_of_all_ranks_and_no_token(engine: InferenceEngine) -> None:
    params = SamplingParams(max_tokens=200, temperature=0.8, seed=3, ignore_eos=True)
    prompts = random_prompts((5, 40))
    expected = tokens(engine, prompts, params)
    leader = child_pid(engine)
    (follower,) = children_of(leader)
    recorders = [OutputRecorder() for _ in prompts]
    for at, (prompt, recorder) in enumerate(zip(prompts, recorders, strict=True)):
        engine.submit(f"killed-{at}", prompt, params, on_output=recorder)
    recorders[0].wait_for_tokens(10)
    os.kill(follower, signal.SIGKILL)
    for recorder in recorders:
        assert recorder.wait_for_end().error is None
    assert [recorder.token_ids for recorder in recorders] == expected
    wait_for_restarts(engine, 1)
    wait_until_gone(follower)
    wait_until_gone(leader)


def test_what_keeps_one_rank_from_starting_is_said(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tensor_parallel_size 4 does not divide .*; set it to 1 or 2"):
        engine_over(4, folder).start()
