"""Tokenizers of both kinds that language models use, a few hundred tokens large, made without torch."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_TOKEN = "<|end|>"
START_TOKEN = "<|start|>"

_TEXTS = [
    "hello world, the quick brown fox jumps over the lazy dog",
    "The capital of France is Paris. 你好世界 naïve café 😀👩‍👩‍👧 e\u0301",
    "stop the end STOP and START the engine\n\nUser: again",
]


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE, as GPT-2, llama 3, qwen and SmolLM have it: any text is spelt, characters fall apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[START_TOKEN, END_TOKEN],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 20, trainer)
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Sentencepiece style with byte fallback, as llama 2 and mistral have it: spaces lead words, the first is cut."""
    vocab = {"<unk>": 0, START_TOKEN: 1, END_TOKEN: 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", "▁is", "▁Paris", "▁a", "is", "a", "b", "c", "P", "r", "i", "s", "é", "你", "▁▁"]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<unk>", START_TOKEN, END_TOKEN])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """A model folder as far as the parent reads it."""
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_TOKEN}))
    return folder
