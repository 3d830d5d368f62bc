"""What crosses the pipes between the leader of some ranks and its followers: values only."""

from dataclasses import dataclass

from engine.config import EngineConfig
from engine.parallel.rank import Rank
from engine.runner.batch_inputs import BatchInputs

# From the leader to a follower.


@dataclass(frozen=True, slots=True)
class StartFollower:
    """The first message: load this rank's part of the model, then join the others."""

    config: EngineConfig
    rank: Rank
    store_fd: int  # a file that all ranks hold, by which they find each other


@dataclass(frozen=True, slots=True)
class AllocateCache:
    """So many blocks, and beside them graphs, fit on every rank; the steps follow."""

    num_blocks: int
    max_graphs: int


@dataclass(frozen=True, slots=True, eq=False)
class RunForward:
    """One forward, which the leader runs as well."""

    inputs: BatchInputs  # without what only the sampler needs
    num_given: int  # of the first tokens, which the leader's device gives to the others'


LeaderMessage = StartFollower | AllocateCache | RunForward

# From a follower to its leader.


@dataclass(frozen=True, slots=True)
class Loaded:
    """The rank's part of the model is there."""


@dataclass(frozen=True, slots=True)
class Measured:
    """So many blocks, and beside them graphs, fit on this rank."""

    num_blocks: int
    max_graphs: int


@dataclass(frozen=True, slots=True)
class FollowerFailed:
    """The last message of a rank that cannot start; the reason names the remedy."""

    reason: str


FollowerMessage = Loaded | Measured | FollowerFailed
