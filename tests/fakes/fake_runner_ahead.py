"""A runner without a model whose steps go through `StepAhead`, on a device that computes beside the host.

Time is counted, not spent: a forward takes the device `device_seconds`, and what the host does between two steps takes
it `host_seconds`. Launching takes none, reading waits until the step is computed.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.runner.batch_inputs import BatchInputs
from engine.runner.step_ahead import StepAhead
from engine.runner.transfer import HostToDevice
from engine.step_plan import SampledTokens
from tests.fakes.fake_runner import FakeRunner


class FakeRunnerAhead(FakeRunner):
    """`is_ahead` false: steps are planned as they are for such a device, and none is computed ahead."""

    def __init__(
        self, *, device_seconds: float = 1.0, host_seconds: float = 0.9, is_ahead: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.info = replace(self.info, runs_ahead=True)
        self.ahead = StepAhead(self._forward_ahead, HostToDevice(torch.device("cpu")))
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
        tokens = torch.zeros(0, dtype=torch.int64) if taken is None else taken.token_ids
        rest = inputs if taken is None else taken.rest
        self.num_taken += taken is not None
        if rest is not None:
            self.num_completed += taken is not None
            tokens = torch.cat((tokens, torch.from_numpy(self._forward(rest))))
            read_at = self._done_at
        if self._is_ahead:
            self.ahead.launch(inputs, tokens)
        self._now = max(self._now, read_at)
        self.ahead.expect(tokens.numpy())
        return SampledTokens(tokens.numpy())

    def _forward_ahead(self, inputs: BatchInputs, token_ids: Tensor) -> Tensor:
        self.num_computed += 1
        input_ids = np.concatenate((token_ids.numpy(), inputs.input_ids[len(token_ids) :]))
        sampled = torch.from_numpy(self._forward(replace(inputs, input_ids=input_ids)))
        self._guess_done_at = self._done_at
        return sampled

    def _forward(self, inputs: BatchInputs) -> Any:
        sampled = super().execute(inputs).token_ids
        if self.num_forwards:
            self.idle_seconds += max(0.0, self._now - self._done_at)
        self._done_at = max(self._now, self._done_at) + self._device_seconds
        self.num_forwards += 1
        return sampled

    def _compute_row(self, inputs: BatchInputs, row: int) -> None:
        if inputs.slot_mapping[inputs.query_start[row]] >= 0:  # a place that there is not yet is written by no kernel
            super()._compute_row(inputs, row)
