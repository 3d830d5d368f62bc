"""Models with random weights made from a config, and what a device's limits allow of them.

Speed does not depend on the weights; correctness is held against the same weights in transformers.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import Workload
from engine.model.registry import ARCHITECTURES
from tests.fakes.tiny_models import EOS_TOKEN_ID, write_byte_tokenizer

MODELS = Path("~/.cache/promptmill/random-models").expanduser()


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A decoder's shape."""

    name: str
    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool

    @property
    def num_layer_weights(self) -> int:
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def num_weights(self) -> int:
        """Those that a step reads: the layers' and the output's."""
        return self.num_layer_weights + self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values in 16 bits."""
        return 4 * self.layers * self.kv_heads * self.head_dim


SIZES = {
    size.name: size
    for size in (
        ModelSize("Qwen3-0.6B", "qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True),
        ModelSize("Qwen3-8B", "qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936, False),
        ModelSize("SmolLM2-135M", "llama", 576, 1536, 30, 9, 3, 64, 49_152, True),
    )
}
SMOKE_SIZE = ModelSize("tiny", "qwen3", 32, 48, 1, 4, 2, 16, 320, True)


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """As measured on the device at hand."""

    bytes_a_second: float  # read and written by a large copy
    flops_a_second: float  # of a large matrix product in 16 bits


def random_model(size: ModelSize, device: torch.device, root: Path = MODELS) -> Path:
    """The folder of a model of this size in bfloat16, written on first use."""
    folder = root / size.name
    if (folder / "tokenizer.json").exists():
        return folder
    entry = ARCHITECTURES[size.architecture]
    model_class = getattr(importlib.import_module(entry.module_name), entry.class_name)
    fields: dict[str, Any] = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocab,
        "tie_word_embeddings": size.is_tied,
        "max_position_embeddings": 8192,
        "initializer_range": 0.2 if size is SMOKE_SIZE else 0.02,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": None,
        "dtype": "bfloat16",
    }
    torch.manual_seed(20)
    with device:
        model = model_class(model_class.config_class(**fields)).to(torch.bfloat16)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def least_seconds(size: ModelSize, workload: Workload, limits: DeviceLimits) -> float:
    """What the device's limits allow: all prompts prefilled by the matrix rate, then every step of all sequences.

    A step reads the weights, or computes with them if that takes longer, and reads the keys and values so far.
    """
    lengths = [len(prompt) for prompt in workload.prompts]
    attention = 2 * size.layers * size.heads * size.head_dim * sum(length**2 for length in lengths)
    seconds = (2 * size.num_layer_weights * sum(lengths) + attention) / limits.flops_a_second
    for step in range(1, max(workload.max_tokens)):
        contexts = [length + step for length, limit in zip(lengths, workload.max_tokens, strict=True) if limit > step]
        weights = max(
            2 * size.num_weights / limits.bytes_a_second, 2 * size.num_weights * len(contexts) / limits.flops_a_second
        )
        seconds += weights + sum(contexts) * size.kv_bytes / limits.bytes_a_second
    return seconds
