"""What rank 0 decides for all; a forward that fails there has left the others within it, and the ranks are lost."""

import pickle

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.errors import DeviceLostError
from engine.parallel.leader import AnnouncedForwards, Leader
from engine.parallel.messages import AllocateCache, Measured
from engine.runner.batch_inputs import BatchInputs
from engine.runner.memory import largest_step
from engine.runner.step_ahead import StepAhead


class _Failing:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def run(self, inputs: BatchInputs, token_ids: torch.Tensor | None = None) -> None:
        raise self._error


@pytest.fixture
def inputs() -> BatchInputs:
    return largest_step(EngineConfig(model_path="m", max_num_seqs=2, max_num_tokens=8), 8)


def leader_alone() -> Leader:
    leader = Leader.__new__(Leader)  # its processes are the business of tests/integration/test_tensor_parallel.py
    leader._followers = []
    return leader


class _Rank:
    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self.told: list[object] = []

    def receive(self, kind: type[Measured]) -> Measured:
        return self.measured

    def send(self, packed: memoryview) -> None:
        self.told.append(pickle.loads(packed))


def test_all_ranks_hear_of_as_many_blocks_and_graphs_as_each_has_room_for() -> None:
    ranks = [_Rank(Measured(40, 300)), _Rank(Measured(50, 16))]
    leader = leader_alone()
    leader._followers = ranks  # type: ignore[assignment]
    agreed = leader.agree(Measured(60, 512))
    assert agreed == AllocateCache(num_blocks=40, max_graphs=16)
    assert [rank.told for rank in ranks] == [[agreed], [agreed]]


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), ValueError("of a request's making")])
def test_neither_want_of_memory_nor_a_request_at_fault_is_tried_again_in_parts(
    error: Exception, inputs: BatchInputs
) -> None:
    forwards = AnnouncedForwards(leader_alone(), _Failing(error))  # type: ignore[arg-type]
    with pytest.raises(DeviceLostError, match="the other ranks are within it"):
        forwards.run(inputs)


def test_a_step_ahead_that_fails_is_not_passed_over(inputs: BatchInputs) -> None:
    forwards = AnnouncedForwards(leader_alone(), _Failing(RuntimeError("can't allocate memory")))  # type: ignore[arg-type]
    ahead = StepAhead(lambda inputs, token_ids: forwards.run(inputs))
    inputs.following = inputs
    with pytest.raises(DeviceLostError):
        ahead.launch(inputs, torch.from_numpy(np.zeros(2, np.int64)))
