"""The architectures that are tested, and nothing else: a model outside this list is refused by name.

An attention function that is given no mask turns every mask of a model into a causal one, so an untested architecture
would not fail, it would answer wrongly. `tests/unit/engine/test_model_registry.py` holds each entry against
transformers' own forward.
"""

from dataclasses import dataclass
from typing import Any

from engine.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where transformers defines a model: imported alone, because its auto classes import far more."""

    model_type: str  # as in config.json
    package: str  # under transformers.models
    class_name: str
    has_experts: bool = False  # multiplied in the model's dtype, by a library that chooses its order of additions

    @property
    def module_name(self) -> str:
        return f"transformers.models.{self.package}.modeling_{self.package}"


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("gemma", "gemma", "GemmaForCausalLM"),
        Architecture("gemma2", "gemma2", "Gemma2ForCausalLM"),
        Architecture("gemma3_text", "gemma3", "Gemma3ForCausalLM"),
        Architecture("gpt2", "gpt2", "GPT2LMHeadModel"),
        Architecture("gpt_neox", "gpt_neox", "GPTNeoXForCausalLM"),
        Architecture("gpt_oss", "gpt_oss", "GptOssForCausalLM", has_experts=True),
        Architecture("granite", "granite", "GraniteForCausalLM"),
        Architecture("llama", "llama", "LlamaForCausalLM"),
        Architecture("mistral", "mistral", "MistralForCausalLM"),
        Architecture("mixtral", "mixtral", "MixtralForCausalLM", has_experts=True),
        Architecture("olmo2", "olmo2", "Olmo2ForCausalLM"),
        Architecture("phi3", "phi3", "Phi3ForCausalLM"),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
        Architecture("qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM", has_experts=True),
        Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM"),
        Architecture("starcoder2", "starcoder2", "Starcoder2ForCausalLM"),
    )
}


def find_architecture(config: dict[str, Any], *, source: str) -> Architecture:
    """The tested architecture of a model's config.json. Raises `ModelLoadError` naming what it found at `source`."""
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise ModelLoadError(
            f"{source}: architecture {model_type!r} is not supported, since it has not been tested; "
            f"choose a model of one of these: {', '.join(sorted(ARCHITECTURES))}"
        )
    if config.get("auto_map"):
        raise ModelLoadError(
            f"{source}: config.json asks for code of its own (auto_map), which is never run; "
            f"use a checkpoint of transformers' own {architecture.class_name}"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelLoadError(
            f"{source}: its weights are quantised ({method}), which is not supported; "
            "use the float checkpoint or a GGUF file"
        )
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        name = "use_bidirectional_attention" if config.get("use_bidirectional_attention") else "is_causal: false"
        raise ModelLoadError(f"{source}: {name} is not supported; use a causal checkpoint")
    return architecture


def max_position(config: Any) -> int:
    """Positions up to which a position's embedding does not depend on what else is in the batch.

    config: the transformers config object. `longrope` switches its frequencies for the whole batch as soon as one
    position passes the length it was first trained for, and `dynamic` does past the config's own: within these limits
    they are pinned.
    """
    limit = int(config.max_position_embeddings)
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") == "longrope":
            limit = min(limit, int(parameters["original_max_position_embeddings"]))
    return limit


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """One set for all layers, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [nested for nested in parameters.values() if isinstance(nested, dict)]
