"""A whole decoder in chains of native calls: which models get one, and that it computes what their modules do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from engine.config import EngineConfig
from engine.model import devices, native_decoder
from engine.model.loader import LoadedModel, load_model
from tests.fakes.packed_forward import BLOCK_SIZE, batch_of, prompts, run, steps_of
from tests.fakes.tiny_models import make_tiny_model

KINDS = [("float32", "none"), ("float32", "int8"), ("float16", "none"), ("native bfloat16", "int8")]
PLAIN = {
    "gemma": False,  # scales its embeddings
    "granite": False,
    "llama": True,
    "mistral": True,
    "phi3": True,
    "qwen2": True,
    "qwen3": True,
    "smollm3": True,
}


def load(architecture: str, tmp_path: Path, dtype: str = "float32", quantize: str = "none") -> LoadedModel:
    folder = str(make_tiny_model(architecture, tmp_path))
    return load_model(EngineConfig(model_path=folder, dtype=dtype, quantize=quantize, block_size=BLOCK_SIZE))


@pytest.mark.parametrize("architecture", PLAIN)
def test_a_plain_row_of_layers_is_one_decoder_and_computes_what_its_modules_do(
    architecture: str, tmp_path: Path
) -> None:
    model = load(architecture, tmp_path)
    assert (model.decoder is not None) == PLAIN[architecture]
    sequences = prompts(model.vocab_size)
    for size, every in ((7, 1), (7, 3), (50, 2)):  # the last step of 7 has one token
        steps = steps_of(size)
        whole, decoder = run(model, sequences, steps, every=every), model.decoder
        model.decoder = None
        by_modules = run(model, sequences, steps, every=every)
        model.decoder = decoder
        assert all(map(torch.equal, map(torch.nan_to_num, whole), map(torch.nan_to_num, by_modules)))


@pytest.mark.parametrize(("dtype", "quantize"), KINDS)
def test_a_decoder_computes_what_its_modules_do_in_every_dtype(
    dtype: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: dtype.startswith("native"))
    model = load("llama", tmp_path, dtype.removeprefix("native "), quantize)
    sequences, steps = prompts(model.vocab_size), steps_of(7)
    whole = run(model, sequences, steps)
    assert model.decoder is not None
    model.decoder = None
    assert all(map(torch.equal, whole, run(model, sequences, steps)))


def test_hidden_states_are_what_the_modules_give(tmp_path: Path) -> None:
    model = load("qwen3", tmp_path)
    tokens, positions = torch.arange(23) * 3, torch.arange(23)
    model.allocate_kv_cache(4)
    model.context.batch = batch_of([(0, 0, 23)], (torch.tensor([2, 0, 3]),))
    for logits_indices, hidden_indices in (([], [0, 22]), ([22], [5]), ([1, 2], [])):
        wanted = torch.tensor(logits_indices, dtype=torch.int64), torch.tensor(hidden_indices, dtype=torch.int64)
        logits, hidden_states = (part.clone() for part in model.forward_pooled(tokens, positions, *wanted))
        decoder, model.decoder = model.decoder, None
        expected, expected_states = model.forward_pooled(tokens, positions, *wanted)
        model.decoder = decoder
        assert torch.equal(hidden_states, expected_states) and len(logits) == len(logits_indices)
        assert not logits_indices or torch.equal(logits, expected)


def test_a_model_that_does_something_between_its_layers_keeps_its_own_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_llama.LlamaModel.forward

    def scaled(self: modeling_llama.LlamaModel, **options: object) -> object:
        output = forward(self, **options)
        output.last_hidden_state = output.last_hidden_state * 1.0001
        return output

    plain = load("llama", tmp_path)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", scaled)
    model = load("llama", tmp_path)
    assert plain.decoder is not None and model.decoder is None and model.fingerprint != plain.fingerprint


def test_more_logits_than_are_kept_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama", tmp_path)
    sequences, steps = prompts(model.vocab_size), steps_of(50)
    kept = run(model, sequences, steps)
    monkeypatch.setattr(native_decoder, "_MAX_KEPT_LOGITS", 0)
    assert all(map(torch.equal, run(model, sequences, steps), kept))


def test_angles_are_computed_by_and_by_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama", tmp_path)
    assert model.decoder is not None
    sequences, steps = prompts(model.vocab_size), steps_of(7)
    whole = run(model, sequences, steps)
    monkeypatch.setattr(native_decoder, "_ANGLES_AT_ONCE", 4)
    piecewise, asked = load("llama", tmp_path), list[int]()

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor], output: object) -> None:
        asked.extend(kwargs["position_ids"][0].tolist())

    network: Any = piecewise.model
    rotary = network.get_decoder().rotary_emb
    rotary.register_forward_hook(note, with_kwargs=True)
    assert all(map(torch.equal, whole, run(piecewise, sequences, steps)))
    assert asked == list(range(-(-max(map(len, sequences)) // 4) * 4))
