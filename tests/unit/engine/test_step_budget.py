"""How many tokens a GPU's step gets: the fewest that are computed about as fast as many, beside all decodes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import triton

import engine.config
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import DeviceMemoryError
from engine.messages import AddSequence
from engine.model.loader import LoadedModel
from engine.runner import step_budget
from engine.runner.batch_inputs import BatchInputs
from engine.runner.model_runner import ModelRunner
from engine.runner.step_budget import choose_step_tokens, few_prefill_tokens, measure_step_tokens, prefill_step
from engine.sampling_params import SamplingParams
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.tiny_models import make_tiny_model

speed_up_interpreter()


@pytest.mark.parametrize(
    ("fixed", "each", "chosen"),
    [
        (0.0, 1e-5, 512 + 256),  # as fast with any number
        (1e-3, 1e-5, 2048 + 256),  # 95% of the speed with 8192, but not with 1024
        (1e-2, 1e-6, 8192),  # waits for the host, or for weights, most of the time
    ],
)
def test_a_step_is_as_short_as_speed_allows(fixed: float, each: float, chosen: int) -> None:
    runs: list[int] = []

    def seconds(num_tokens: int) -> float:
        runs.append(num_tokens)
        compiling = 5.0 if runs.count(num_tokens) < 3 else 0.0
        return compiling + fixed + each * num_tokens

    assert choose_step_tokens(8192, 256, seconds) == chosen
    assert max(map(runs.count, runs)) == 3


@pytest.mark.parametrize(("num_threads", "tokens"), [(1, 64), (2, 128), (64, 512)])
def test_few_prompts_on_a_cpu_get_a_share_of_a_step_for_each_thread(num_threads: int, tokens: int) -> None:
    assert few_prefill_tokens(num_threads) == tokens


def test_a_step_that_there_is_no_memory_for_is_not_chosen_and_ends_no_start() -> None:
    model = cast(LoadedModel, SimpleNamespace(device="cuda:0", max_model_len=1024))
    runs: list[int] = []

    def run(inputs: BatchInputs) -> None:
        runs.append(inputs.num_tokens)
        if inputs.num_tokens > 2048:
            raise DeviceMemoryError("CUDA out of memory")

    config = EngineConfig(model_path="", max_num_seqs=64)
    assert measure_step_tokens(config, model, 2000, run) <= 2048 + 64 and max(runs) == 8192


def test_a_small_limit_is_kept() -> None:
    assert choose_step_tokens(600, 600, lambda num_tokens: num_tokens * 1e-5) == 600


@pytest.mark.parametrize("num_tokens", [512, 1000, 8192])
def test_the_step_that_is_measured_has_prompts_in_blocks_of_their_own(num_tokens: int) -> None:
    config = EngineConfig(model_path="", block_size=16)
    inputs = prefill_step(config, num_tokens, max_model_len=2048, num_blocks=2000)
    assert inputs.num_tokens == num_tokens == len(inputs.position_ids) == inputs.query_start[-1]
    assert len(set(inputs.slot_mapping.tolist())) == num_tokens
    assert inputs.context_lens.tolist() == np.diff(inputs.query_start).tolist()
    assert len(inputs.logits_indices) == len(inputs.sampling) == inputs.num_seqs == -(-num_tokens // 512)
    places = inputs.block_tables[0, inputs.position_ids[:512] // 16] * 16 + inputs.position_ids[:512] % 16
    assert places.tolist() == inputs.slot_mapping[:512].tolist()


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_runner_measures_its_steps_and_the_scheduler_keeps_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.config, "_CPU_STEP_TOKENS", 16)
    monkeypatch.setattr(step_budget, "LEAST_TOKENS", 8)
    monkeypatch.setattr(ModelRunner, "_runs_ahead", lambda self: True)
    measured: list[int] = []

    def choose(most: int, max_num_seqs: int, step_seconds: Callable[[int], float]) -> int:
        measured.append(most)
        assert step_seconds(8) > 0
        return 8 + max_num_seqs

    monkeypatch.setattr(step_budget, "choose_step_tokens", choose)
    folder = make_tiny_model("llama", tmp_path)
    options = {"device": "cpu", "dtype": "float32", "attention": "triton", "block_size": 4, "num_kv_blocks": 24}
    config = EngineConfig(model_path=str(folder), max_num_seqs=3, **options)  # type: ignore[arg-type]
    runner = ModelRunner(config)
    core = EngineCore(config, runner=runner)
    assert runner.info.step_tokens == 11 and measured == [16]
    core.add(AddSequence(sequence_id=0, prompt_token_ids=[7] * 20, params=SamplingParams(max_tokens=1)))
    assert [len(core.step().token_ids) for _ in range(2)] == [0, 1], "20 tokens are two steps of at most 11"
    said = replace(config, max_num_tokens=5)
    assert ModelRunner(said).info.step_tokens is None and len(measured) == 1
