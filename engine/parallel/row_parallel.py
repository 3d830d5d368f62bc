"""Layers of which each rank computes a part of the sum: those that are cut by their inputs, with the adding up behind.

Put into a model after its modules were fused and its layers packed, so that neither needs to know of other ranks.
"""

from typing import Protocol

from torch import Tensor, nn

from engine.config import EngineConfig
from engine.model.loader import LoadedModel
from engine.parallel.rank import Rank
from engine.parallel.rank_group import RankGroup
from engine.parallel.sharding import ShardPlan


class Summation(Protocol):
    """What a layer needs of the ranks."""

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, a new tensor or the part itself. Waits for all of them."""
        ...


class RowParallel(nn.Module):
    """A linear layer whose output is the sum of all ranks' parts."""

    def __init__(self, part: nn.Module, group: Summation) -> None:
        super().__init__()
        self.part = part
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., in_features]`, this rank's; returns a new `[..., out_features]`, the same on all ranks."""
        return self._group.add_up(self.part.forward(x))


def join_ranks(model: LoadedModel, config: EngineConfig, rank: Rank, store_fd: int) -> RankGroup:
    """Make a rank's part one of a whole model: from now on its forwards wait for those of the other ranks."""
    group = RankGroup(
        rank,
        model.device,
        store_fd,
        in_order=config.deterministic or model.device.type == "cpu",
        max_seconds=max(config.start_timeout_seconds, config.step_timeout_seconds),
    )
    add_up_parts(model.model, group)
    return group


def add_up_parts(model: nn.Module, group: Summation) -> None:
    """Have the layers that are cut by their inputs give whole sums."""
    plan = ShardPlan(model.config)
    for name, module in list(model.named_modules()):
        if plan.is_rowwise(name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, RowParallel(module, group))
