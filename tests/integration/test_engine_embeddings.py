"""The judge of embeddings: transformers' own hidden states of the demo model, and the same bits in any company."""

import asyncio
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from engine import (
    ContextLengthError,
    EngineNotRunningError,
    InferenceEngine,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
)
from engine.model.locate import default_cache_dir, prepare_model_dir
from tests.fakes.echo_engines import child_pid, wait_for_restarts

TEXTS = [
    "What is the capital of France?",
    "Paris is the capital of France.",
    "Bread is baked of flour, water and salt; " * 20,  # longer than a step
    "x",
]
HIDDEN_SIZE = 576


def engine_in(dtype: str) -> InferenceEngine:
    sizes: dict[str, Any] = {"max_num_seqs": 32, "max_num_tokens": 64, "max_model_len": 512, "num_kv_blocks": 128}
    return InferenceEngine("smollm2-135m", device="cpu", dtype=dtype, num_threads=1, **sizes)


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    with engine_in("float32") as engine:
        yield engine


def expected(texts: list[str], dtype: torch.dtype = torch.float32) -> NDArray[np.float32]:
    folder = str(prepare_model_dir("smollm2-135m", default_cache_dir()))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    with torch.inference_mode():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1].float() for text in texts]
    rows: NDArray[np.float32] = torch.nn.functional.normalize(torch.stack(states), dim=1).numpy()
    return rows


@pytest.mark.model
def test_embeddings_are_transformers_alone_in_a_batch_and_beside_generation(engine: InferenceEngine) -> None:
    together = engine.embed(TEXTS)
    assert together.shape == (len(TEXTS), HIDDEN_SIZE) and together.dtype == np.float32
    np.testing.assert_allclose(together, expected(TEXTS), rtol=0, atol=2e-5)
    begun = threading.Event()
    for i in range(3):
        params = SamplingParams(max_tokens=200, ignore_eos=True, seed=i)
        engine.submit(f"beside-{i}", [20 + i] * 40, params, on_output=lambda output: begun.set())
    assert begun.wait(60)
    for place, text in enumerate(TEXTS):
        np.testing.assert_array_equal(engine.embed([text])[0], together[place])
    for i in range(3):
        engine.abort(f"beside-{i}")


@pytest.mark.model
def test_in_bfloat16_they_are_as_near_to_float32_as_transformers_are() -> None:
    words = " ".join(TEXTS).split()
    rng = random.Random(1)
    texts = [" ".join(rng.choices(words, k=length)) for length in (20, 60, 150) for _ in range(2)]
    exact = expected(texts)
    with engine_in("bfloat16") as engine:
        ours = engine.embed(texts)
        np.testing.assert_array_equal(engine.embed(texts[-1:]), ours[-1:])
    theirs = expected(texts, torch.bfloat16)
    # Both round where the other does, in sums of another order: the mean over texts differs by less than a quarter.
    assert np.linalg.norm(ours - exact, axis=1).mean() < 1.25 * np.linalg.norm(theirs - exact, axis=1).mean()


@pytest.mark.model
def test_token_ids_cut_vectors_and_an_event_loop_give_the_same(engine: InferenceEngine) -> None:
    whole = engine.embed(TEXTS[:1])
    token_ids = engine.tokenizer.encode(TEXTS[0])
    np.testing.assert_array_equal(asyncio.run(engine.embed_async([token_ids])), whole)
    cut = engine.embed([token_ids], dimensions=64)
    np.testing.assert_allclose(cut[0], whole[0, :64] / np.linalg.norm(whole[0, :64]), rtol=1e-5)


@pytest.mark.model
def test_a_child_killed_in_between_changes_no_vector(engine: InferenceEngine) -> None:
    texts = [engine.tokenizer.encode(f"{text[:60]} number {i}") for i, text in enumerate(TEXTS * 6)]
    undisturbed = engine.embed(texts)
    vectors: dict[int, NDArray[np.float32]] = {}
    ended = threading.Event()

    def note(output: RequestOutput) -> None:
        assert output.embedding is not None and output.index not in vectors, output.error
        vectors[output.index] = output.embedding
        if len(vectors) == 1:
            os.kill(child_pid(engine), signal.SIGKILL)
        if output.finished:
            ended.set()

    engine.submit_embedding("killed", texts, on_output=note)
    assert ended.wait(120)
    wait_for_restarts(engine, 1)
    for place, vector in enumerate(undisturbed):
        np.testing.assert_array_equal(vectors[place], vector)


@pytest.mark.model
def test_what_cannot_be_embedded_is_refused_by_name(engine: InferenceEngine) -> None:
    with pytest.raises(ContextLengthError, match=r"prompts\[1\]: prompt has 513 tokens, but the context holds 512"):
        engine.embed(["a", [5] * 513])
    for prompts, dimensions, param in (([""], None, "prompt"), ([], None, "prompts"), (["a"], 577, "dimensions")):
        with pytest.raises(InvalidRequestError) as refusal:
            engine.embed(prompts, dimensions)
        assert refusal.value.param == param


def test_an_engine_that_does_not_run_embeds_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineNotRunningError):
        InferenceEngine(str(tmp_path)).embed(["a"])
