"""How a chaos run starts a worker: on a tiny model of random weights, a fake engine, or a model as it is named."""

import sys
from pathlib import Path

from tests.acceptance.chaos.schedule import STEP_TIMEOUT_SECONDS
from tests.fakes.chat_templates import HERMES

MAX_NUM_SEQS = 8  # small, so that jobs wait, and are handed from worker to worker
REPEATS_ITSELF = {"tie_word_embeddings": True, "initializer_range": 0.13}
"""A tiny model's settings with which it does, now and then: what follows is guessed, rightly and wrongly."""


def worker_command(model: str, folder: Path, lease_seconds: float) -> list[str]:
    options = ["--max-num-seqs", str(MAX_NUM_SEQS), "--lease-seconds", str(lease_seconds), "--log-level", "info"]
    if model == "fake":
        variables = [f"PROMPTMILL_{name[2:].upper().replace('-', '_')}={value}" for name, value in _pairs(options)]
        return ["env", "FAKE_STEP_SECONDS=0.005", *variables, sys.executable, "-m", "tests.fakes.worker_runs"]
    if model == "tiny":
        from tests.fakes.tiny_models import make_tiny_model

        model = str(make_tiny_model("llama", folder / "model", **REPEATS_ITSELF))
    template = folder / "template.jinja"
    template.write_text(HERMES)
    options += ["--chat-template", str(template), "--tool-parser", "hermes"]
    options += ["--step-timeout-seconds", str(STEP_TIMEOUT_SECONDS)]
    return [sys.executable, "-m", "producer", "worker", "--model", model, "--num-threads", "1", *options]


def _pairs(options: list[str]) -> list[tuple[str, str]]:
    return list(zip(options[::2], options[1::2], strict=True))
