"""Embeddings in the core: pooled from transformers' own hidden states, the same bits beside whatever is generated."""

import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ContextLengthError, InvalidRequestError
from engine.messages import AddSequence, StepOutput
from engine.model.registry import ARCHITECTURES
from engine.pooler import Pooler, PoolingMode
from engine.pooling import Pooling
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from tests.fakes.tiny_models import make_tiny_model

MODES: tuple[PoolingMode, PoolingMode] = ("last", "mean")
NOTHING = SamplingParams(max_tokens=0)
GENERATED = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)


def texts() -> list[list[int]]:
    """Some that begin alike, one of a single token, and one that fills the context."""
    rng = random.Random(4)
    prefix = [rng.randrange(250) for _ in range(20)]
    own = [[rng.randrange(250) for _ in range(length)] for length in (1, 7, 33, 96)]
    return own + [prefix + [rng.randrange(250) for _ in range(length)] for length in (0, 3, 15)]


def core_of(folder: Path, **fields: Any) -> EngineCore:
    defaults: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 8, "num_kv_blocks": 200}
    return EngineCore(EngineConfig(model_path=str(folder), **(defaults | fields)))


def embed(core: EngineCore, prompts: list[list[int]], mode: PoolingMode) -> list[NDArray[np.float32]]:
    """Of each in turn, all at once."""
    for i, prompt in enumerate(prompts):
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=NOTHING, pooling=mode))
    return [vector for _, vector in sorted(run(core).embeddings.items())]


def run(core: EngineCore) -> StepOutput:
    output = StepOutput.nothing()
    while core.has_work():
        output = output.then(core.step())
        core.check_integrity()
    assert not output.errors
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_vectors_are_pooled_from_transformers_hidden_states(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(architecture, tmp_path)
    entry = ARCHITECTURES[architecture]
    model_class = getattr(import_module(entry.module_name), entry.class_name)
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval().base_model
    with torch.inference_mode():
        states = [model(torch.tensor([text])).last_hidden_state[0].numpy() for text in texts()]
    core = core_of(folder, max_num_tokens=40, max_num_seqs=8)
    for vector, state in zip(embed(core, texts(), "last"), states, strict=True):
        np.testing.assert_allclose(vector, state[-1], rtol=0, atol=1e-5 * np.abs(state).max())
    for vector, state in zip(embed(core, texts(), "mean"), states, strict=True):
        np.testing.assert_allclose(vector, state.mean(axis=0), rtol=0, atol=1e-5 * np.abs(state).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("numbers", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
def test_a_vector_is_the_same_to_the_bit_in_chunks_preempted_and_beside_generation(
    folder: Path, numbers: dict[str, str], mode: PoolingMode
) -> None:
    core = core_of(folder, prefix_caching=False, **numbers)
    alone = [embed(core, [text], mode)[0] for text in texts()]
    # Not half of the blocks that all of them want, and steps of a few tokens.
    busy = core_of(folder, max_num_tokens=11, num_kv_blocks=14, max_num_seqs=5, **numbers)
    for round_of_them in range(2):  # the second over what the first has left in the prefix cache
        first = len(texts()) * round_of_them
        for i, text in enumerate(texts()):
            prompt = AddSequence(
                sequence_id=100 + first + i, prompt_token_ids=text[:20], params=GENERATED, priority=i % 2 - 1
            )
            busy.add(AddSequence(sequence_id=first + i, prompt_token_ids=text, params=NOTHING, pooling=mode))
            busy.add(prompt)
            busy.step()
        output = run(busy)
        _assert_equal(output.embeddings, dict(enumerate(alone, first)))
    assert busy.get_stats().num_preemptions and busy.get_stats().num_cached_tokens


def _assert_equal(found: dict[int, NDArray[np.float32]], expected: dict[int, NDArray[np.float32]]) -> None:
    for sequence_id, vector in found.items():
        np.testing.assert_array_equal(vector, expected[sequence_id])


def test_the_mean_has_one_order_of_additions() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 33), np.float32) * 1e3
    whole = Pooler("mean", 50)
    whole.add(rows)
    for cuts in ([1], [7, 8, 30], list(range(1, 50))):
        parts = Pooler("mean", 50)
        for part in np.split(rows, cuts):
            parts.add(part)
        np.testing.assert_array_equal(parts.vector(), whole.vector())
    np.testing.assert_allclose(whole.vector(), rows.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_nothing_is_sampled_and_no_block_stays(folder: Path) -> None:
    core = core_of(folder, prefix_caching=False)
    core.add(AddSequence(sequence_id=0, prompt_token_ids=[5] * 30, params=NOTHING, pooling="mean"))
    output = core.step()
    assert not len(output.token_ids) and list(output.embeddings) == [0]
    stats = core.get_stats()
    assert (stats.num_generated_tokens, stats.num_prompt_tokens, stats.num_kv_blocks_used) == (0, 30, 0)


def test_a_prompt_may_fill_the_context_and_no_more(folder: Path) -> None:
    core = core_of(folder)
    with pytest.raises(ContextLengthError, match="prompt has 97 tokens, but 96 fit here"):
        core.add(AddSequence(sequence_id=0, prompt_token_ids=[5] * 97, params=NOTHING, pooling="last"))
    assert len(embed(core, [[5] * 96], "last")) == 1


def test_hidden_states_that_are_not_finite_fail_their_own_sequence(folder: Path) -> None:
    config = EngineConfig(model_path=str(folder), dtype="float32", num_kv_blocks=32)
    runner = ModelRunner(config)
    network: Any = runner._model.model
    with torch.no_grad():
        network.get_input_embeddings().weight[7] = float("nan")
    core = EngineCore(config, runner=runner)
    for i, prompt in enumerate([[20, 21], [23, 7, 24], [25] * 20]):
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=NOTHING, pooling="mean"))
    output = StepOutput.nothing()
    while core.has_work():
        output = output.then(core.step())
        core.check_integrity()
    assert list(output.errors) == [1] and "hidden states were not finite" in output.errors[1]
    assert sorted(output.embeddings) == [0, 2]


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma"])
def test_a_checkpoint_without_an_output_layer_embeds(architecture: str, tmp_path: Path) -> None:
    """As a `Qwen3Model` is saved: no output layer, no prefix before the names."""
    whole = make_tiny_model(architecture, tmp_path / "whole")
    entry = ARCHITECTURES[architecture]
    model_class = getattr(import_module(entry.module_name), entry.class_name)
    headless = make_tiny_model(architecture, tmp_path / "headless")
    model_class.from_pretrained(whole, dtype=torch.float32).base_model.save_pretrained(headless)
    tied = architecture == "gemma"  # its output layer is the embedding table
    core = core_of(headless)
    assert (core.info.can_generate, core.info.vocab_size) == (tied, core_of(whole).info.vocab_size)
    for vector, same in zip(embed(core, texts(), "last"), embed(core_of(whole), texts(), "last"), strict=True):
        np.testing.assert_array_equal(vector, same)


