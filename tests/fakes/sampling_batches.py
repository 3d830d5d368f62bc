"""Parameters for rows of logits without an engine."""

import torch

from engine.sampler import SamplingBatch


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
