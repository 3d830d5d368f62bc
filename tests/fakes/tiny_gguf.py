"""A GGUF file of a tiny Llama: random weights, a byte-level tokenizer."""

import json
from pathlib import Path

import gguf
import numpy as np

from tests.fakes.tiny_tokenizers import END_TOKEN, START_TOKEN, byte_level_tokenizer

_HIDDEN, _INNER, _HEADS, _KV_HEADS = 48, 96, 6, 2


def write_tiny_gguf(path: Path, *, num_layers: int = 2) -> Path:
    """The weights depend on nothing but the number of layers."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(num_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocab_size = _add_tokenizer(writer)
    rng = np.random.default_rng(0)
    for name, shape in _shapes(num_layers, vocab_size).items():
        values = rng.standard_normal(shape) * 0.2 if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Returns its number of tokens."""
    model = json.loads(byte_level_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    ends = (START_TOKEN, END_TOKEN)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in ends else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokens.index(START_TOKEN))
    writer.add_eos_token_id(tokens.index(END_TOKEN))
    return len(tokens)


def _shapes(num_layers: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab_size, _HIDDEN), "output_norm": (_HIDDEN,)}
    kv = _KV_HEADS * _HIDDEN // _HEADS
    for layer in range(num_layers):
        shapes |= {
            f"blk.{layer}.attn_norm": (_HIDDEN,),
            f"blk.{layer}.attn_q": (_HIDDEN, _HIDDEN),
            f"blk.{layer}.attn_k": (kv, _HIDDEN),
            f"blk.{layer}.attn_v": (kv, _HIDDEN),
            f"blk.{layer}.attn_output": (_HIDDEN, _HIDDEN),
            f"blk.{layer}.ffn_norm": (_HIDDEN,),
            f"blk.{layer}.ffn_gate": (_INNER, _HIDDEN),
            f"blk.{layer}.ffn_up": (_INNER, _HIDDEN),
            f"blk.{layer}.ffn_down": (_HIDDEN, _INNER),
        }
    return shapes