def write_files(folder: Path, *, pooling: dict[str, Any] | None = None, modules: list[str] | None = None) -> Path:
    """As sentence-transformers writes them."""
    names = ["Transformer", "Pooling", "Normalize"] if modules is None else modules
    entries = [{"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"} for i, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_lasttoken": True}))
    return folder


def test_a_folder_says_how_it_pools(tmp_path: Path) -> None:
    assert Pooling.from_folder(tmp_path) == Pooling("last", normalizes=True)
    every = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
    cases: list[tuple[dict[str, Any] | None, str]]
    cases = [(every, "mean"), ({"pooling_mode": "lasttoken"}, "last"), (None, "last")]
    for i, (pooling, mode) in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert Pooling.from_folder(write_files(folder, pooling=pooling)).mode == mode
    (tmp_path / "bare").mkdir()
    assert not Pooling.from_folder(write_files(tmp_path / "bare", modules=["Transformer", "Pooling"])).normalizes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pooling": {"pooling_mode_cls_token": True}}, "asks for the pooling pooling_mode_cls_token"),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            r"pooling_mode_cls_token \+ pooling_mode_mean_tokens",
        ),
        ({"pooling": {"pooling_mode": "max"}}, "asks for the pooling max"),
        ({"pooling": {"pooling_mode_mean_tokens": True, "include_prompt": False}}, "include_prompt: false"),
        ({"modules": ["Transformer", "Pooling", "Dense"]}, "asks for the module Dense"),
    ],
)
def test_what_is_not_done_is_refused_by_name(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refusal:
        Pooling.from_folder(write_files(tmp_path, **files))
    assert refusal.value.param == "task" and "served are" in str(refusal.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(InvalidRequestError, match=r"1_Pooling/config.json cannot be read"):
        Pooling.from_folder(tmp_path)


def test_vectors_are_cut_before_they_are_normalised() -> None:
    vector = np.array([3, 4, 12], np.float32)
    np.testing.assert_allclose(Pooling(dimensions=2).finish(vector), [0.6, 0.8], rtol=1e-7)
    np.testing.assert_allclose(Pooling().finish(vector), vector / 13, rtol=1e-7)
    np.testing.assert_array_equal(Pooling(normalizes=False, dimensions=2).finish(vector), [3, 4])
    np.testing.assert_array_equal(Pooling().finish(np.zeros(3, np.float32)), np.zeros(3))
