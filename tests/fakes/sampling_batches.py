"""Parameters for rows of logits without an engine."""

import torch

from engine.sampler import SamplingBatch


def random_batch(num_rows: int, *, seed: int) -> SamplingBatch:
    """Greedy rows, unfiltered ones, and every filter alone and among others."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.arange(num_rows) % 8
    return SamplingBatch(
        temperature=torch.where(pick == 0, 0.0, 0.5 + torch.rand(num_rows, generator=generator)),
        top_p=torch.where(pick == 2, 0.9, 1.0) * torch.where(pick >= 5, 0.7, 1.0),
        top_k=torch.where(pick == 3, 7, 0) + torch.where(pick == 6, 400, 0) + torch.where(pick == 7, 1, 0),
        min_p=torch.where(pick == 4, 0.1, 0.0) + torch.where(pick == 5, 0.01, 0.0),
        seed=torch.randint(-(2**62), 2**62, (num_rows,), generator=generator),
        choice=torch.randint(0, 4, (num_rows,), generator=generator),
        position=torch.randint(0, 4096, (num_rows,), generator=generator),
    )


def batch_of(
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
) -> SamplingBatch:
    """Equal parameters for every row, and a position of its own."""
    return SamplingBatch(
        temperature=torch.full((num_rows,), temperature),
        top_p=torch.full((num_rows,), top_p),
        top_k=torch.full((num_rows,), top_k),
        min_p=torch.full((num_rows,), min_p),
        seed=torch.full((num_rows,), seed),
        choice=torch.zeros(num_rows, dtype=torch.int64),
        position=torch.arange(num_rows),
    )
