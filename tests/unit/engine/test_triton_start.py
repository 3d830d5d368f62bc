"""A start runs every kernel that jobs may need, in each form that it is compiled to: no job waits for a compiler."""

import random
from pathlib import Path
from typing import Any

import pytest
import triton

from engine.attention import triton_backend
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.grammar_spec import GrammarSpec
from engine.messages import AddSequence
from engine.sampling_params import SamplingParams
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.kernel_forms import KernelForms
from tests.fakes.replayed_steps import replay_steps
from tests.fakes.tiny_models import make_tiny_model

speed_up_interpreter()

NUM_JOBS = 60
WISHES: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logit_bias": ((5, 3.0),)},
    {"grammar": GrammarSpec("regex", "(ab|cd|[x-z]){3,30}")},
]
FILTERS: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}]


def random_job(rng: random.Random, job_id: int) -> AddSequence:
    """Some wishes, some filters, or a prompt's embedding; a prompt that fits a graph or one that does not."""
    options: dict[str, Any] = {"temperature": rng.choice([0.0, 0.8, 0.8]), "ignore_eos": rng.random() < 0.5}
    for more in (*rng.sample(WISHES, rng.choice([0, 0, 1, 2])), rng.choice(FILTERS)):
        options |= more
    pooling: Any = rng.choice([None, None, None, "last", "mean"])
    params = SamplingParams(max_tokens=0) if pooling else SamplingParams(max_tokens=rng.randint(1, 6), **options)
    return AddSequence(
        sequence_id=job_id,
        prompt_token_ids=[rng.randrange(200) for _ in range(rng.choice([1, 2, 5, 11, 20, 40]))],
        params=params,
        num_scored=None if params.prompt_logprobs is None else 0,
        pooling=pooling,
    )


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("model", "max_num_seqs", "cuda_graphs"),
    # The third one's attention is not fused, and its heads are no multiples of 16.
    [("llama", 6, True), ("gemma2", 1, True), ("gpt_neox", 6, True), ("llama", 6, False)],
)
def test_jobs_of_all_kinds_need_no_kernel_that_the_start_did_not_run(
    model: str, max_num_seqs: int, cuda_graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay_steps(monkeypatch)
    monkeypatch.setattr(triton_backend, "_num_places", lambda num_seqs: 2 if num_seqs <= 2 else 8)
    config = EngineConfig(
        model_path=str(make_tiny_model(model, tmp_path)),
        device="cpu",
        dtype="bfloat16",
        attention="triton",
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_num_tokens=12,
        num_kv_blocks=32,
        max_model_len=64,
        cuda_graphs=cuda_graphs,
    )
    forms = KernelForms(monkeypatch)
    core, rng, num_jobs = EngineCore(config, tries_grammars_apart=False), random.Random(0), 0
    at_start = set(forms.seen)
    while num_jobs < NUM_JOBS or core.has_work():
        if num_jobs < NUM_JOBS and rng.random() < 0.6:
            core.add(random_job(rng, num_jobs))
            num_jobs += 1
        output = core.step()
        assert not output.errors and not output.grammar_errors
    assert sorted({form[0] for form in forms.seen - at_start}) == []
