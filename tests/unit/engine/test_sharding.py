"""A model in parts computes what the whole one does; one that cannot be cut evenly and exactly is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import InvalidRequestError, ModelLoadError
from engine.model.devices import describe_devices, resolve_device
from engine.model.loader import load_model
from engine.model.preflight import check_model
from engine.model.registry import ARCHITECTURES
from engine.parallel.rank import Rank
from tests.fakes.packed_forward import BLOCK_SIZE, decodes, prompts, run, steps_of
from tests.fakes.rank_threads import RankThreads
from tests.fakes.tiny_models import VOCAB_SIZE, make_tiny_model

REFUSED = {
    "gpt2": "transformers has no plan for it",
    "gpt_neox": "its configuration has no num_key_value_heads",
    "gpt_oss": "transformers has no plan for it",
    "mixtral": "moe_tp_experts, packed_colwise",
    "olmo2": "colwise_gather_output, rowwise_split_input",
    "phi3": "colwise_gather_output, rowwise_split_input",
    "qwen3_moe": "moe_tp_experts, packed_colwise",
}


def make_even(architecture: str, folder: Path, **overrides: Any) -> Path:
    return make_tiny_model(architecture, folder, num_key_value_heads=2, **overrides)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - REFUSED.keys()))
def test_two_parts_compute_what_the_whole_model_does_the_same_in_any_batch(architecture: str, tmp_path: Path) -> None:
    folder = make_even(architecture, tmp_path)
    sequences = prompts(VOCAB_SIZE)
    config = EngineConfig(model_path=str(folder), device="cpu", dtype="float32", block_size=BLOCK_SIZE)
    whole = run(load_model(config), sequences, steps_of(1000))
    ranks = RankThreads(folder, 2, dtype="float32", block_size=BLOCK_SIZE)
    together = ranks.run(lambda model: run(model, sequences, steps_of(1000)))
    in_chunks = ranks.run(lambda model: run(model, sequences, steps_of(13)))
    for output, chunked, expected in zip(together, in_chunks, whole, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)  # sums in another order
        assert torch.equal(output, chunked)


def test_each_rank_holds_its_part_alone(tmp_path: Path) -> None:
    folder = make_even("llama", tmp_path)
    leader, follower = RankThreads(folder, 2, dtype="float32", block_size=BLOCK_SIZE).models
    whole = load_model(EngineConfig(model_path=str(folder), device="cpu", dtype="float32", block_size=BLOCK_SIZE))
    for part in (leader, follower):
        assert part.kv_block_bytes * 2 == whole.kv_block_bytes
    assert (leader.vocab_size, follower.vocab_size) == (VOCAB_SIZE, 1)  # nobody reads a follower's logits
    assert leader.fingerprint != whole.fingerprint


@pytest.mark.parametrize("fields", [{}, {"quantize": "int8"}, {"kv_cache_dtype": "int8"}], ids=str)
def test_parts_of_a_model_are_packed_and_quantised_as_a_whole_one(fields: dict[str, str], tmp_path: Path) -> None:
    sequences = prompts(VOCAB_SIZE)
    ranks = RankThreads(make_even("qwen2", tmp_path), 2, dtype="float32", block_size=BLOCK_SIZE, **fields)
    assert all(model.is_batch_invariant for model in ranks.models)
    together = ranks.run(lambda model: run(model, sequences, steps_of(1000)))
    decoded = ranks.run(lambda model: run(model, sequences, decodes()))
    assert all(map(torch.equal, together, decoded))


@pytest.mark.parametrize(("architecture", "reason"), REFUSED.items())
def test_an_architecture_that_transformers_cuts_otherwise_is_refused(
    architecture: str, reason: str, tmp_path: Path
) -> None:
    config = EngineConfig(model_path=str(make_tiny_model(architecture, tmp_path)), device="cpu", tensor_parallel_size=2)
    with pytest.raises(ModelLoadError, match=f"must be 1 for a model of architecture '{architecture}': .*{reason}"):
        load_model(config, Rank(0, 2))


def test_heads_that_cannot_be_shared_out_are_refused_by_the_preflight_check(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path, hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    check_model(EngineConfig(model_path=str(folder), tensor_parallel_size=3), print)
    wrong = EngineConfig(model_path=str(folder), tensor_parallel_size=2)
    reason = r"tensor_parallel_size 2 does not divide the model's num_attention_heads \(9\); set it to 1 or 3"
    with pytest.raises(ModelLoadError, match=reason):
        check_model(wrong, print)
    with pytest.raises(ModelLoadError, match=reason):
        load_model(wrong, Rank(0, 2))


def test_a_weight_of_another_shape_than_the_config_says_is_refused(tmp_path: Path) -> None:
    folder = make_even("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ModelLoadError, match="cannot be loaded as LlamaForCausalLM"):
        load_model(EngineConfig(model_path=str(folder), device="cpu", tensor_parallel_size=2), Rank(1, 2))


def test_more_ranks_than_gpus_are_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(resolve_device("cuda:1", Rank(i, 3))) for i in range(3)] == ["cuda:1", "cuda:2", "cuda:3"]
    with pytest.raises(
        ModelLoadError, match=r"takes as many GPUs from cuda:2 on, .* 4 CUDA devices; set it to 2 or less"
    ):
        resolve_device("cuda:2", Rank(0, 3))
    assert describe_devices(torch.device("cuda", 1), 3) == "cuda:1-3"
    assert describe_devices(torch.device("cpu"), 2) == "cpu x2"


def test_a_size_that_makes_no_sense_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(model_path="m", tensor_parallel_size=0)
    assert caught.value.param == "tensor_parallel_size"
