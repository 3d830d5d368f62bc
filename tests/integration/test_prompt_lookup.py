"""Drafts over real arithmetic: the same tokens with and without them, for every kind of sequence and of load.

Tiny random models never repeat themselves, so the guesses come from somebody who knows the answers and is often wrong.
"""

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import EngineConfig, GenerationOutput, InferenceEngine, RequestOutput, SamplingParams
from engine.prompt_lookup.drafter import Drafter
from tests.fakes.child_thread import ChildThread
from tests.fakes.tiny_models import make_tiny_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral"]
NUM_PROMPTS = 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_the_same_with_and_without_in_batches_and_preempted(
    architecture: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(architecture, tmp_path)
    prompts, params = random_prompts(), [params_of(i) for i in range(NUM_PROMPTS)]
    plain, stats = run(folder, dtype, prompts, params, prompt_lookup="off")
    if not stats["is_batch_invariant"]:
        pytest.skip(f"{architecture} in {dtype} is not batch-invariant on this CPU: off by default")
    monkeypatch.setattr(Drafter, "draft", Oracle(prompts, plain).draft)
    guessed, stats = run(folder, dtype, prompts, params, prompt_lookup="auto")
    assert guessed == plain
    assert 0 < stats["num_accepted_draft_tokens"] < stats["num_draft_tokens"]
    squeezed, stats = run(folder, dtype, prompts, params, num_kv_blocks=18, max_model_len=200, max_num_tokens=37)
    assert squeezed == plain
    assert stats["num_preemptions"] > 0 and stats["num_accepted_draft_tokens"] > 0
    resumed, _ = run(folder, dtype, prompts, params, num_resumed=7, outputs=plain)
    assert resumed == plain


def test_it_is_off_by_default_where_arithmetic_depends_on_the_batch(tmp_path: Path) -> None:
    folder = make_tiny_model("mixtral", tmp_path)
    _, stats = run(folder, "float32", [[1, 2, 3] * 9], [SamplingParams(max_tokens=40, temperature=0.0)])
    assert stats["num_draft_tokens"] == 0


class Oracle:
    """Knows how every prompt goes on, and gets one token in six wrong."""

    def __init__(self, prompts: list[list[int]], outputs: list[list[int]]) -> None:
        self._rng = random.Random(4)
        self._wholes = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]

    def draft(self, token_ids: NDArray[np.int32], max_tokens: int) -> NDArray[np.int32]:
        num_tokens = len(token_ids)
        (whole,) = (whole for whole in self._wholes if whole[:num_tokens] == token_ids.tolist())
        draft = whole[num_tokens : num_tokens + min(max(max_tokens, 0), self._rng.randint(0, 9))]
        return np.array([1 if self._rng.random() < 1 / 6 else token_id for token_id in draft], np.int32)


def random_prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(250) for _ in range(rng.randint(2, 50))] for _ in range(NUM_PROMPTS)]


def params_of(i: int) -> SamplingParams:
    """Greedy and sampled ones, with filters and without."""
    filters: dict[str, Any] = {} if i % 2 else {"top_k": 3}
    return SamplingParams(max_tokens=60, temperature=(0.0, 0.7, 1.3)[i % 3], seed=i, ignore_eos=True, **filters)


def run(
    folder: Path,
    dtype: str,
    prompts: list[list[int]],
    params: list[SamplingParams],
    *,
    num_resumed: int = 0,
    outputs: list[list[int]] | None = None,
    **fields: Any,
) -> tuple[list[list[int]], dict[str, Any]]:
    """Every prompt's tokens, those it is resumed with included, and the engine's figures."""
    defaults: dict[str, Any] = {"num_kv_blocks": 512, "num_threads": 1, "max_num_seqs": 8}
    config = EngineConfig(model_path=str(folder), dtype=dtype, **(defaults | fields))
    with InferenceEngine(config=config, _start_child=ChildThread) as engine:
        if outputs is None:
            results: list[GenerationOutput] = engine.generate_batch(prompts, params)
            tokens = [result.token_ids for result in results]
        else:
            tokens = [resume(engine, *entry, num_resumed) for entry in zip(prompts, params, outputs, strict=True)]
        return tokens, engine.get_stats() | {"is_batch_invariant": engine.info.is_batch_invariant}


def resume(
    engine: InferenceEngine, prompt: list[int], params: SamplingParams, output: list[int], num_resumed: int
) -> list[int]:
    done = threading.Event()
    tokens: list[int] = []

    def on_output(request_output: RequestOutput) -> None:
        tokens.extend(request_output.token_ids)
        if request_output.finished:
            done.set()

    engine.submit("resumed", prompt, params, output_token_ids=[output[:num_resumed]], on_output=on_output)
    assert done.wait(60)
    return tokens
