"""A runner without a model whose steps go through `StepAhead`, on a device that computes beside the host.

Time is counted, not spent: a forward takes the device `device_seconds`, and what the host does between two steps takes
it `host_seconds`. Launching takes none, reading waits until the step is computed.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.runner.batch_inputs import BatchInputs
from engine.runner.step_ahead import StepAhead
from engine.step_plan import SampledTokens
from tests.fakes.fake_runner import FakeRunner


class FakeRunnerAhead(FakeRunner):
    """`is_ahead` false: steps are planned as they are for such a device, and none is computed ahead."""

    def __init__(
        self, *, device_seconds: float = 1.0, host_seconds: float = 0.9, is_ahead: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.info = replace(self.info, runs_ahead=True)
        self.ahead = StepAhead(self._launch_ahead)
        self._is_ahead = is_ahead
        self.num_forwards = self.num_computed = self.num_taken = self.num_completed = 0
        self.idle_seconds = 0.0  # of the device, between two forwards
        self._device_seconds = device_seconds
        self._host_seconds = host_seconds
        self._now = self._done_at = 0.0
        self._guess_done_at = 0.0

    def execute(self, inputs: BatchInputs) -> SampledTokens:
        self._now += self._host_seconds
        taken = self.ahead.take(inputs)
        read_at = self._guess_done_at
        tokens = np.zeros(0, np.int64)
        if taken is not None:
            self.num_taken += 1
            tokens = taken.computed if taken.rows is None else taken.computed[taken.rows]
        rest = inputs if taken is None else taken.rest
        if rest is not None:
            self.num_completed += taken is not None
            tokens = np.concatenate((tokens, self._launch(rest)))
            read_at = self._done_at
        if inputs.masks is not None:  # grammars judge what was read
            self._now = max(self._now, read_at)
        tokens = self._admitted(inputs, tokens.copy())
        if self._is_ahead:
            self.ahead.launch(inputs, torch.from_numpy(tokens))
        self._now = max(self._now, read_at)
        self.ahead.expect(tokens)
        return SampledTokens(tokens)

    def _launch_ahead(self, inputs: BatchInputs, token_ids: Tensor) -> NDArray[np.int64]:
        self.num_computed += 1
        input_ids = np.concatenate((token_ids.numpy(), inputs.input_ids[len(token_ids) :]))
        sampled = self._launch(replace(inputs, input_ids=input_ids))
        self._guess_done_at = self._done_at
        return sampled

    def _launch(self, inputs: BatchInputs) -> NDArray[np.int64]:
        sampled = self._forward(inputs)
        if self.num_forwards:
            self.idle_seconds += max(0.0, self._now - self._done_at)
        self._done_at = max(self._now, self._done_at) + self._device_seconds
        self.num_forwards += 1
        return sampled

    def _compute_row(self, inputs: BatchInputs, row: int) -> None:
        if inputs.slot_mapping[inputs.query_start[row]] >= 0:  # a place that there is not yet is written by no kernel
            super()._compute_row(inputs, row)
