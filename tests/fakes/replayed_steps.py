"""Steps of a GPU's path on a CPU: in Triton's interpreter, computed ahead, by graphs that call what they captured."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.runner import step_forwards, step_shapes
from engine.runner.cuda_graphs import GraphedSteps
from engine.runner.model_runner import ModelRunner


def replay_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the runners with Triton's attention that are made from now on; shapes are small."""
    for name, value in (("_MIXED_STEP", 4), ("_MIN_MIXED_SEQS", 4), ("_MIN_BLOCKS", 2)):
        monkeypatch.setattr(step_shapes, name, value)
    monkeypatch.setattr(step_forwards, "_graphed_steps", _replayed_steps)
    monkeypatch.setattr(ModelRunner, "_runs_ahead", lambda self: self._model.uses_triton)


def _replayed_steps(config: EngineConfig, model: Any) -> GraphedSteps | None:
    made = GraphedSteps(
        model,
        max_num_seqs=config.max_num_seqs,
        max_num_tokens=config.step_tokens("cpu"),
        make_capture=lambda: lambda run: SimpleNamespace(replay=run),
    )
    return made if model.uses_triton and config.cuda_graphs else None
