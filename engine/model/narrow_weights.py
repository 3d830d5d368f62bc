"""Weights kept in two bytes a number where float32 is computed: rounded once, widened as they are read.

What is kept so has lost nothing: a model's numbers are rounded before anything is made of them, or are such by nature,
as those of most checkpoints are. Knows no product; `engine.model.native_linear` reads such weights.
"""

import torch
from torch import Tensor, nn

from engine.errors import ModelLoadError

NARROW = (torch.bfloat16, torch.float16)


def narrowed(weight: Tensor) -> Tensor:
    """In two bytes a number where that changes none; else as it is."""
    for dtype in NARROW:
        narrow = weight.to(dtype)
        if torch.equal(narrow.to(weight.dtype), weight):
            return narrow
    return weight


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round each of the model's weights to a number of `dtype`; they stay in the format that they are in.

    Raises `ModelLoadError` where one is beyond its range.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rounded = weight.to(dtype)
            if not torch.equal(rounded.isfinite(), weight.isfinite()):
                raise ModelLoadError(
                    f"{name} has numbers of up to {float(weight.abs().max()):.3g}, too large for {dtype}; "
                    "set dtype to bfloat16 or float32"
                )
            weight.copy_(rounded)


def narrow_embeddings(model: nn.Module) -> None:
    """Keep the tables of embeddings in two bytes a number where that changes none."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Embedding and (table := narrowed(child.weight.detach())).dtype != child.weight.dtype:
                setattr(parent, name, NarrowEmbedding(table, child.weight.dtype))


class NarrowEmbedding(nn.Module):
    """A table of embeddings that are given in a wider dtype than they are kept in."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        """table: `[num_embeddings, size]`; dtype: of what is given."""
        super().__init__()
        self.table = table
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids: `[...]`; returns `[..., size]`."""
        return nn.functional.embedding(ids, self.table).to(self._dtype)
