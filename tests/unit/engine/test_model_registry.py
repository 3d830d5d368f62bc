"""Every architecture on the list against transformers' own eager forward; every other one is refused."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.loader import LoadedModel, load_model
from engine.model.registry import ARCHITECTURES, find_architecture, max_position
from tests.fakes.packed_forward import BLOCK_SIZE, prompts, run, steps_of
from tests.fakes.tiny_models import VOCAB_SIZE, make_tiny_model


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    """The engine's model and transformers' own of the same weights."""
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    model = load_model(EngineConfig(model_path=str(folder), dtype="float32", block_size=BLOCK_SIZE))
    return model, reference(request.param, folder)


def reference(architecture: str, folder: Path) -> Any:
    """Transformers' own model, in float32."""
    entry = ARCHITECTURES[architecture]
    model_class = getattr(import_module(entry.module_name), entry.class_name)
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("size", [1000, 13, 1], ids=["prefilled whole", "in chunks", "decoded one by one"])
def test_packed_paged_logits_equal_transformers_eager_forward(tiny: tuple[LoadedModel, Any], size: int) -> None:
    model, theirs = tiny
    sequences = prompts(VOCAB_SIZE)
    outputs = run(model, sequences, steps_of(size))
    for tokens, output in zip(sequences, outputs, strict=True):
        with torch.inference_mode():
            expected = theirs(tokens[None], use_cache=False).logits[0]
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
        ({"is_causal": False}, "is_causal: false is not supported"),
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


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0, 1.5, 2.0, 3.0],
                    "long_factor": [4.0, 5.0, 6.0, 7.0],
                    "original_max_position_embeddings": 64,
                },
                "original_max_position_embeddings": 64,
            },
        ),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
        ("llama", {"tie_word_embeddings": True}),
    ],
    ids=["longrope", "dynamic rope", "tied embeddings"],
)
def test_what_a_config_asks_for_gives_transformers_logits(
    architecture: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_tiny_model(architecture, tmp_path, **overrides)
    has_head = "lm_head.weight" in load_file(folder / "model.safetensors")
    assert has_head != overrides.get("tie_word_embeddings", False)
    model = load_model(EngineConfig(model_path=str(folder), dtype="float32", block_size=BLOCK_SIZE))
    theirs = reference(architecture, folder)
    tokens = torch.randint(0, VOCAB_SIZE, (64,), generator=torch.Generator().manual_seed(3))  # longrope's short factors
    (output,) = run(model, [tokens], [[(0, 0, 40)], [(0, 40, 64)]])
    with torch.inference_mode():
        expected = theirs(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
