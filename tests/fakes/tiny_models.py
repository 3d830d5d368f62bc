"""Tiny models of every supported architecture: real transformers code, random weights, a byte-level tokenizer."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.config import EngineConfig
from engine.model.registry import ARCHITECTURES

VOCAB_SIZE = 320  # 256 bytes, then special tokens and padding
EOS_TOKEN = "<|end|>"
EOS_TOKEN_ID = 256
MAX_POSITIONS = 2048

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,  # far from ties between logits
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None,
}
_MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "gemma": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": _SLIDING | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "tie_word_embeddings": True},
    "gemma3_text": _SLIDING | {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 96, "n_positions": MAX_POSITIONS},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": _SLIDING | _MIXTURE | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "mistral": {"sliding_window": 24},
    "mixtral": _MIXTURE | {"sliding_window": None},
    "phi3": {"sliding_window": 40},
    "qwen2": _SLIDING | {"use_sliding_window": True},
    "qwen3_moe": _MIXTURE | {"moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 24},
}
MIXTURES_OF_EXPERTS = sorted(name for name, fields in _SPECIFIC.items() if _MIXTURE.items() <= fields.items())
_GPT2_NAMES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
_GPT2_NAMES |= {"head_dim", "max_position_embeddings"}


def make_tiny_model(architecture: str, folder: Path, **overrides: Any) -> Path:
    """Write config.json, model.safetensors and a tokenizer of the architecture into `folder`, and return it.

    `overrides` are config fields. The weights depend on nothing but the config.
    """
    entry = ARCHITECTURES[architecture]
    module = importlib.import_module(entry.module_name)
    model_class = getattr(module, entry.class_name)
    common = {name: value for name, value in _COMMON.items() if architecture != "gpt2" or name not in _GPT2_NAMES}
    config = model_class.config_class(**(common | _SPECIFIC.get(architecture, {}) | overrides))
    config._attn_implementation = "eager"
    torch.manual_seed(20)
    model = model_class(config).eval()
    _randomize(model)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def tiny_config(folder: Path, **overrides: Any) -> EngineConfig:
    """Of a worker in float32 on the CPU, with little room."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 8,
        "max_num_tokens": 32,
        "block_size": 16,
        "num_kv_blocks": 12,
    }
    return EngineConfig(model_path=str(folder), **defaults | overrides)


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose ids 0 to 255 are the bytes of UTF-8 text."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TOKEN])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": EOS_TOKEN,
        "model_max_length": MAX_POSITIONS,
        "chat_template": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] ",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _byte_alphabet() -> list[str]:
    """The printable symbol that byte-level BPE gives each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    unprintable = [byte for byte in range(256) if byte not in symbols]
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(unprintable)}
    return [symbols[byte] for byte in range(256)]


def _randomize(model: torch.nn.Module) -> None:
    """Make every parameter matter: transformers starts norms at one and biases, sinks and others at zero."""
    generator = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
