"""The demo model with keys and values in 8 bits: next to what it says without, and the same under any load."""

import statistics
from pydoc_data import topics
from typing import Any

import pytest

from engine import InferenceEngine, SamplingParams
from engine.tokenizer import Tokenizer

pytestmark = [pytest.mark.timeout(600), pytest.mark.model]

NUM_WINDOWS, WINDOW = 3, 300  # tokens
SCORING = SamplingParams(max_tokens=0, prompt_logprobs=1, temperature=0.0)


@pytest.fixture(scope="module")
def text() -> str:
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))[:20_000]


def start(**fields: Any) -> InferenceEngine:
    return InferenceEngine("smollm2-135m", device="cpu", num_threads=1, **fields)


def scores_of(text: str, **fields: str) -> tuple[list[float], list[int]]:
    """Log-probabilities of the text's tokens, and the likeliest token at each place."""
    with start(num_kv_blocks=512, dtype="float32", **fields) as engine:
        ids = Tokenizer.from_folder(engine.info.model_dir).encode(text)[: NUM_WINDOWS * WINDOW]
        assert len(ids) == NUM_WINDOWS * WINDOW
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
        outputs = engine.generate_batch(windows, SCORING)
    entries = [entry for output in outputs for entry in output.prompt_logprobs or [] if entry is not None]
    return [entry.logprob for entry in entries], [entry.top[0][0] for entry in entries]


def test_the_likeliest_next_token_is_mostly_the_same_and_the_text_as_likely(text: str) -> None:
    plain, likeliest = scores_of(text)
    in_8_bits, same = scores_of(text, kv_cache_dtype="int8")
    share = statistics.fmean(a == b for a, b in zip(likeliest, same, strict=True))
    assert in_8_bits != plain
    assert share > 0.975, "98.6% were seen"
    assert abs(statistics.fmean(in_8_bits) - statistics.fmean(plain)) < 2e-3, "2e-4 was seen"


def test_preemption_and_the_prefix_cache_change_no_token() -> None:
    common = [(7 * i) % 40_000 + 100 for i in range(70)]
    prompts = [[*common[: 70 - 5 * (i % 3)], *range(100 + i, 100 + 3 * i)] for i in range(12)]
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    fields: dict[str, Any] = {"quantize": "int8", "kv_cache_dtype": "int8"}
    with start(num_kv_blocks=256, prefix_caching=False, **fields) as engine:
        expected = [engine.generate_batch([prompt], params)[0].token_ids for prompt in prompts]
    with start(num_kv_blocks=20, max_num_seqs=8, max_num_tokens=64, max_model_len=160, **fields) as engine:
        outputs = engine.generate_batch(prompts, params)
        stats = engine.get_stats()
    assert stats["num_preemptions"] > 0, "the block pool was to force preemption"
    assert stats["num_cached_tokens"] > 0, "prefixes were to be found"
    assert [output.token_ids for output in outputs] == expected
