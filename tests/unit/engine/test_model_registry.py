"""Every architecture on the list against transformers' own eager forward; every other one is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.loader import LoadedModel, load_model
from engine.model.registry import ARCHITECTURES, find_architecture, max_position
from tests.fakes.packed_forward import BLOCK_SIZE, prompts, run, steps_of
from tests.fakes.tiny_models import VOCAB_SIZE, make_tiny_model


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    """The engine's model and transformers' own of the same weights."""
    import importlib

    architecture = ARCHITECTURES[request.param]
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    model_class = getattr(importlib.import_module(architecture.module_name), architecture.class_name)
    reference = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return load_model(EngineConfig(model_path=str(folder), dtype="float32", block_size=BLOCK_SIZE)), reference


@pytest.mark.parametrize("size", [1000, 13, 1], ids=["prefilled whole", "in chunks", "decoded one by one"])
def test_packed_paged_logits_equal_transformers_eager_forward(tiny: tuple[LoadedModel, Any], size: int) -> None:
    model, reference = tiny
    sequences = prompts(VOCAB_SIZE)
    outputs = run(model, sequences, steps_of(size))
    for tokens, output in zip(sequences, outputs, strict=True):
        with torch.inference_mode():
            expected = reference(tokens[None], use_cache=False).logits[0]
        # float32 through two layers: other sums of the same terms.
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(output.argmax(-1), expected.argmax(-1))


def test_an_untested_architecture_is_refused_by_name_with_the_list_of_tested_ones() -> None:
    with pytest.raises(ModelLoadError, match=r"my-model: architecture 'falcon' is not supported.*llama.*qwen3"):
        find_architecture({"model_type": "falcon"}, source="my-model")


def test_a_config_without_architecture_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="architecture None is not supported"):
        find_architecture({}, source="my-model")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .gptq."),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, "code of its own"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_a_config_that_would_change_the_arithmetic_is_refused(extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        find_architecture({"model_type": "llama"} | extra, source="my-model")


def test_longrope_is_pinned_by_stopping_where_its_frequencies_would_switch(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    }
    folder = make_tiny_model("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=64)
    model = load_model(EngineConfig(model_path=str(folder), dtype="float32"))
    assert model.max_model_len == 64
    with pytest.raises(ModelLoadError, match="max_model_len 65 passes the model's 64 positions"):
        load_model(EngineConfig(model_path=str(folder), dtype="float32", max_model_len=65))


def test_dynamic_rope_stays_within_the_positions_that_never_rescale_it(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = make_tiny_model("llama", tmp_path, rope_parameters=rope)
    model = load_model(EngineConfig(model_path=str(folder), dtype="float32"))
    assert model.max_model_len == max_position(model.model.config) == 2048
