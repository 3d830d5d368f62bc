"""A follower's half of `engine.runner.model_runner`: its part of the model and of the cache, and forwards over them.

What it does at start mirrors the leader's start, forward by forward, since the ranks add up each other's sums; from
then on it runs what it is told.
"""

import torch

from engine.config import EngineConfig
from engine.model.loader import load_model
from engine.parallel.messages import AllocateCache, Measured, RunForward
from engine.parallel.rank import Rank
from engine.parallel.row_parallel import join_ranks
from engine.runner.memory import choose_num_blocks, largest_step
from engine.runner.step_forwards import StepForwards
from engine.runner.transfer import HostToDevice


class ShardRunner:
    """One rank that follows."""

    def __init__(self, config: EngineConfig, rank: Rank) -> None:
        """Load the rank's part. Raises `ModelLoadError` with the remedy."""
        self._config = config
        self._rank = rank
        self._model = load_model(config, rank)

    def join(self, store_fd: int) -> None:
        """Wait for the other ranks; they must have loaded, too."""
        self._group = join_ranks(self._model, self._config, self._rank, store_fd)
        self._forwards = StepForwards(self._config, self._model, HostToDevice(self._model.device))

    def measure(self) -> Measured:
        """What fits on this rank's device. Raises `ModelLoadError` if the blocks are too few."""
        forwards = self._forwards
        num_blocks = choose_num_blocks(self._config, self._model, self._run_largest_step, forwards.measure_graphs)
        return Measured(num_blocks, forwards.max_graphs)

    def allocate(self, agreed: AllocateCache) -> None:
        """Raises `ModelLoadError`."""
        self._model.allocate_kv_cache(agreed.num_blocks)
        self._forwards.prepare(agreed.max_graphs)

    @torch.inference_mode()
    def run(self, forward: RunForward) -> None:
        """Launch a forward; nobody reads its logits."""
        token_ids = self._group.take(forward.num_given) if forward.num_given else None
        self._forwards.run(forward.inputs, token_ids)

    @torch.inference_mode()
    def _run_largest_step(self) -> None:
        self._forwards.run_eagerly(largest_step(self._config, self._model.max_model_len))
        torch.cuda.synchronize(self._model.device)
