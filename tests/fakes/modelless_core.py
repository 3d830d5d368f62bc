"""The real core over the fake runner, as a child process that starts in a moment: for deaths in the middle of work.

Its keys and values are hashes of whole prefixes, so that a sequence that is carried on wrongly says something else.
"""

import time
from dataclasses import replace

import numpy as np

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner.batch_inputs import BatchInputs
from tests.fakes.fake_runner import FakeRunner

MODELLESS_CORE_PATH = "tests.fakes.modelless_core:ModellessCore"
RAISING_PROMPT = [199] * 5  # a step that holds it raises


class ModellessCore(EngineCore):
    """`config.model_path` is a folder with a tokenizer; the pool is too small for all, so that some are preempted."""

    def __init__(self, config: EngineConfig) -> None:
        runner = FakeRunner(num_blocks=40, block_size=8, max_model_len=256, vocab_size=200, on_execute=_before_step)
        runner.info = replace(runner.info, model_dir=config.model_path)
        super().__init__(config, runner=runner)


def _before_step(inputs: BatchInputs) -> None:
    time.sleep(0.001)  # so that a kill finds work under way
    if inputs.input_ids.tobytes().find(np.array(RAISING_PROMPT, inputs.input_ids.dtype).tobytes()) >= 0:
        raise ValueError("this prompt makes the model raise")
