"""The judge of the engine: greedy output equals transformers' `generate`, token for token.

64 prompts of 1 to 1,500 tokens (400 of the demo model) share one batch, under a token budget and a block pool that
force chunked prefill and preemption, in float32.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import EngineConfig, InferenceEngine, SamplingParams
from engine.model.locate import default_cache_dir, prepare_model_dir
from engine.process import Child, ChildProcess
from tests.fakes.child_thread import ChildThread
from tests.fakes.reference import generate
from tests.fakes.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(900)

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2"]
NUM_PROMPTS = 64
LONGEST = 1500
LONG = 300  # the longest but one may be so long
DEMO_LONGEST, DEMO_LONG = 400, 60  # of the demo model, which takes a second of a core for every hundred tokens
# The longest and some short prompts go on while the others come and go.
MAX_TOKENS = [20] * 8 + [3] * (NUM_PROMPTS - 8)
DEMO_MAX_TOKENS = [12] * 8 + [2] * (NUM_PROMPTS - 8)
BLOCK_SIZE = 16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_generate_for_64_mixed_prompts_in_one_batch(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(architecture, tmp_path)
    model = load_reference(str(folder))
    prompts = mixed_prompts(vocab_size=model.config.vocab_size)
    expected = reference_tokens(model, prompts, MAX_TOKENS)
    assert expected == engine_tokens(str(folder), prompts, MAX_TOKENS, start_child=ChildThread)


@pytest.mark.model
def test_the_demo_model_equals_generate_for_64_mixed_prompts_in_one_batch() -> None:
    folder = str(prepare_model_dir("smollm2-135m", default_cache_dir()))
    model = load_reference(folder)
    prompts = mixed_prompts(vocab_size=40_000, longest=DEMO_LONGEST, long=DEMO_LONG)
    assert reference_tokens(model, prompts, DEMO_MAX_TOKENS) == engine_tokens(folder, prompts, DEMO_MAX_TOKENS)


@pytest.mark.model
def test_a_seeded_prompt_gives_the_same_output_alone_and_among_63_others() -> None:
    prompts = mixed_prompts(vocab_size=40_000, longest=100)
    params = [SamplingParams(max_tokens=10, temperature=0.9, top_p=0.95, top_k=50, seed=i) for i in range(NUM_PROMPTS)]
    with InferenceEngine("smollm2-135m", num_threads=1, num_kv_blocks=1024, prefix_caching=False) as engine:
        together = engine.generate_batch(prompts, params)
        for i in (0, 13, 63):
            alone = engine.generate_batch([prompts[i]], [params[i]])
            assert alone[0].token_ids == together[i].token_ids, f"prompt {i} of {len(prompts[i])} tokens"


def mixed_prompts(*, vocab_size: int, longest: int = LONGEST, long: int = LONG) -> list[list[int]]:
    """Lengths 1 and `longest`, and between them mostly short ones, as traffic is."""
    rng = random.Random(7)
    lengths = [longest, 1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE + 1]
    lengths += [max(1, int(min(longest, long) ** rng.random())) for _ in range(NUM_PROMPTS - len(lengths))]
    return [[rng.randrange(10, vocab_size) for _ in range(length)] for length in lengths]


def load_reference(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    # `ignore_eos` goes on past the end of sequence; `min_new_tokens` would forbid to sample it.
    model.generation_config.eos_token_id = None
    return model


def reference_tokens(model: Any, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
    return [generate(model, prompt, number) for prompt, number in zip(prompts, max_tokens, strict=True)]


def engine_tokens(
    folder: str,
    prompts: list[list[int]],
    max_tokens: list[int],
    *,
    start_child: Callable[[EngineConfig], Child] = ChildProcess,
) -> list[list[int]]:
    """All prompts at once, with room for little more than the longest of them."""
    max_model_len = max(map(len, prompts)) + MAX_TOKENS[0] + 1
    config = EngineConfig(
        model_path=folder,
        dtype="float32",
        max_num_seqs=64,
        max_num_tokens=128,
        max_model_len=max_model_len,
        block_size=BLOCK_SIZE,
        num_kv_blocks=max_model_len // BLOCK_SIZE + 5,
        num_threads=1,
    )
    with InferenceEngine(config=config, _start_child=start_child) as engine:
        params = [SamplingParams(max_tokens=number, temperature=0.0, ignore_eos=True) for number in max_tokens]
        outputs = engine.generate_batch(prompts, params)
        stats = engine.get_stats()
    assert stats["num_preemptions"] > 0, "the block pool was to force preemption"
    assert stats["num_kv_blocks_used"] == 0
    return [output.token_ids for output in outputs]
