"""What the ranks of one model compute together, through torch.distributed: sums of their parts.

Which collective adds decides about bits. An all-gather adds nothing: the parts are then added here, element by element
in the order of the ranks, so that a row is the same in any batch. NCCL's own sum is faster for large steps, but its
order goes with the size of the step.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel.rank import Rank

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name's newer one


class RankGroup:
    """This process among the ranks; all of them call the same in the same order."""

    def __init__(self, rank: Rank, device: torch.device, store_fd: int, *, in_order: bool, max_seconds: float) -> None:
        """Waits for the others. in_order: add in the order of the ranks; store_fd: a file that all of them hold.

        max_seconds: longer than this, nobody is waited for.
        """
        self._rank = rank
        self._device = device
        self._in_order = in_order
        is_cuda = device.type == "cuda"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks are on one machine: nobody else is listened to
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.FileStore(f"/proc/self/fd/{store_fd}", rank.size),  # type: ignore[attr-defined]
            rank=rank.index,
            world_size=rank.size,
            timeout=timedelta(seconds=max_seconds),
            device_id=device if is_cuda else None,
        )

    def add_up(self, part: Tensor) -> Tensor:
        """See `Summation.add_up`."""
        if not self._in_order:
            dist.all_reduce(part)
            return part
        size = self._rank.size
        parts = part.new_empty((size * part.shape[0], *part.shape[1:]))
        _all_gather(parts, part.contiguous())
        first, *others = parts.chunk(size)
        total = first + others[0]
        for other in others[1:]:
            total += other
        return total

    def give(self, token_ids: Tensor) -> None:
        """The leader's half of `take`."""
        dist.broadcast(token_ids.contiguous(), src=0)

    def take(self, num_tokens: int) -> Tensor:
        """What the leader gives: int64 `[num_tokens]`."""
        token_ids = torch.empty(num_tokens, dtype=torch.int64, device=self._device)
        dist.broadcast(token_ids, src=0)
        return token_ids
