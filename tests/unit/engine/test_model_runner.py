"""The core on torch with tiny random models: the same tokens as transformers' own `generate`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.attention.base import AttentionBatch
from engine.core import EngineCore
from engine.errors import DeviceLostError, DeviceMemoryError
from engine.messages import AddSequence
from engine.model.loader import LoadedModel
from engine.runner import memory
from engine.runner.model_runner import ModelRunner
from engine.sampler import SamplingBatch
from engine.sampling_params import SamplingParams
from tests.fakes.core_driver import run_to_end
from tests.fakes.reference import generate, random_prompts
from tests.fakes.tiny_models import make_tiny_model, tiny_config

LENGTHS = [1, 2, 16, 17, 100, 5, 33, 64, 3, 48]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def run(core: EngineCore, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    sampling = SamplingParams(**{"max_tokens": 20, "temperature": 0.0, "ignore_eos": True} | params)
    for i, prompt in enumerate(prompts):
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=sampling))
    return run_to_end(core, len(prompts))


def reference(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # the engine ignores it here; min_new_tokens would forbid it instead
    return [generate(model, prompt, 20) for prompt in prompts]


def test_greedy_tokens_equal_generate_with_chunked_prefill_and_preemption(tiny_llama: Path) -> None:
    prompts = random_prompts(LENGTHS)
    core = EngineCore(tiny_config(tiny_llama))
    assert run(core, prompts) == reference(tiny_llama, prompts)
    stats = core.get_stats()
    assert stats.num_preemptions > 0 and stats.num_prompt_tokens > sum(LENGTHS) and stats.num_kv_blocks_used == 0


def test_prefix_hits_of_one_step_change_no_token(tiny_llama: Path) -> None:
    prefix, *tails = random_prompts([40, 3, 9, 1, 20])
    prompts = [prefix + tail for tail in tails]
    core = EngineCore(tiny_config(tiny_llama, max_num_tokens=256, num_kv_blocks=64))
    assert run(core, prompts) == reference(tiny_llama, prompts)
    assert core.get_stats().num_cached_tokens == 3 * 32


def test_sampled_tokens_do_not_depend_on_chunks_or_neighbours(tiny_llama: Path) -> None:
    prompts = random_prompts(LENGTHS)
    sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 4}
    roomy = run(EngineCore(tiny_config(tiny_llama, max_num_tokens=512, num_kv_blocks=200)), prompts, **sampling)
    assert run(EngineCore(tiny_config(tiny_llama)), prompts, **sampling) == roomy


def test_the_info_tells_the_bound_of_a_small_cache(tiny_llama: Path) -> None:
    info = EngineCore(tiny_config(tiny_llama, num_kv_blocks=3)).info
    assert (info.max_model_len, info.num_kv_blocks, info.block_size) == (48, 3, 16)
    assert info.dtype == "float32" and info.device == "cpu"


@pytest.fixture
def runner(tiny_llama: Path) -> Iterator[ModelRunner]:
    yield ModelRunner(tiny_config(tiny_llama))


def test_bad_logits_fail_their_own_row_alone(runner: ModelRunner, tiny_llama: Path) -> None:
    network: Any = runner._model.model
    embedding = network.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[7] = float("nan")
    core = EngineCore(tiny_config(tiny_llama), runner=runner)
    prompts = [[20, 21, 22], [23, 7, 24], [25] * 20]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=params))
    errors: dict[int, str] = {}
    num_tokens = 0
    while core.has_work():
        step = core.step()
        errors |= step.errors
        num_tokens += len(step.token_ids)
    assert list(errors) == [1] and "not finite" in errors[1] and num_tokens == 8


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceMemoryError),
        (MemoryError("a compiled kernel could not allocate its room"), DeviceMemoryError),
        (torch.AcceleratorError("device-side assert triggered"), DeviceLostError),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_what_torch_raises_is_told_apart(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], tiny_llama: Path
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(type(runner._model), "forward", fail)
    seen: list[type[Exception]] = []
    execute = runner.execute

    def watch(inputs: Any) -> Any:
        try:
            return execute(inputs)
        except Exception as error:
            seen.append(type(error))
            raise

    monkeypatch.setattr(runner, "execute", watch)
    core = EngineCore(tiny_config(tiny_llama), runner=runner)
    core.add(AddSequence(sequence_id=0, prompt_token_ids=[20], params=SamplingParams(max_tokens=1)))
    if expected is DeviceLostError:
        with pytest.raises(DeviceLostError):
            core.step()
    else:
        assert list(core.step().errors) == [0]
    assert seen == [expected]


def test_a_step_beyond_the_devices_memory_changes_no_token_and_ends_nothing(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    prompts = random_prompts([20, 5, 30, 2])
    expected = run(EngineCore(tiny_config(tiny_llama)), prompts, max_tokens=4)
    forward = type(runner._model).forward
    sizes: list[int] = []

    def run_out_of_memory(model: LoadedModel, input_ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, input_ids, *rest)

    monkeypatch.setattr(type(runner._model), "forward", run_out_of_memory)
    assert run(EngineCore(tiny_config(tiny_llama), runner=runner), prompts, max_tokens=4) == expected
    assert max(sizes) == 32


@pytest.mark.parametrize(
    ("num_sent", "fields"),  # before there is no room: for how rows are drawn, or for what is edited of them
    [(0, {"seed": 5}), (1, {"logit_bias": ((7, 9.0),)})],
)
def test_a_step_run_again_for_want_of_memory_is_not_sampled_by_the_parameters_before(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, num_sent: int, fields: dict[str, Any]
) -> None:
    send, failing = runner._to_device.send, iter([False])

    def run_out_of_memory(*arrays: Any) -> Any:
        if len(arrays) == 7 and next(failing, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return send(*arrays)

    monkeypatch.setattr(runner._to_device, "send", run_out_of_memory)
    outputs = []
    for fails in ([], [False] * num_sent + [True]):
        core = EngineCore(tiny_config(tiny_llama), runner=runner)
        run(core, [[30, 31]], temperature=0.9, seed=1, logit_bias=((9, 9.0),))
        failing = iter(fails)
        params = SamplingParams(max_tokens=4, temperature=0.9, ignore_eos=True, **fields)
        core.add(AddSequence(sequence_id=0, prompt_token_ids=[20, 21, 22], params=params))
        outputs.append(run_to_end(core, 1))
    assert outputs[0] == outputs[1] and not list(failing)


def test_a_row_that_makes_the_sampler_raise_fails_alone(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    sampler = runner._sampler._sampler
    sample = sampler.sample

    def raise_for_seed_13(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        if 13 in batch.seed:
            raise ValueError("a filter without a token")
        return sample(logits, batch)

    monkeypatch.setattr(sampler, "sample", raise_for_seed_13)
    core = EngineCore(tiny_config(tiny_llama), runner=runner)
    for i, seed in enumerate([12, 13, 14]):
        params = SamplingParams(max_tokens=4, seed=seed, ignore_eos=True)
        core.add(AddSequence(sequence_id=i, prompt_token_ids=[20, 21, 22], params=params))
    errors: dict[int, str] = {}
    tokens: dict[int, int] = {}
    while core.has_work():
        step = core.step()
        core.check_integrity()
        errors |= step.errors
        for sequence_id in step.sequence_ids.tolist():
            tokens[sequence_id] = tokens.get(sequence_id, 0) + 1
    assert errors == {1: "ValueError: a filter without a token"} and tokens == {0: 4, 2: 4}


def test_the_largest_step_runs_over_a_single_block(tiny_llama: Path) -> None:
    settings = tiny_config(tiny_llama, max_num_tokens=100, max_num_seqs=8, max_model_len=40)
    runner = ModelRunner(settings)
    runner._model.allocate_kv_cache(1)
    with torch.inference_mode():
        tokens = runner._compute(memory.largest_step(settings, 40))
    assert tokens.token_ids.shape == (8,)
    batch = runner._model.context.batch
    assert isinstance(batch, AttentionBatch) and batch.query_start.tolist() == [0, 40, 80, 100]
