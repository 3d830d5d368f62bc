"""Angles from a table have the bits that the model's own module gives, and modules that need more are left alone."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.model import rotary_table
from engine.model.registry import ARCHITECTURES
from engine.model.rotary_table import RotaryTable, tabulate_rotation
from tests.fakes.tiny_models import make_tiny_model

LENGTH = 300
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 4.0},
}


def load(folder: Path, model_type: str) -> Any:
    architecture = ARCHITECTURES[model_type]
    model_class = getattr(importlib.import_module(architecture.module_name), architecture.class_name)
    return model_class.from_pretrained(str(folder), dtype=torch.bfloat16)


def angles_of(model: Any, positions: list[int]) -> list[torch.Tensor]:
    x = torch.zeros((1, len(positions), 8), dtype=torch.bfloat16)
    return list(model.get_decoder().rotary_emb(x, torch.tensor([positions])))


def tabulate(model: Any, num_positions: int) -> bool:
    return tabulate_rotation(model, num_positions, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architectures_angles_keep_their_bits(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary_table, "_CHUNK", 128)
    model = load(make_tiny_model(model_type, tmp_path), model_type)
    if model_type in ("gpt2", "gemma3_text"):  # without rotation; with another one in some layers
        assert not tabulate(model, LENGTH)
        return
    positions = [0, 299, 7, 7, 128, 127, 255]
    expected = angles_of(model, positions)
    assert tabulate(model, LENGTH)
    for one, other in zip(angles_of(model, positions), expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", SCALINGS)
def test_only_angles_that_depend_on_the_position_alone_are_tabulated(name: str, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": name, "rope_theta": 10_000.0} | SCALINGS[name]
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder, "llama")
    expected = angles_of(model, [0, 5, 299])
    assert tabulate(model, LENGTH) == (name != "dynamic")
    if name != "dynamic":
        assert all(map(torch.equal, angles_of(model, [0, 5, 299]), expected))


def test_a_table_too_large_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_tiny_model("llama", tmp_path), "llama")
    width = 2 * angles_of(model, [0])[0].shape[-1] * 2
    monkeypatch.setattr(rotary_table, "_MAX_BYTES", LENGTH * width - 1)
    assert not tabulate(model, LENGTH)
    assert not isinstance(model.get_decoder().rotary_emb, RotaryTable)
    assert tabulate(model, LENGTH - 1)
