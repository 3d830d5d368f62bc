"""Rotary angles from a table: a model's own module computes those of each step anew, in a dozen small kernels.

The table is what that module gives for all positions, bit for bit. Modules whose angles depend on more than a position
(dynamic and long scaling go by the longest sequence, some models by the layer) stay as they are.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_STATIC = ("default", "linear", "llama3", "yarn")  # transformers' names of scalings
_MAX_BYTES = 1 << 28
_CHUNK = 1 << 16  # positions that are computed at once


class RotaryTable(nn.Module):
    """In the place of a decoder's `rotary_emb`."""

    def __init__(self, angles: Tensor) -> None:
        """angles: cosines and then sines of each position, `[num_positions, 2 * rotary_dim]`."""
        super().__init__()
        self._angles = angles

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[1, T, rotary_dim]` for position_ids `[1, T]`, int64."""
        cos, sin = self._angles[position_ids].chunk(2, dim=-1)  # torch's `embedding` of few rows takes an H200 12 µs
        return cos, sin


def tabulate_rotation(model: Any, num_positions: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model of transformers on this device takes its angles, of this dtype, from a table now.

    Its positions are to stay below `num_positions`.
    """
    decoder = model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or getattr(rotary, "rope_type", None) not in _STATIC:
        return False
    if list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        return False
    x = torch.zeros((1, 1, 1), dtype=dtype, device=device)
    with torch.inference_mode():
        width = sum(part.shape[-1] for part in rotary(x, torch.zeros((1, 1), dtype=torch.int64, device=device)))
        if num_positions * width * x.element_size() > _MAX_BYTES:
            return False
        chunks = torch.split(torch.arange(num_positions, device=device)[None], _CHUNK, dim=1)
        angles = torch.cat([torch.cat(rotary(x, positions), dim=-1)[0] for positions in chunks])
    decoder.rotary_emb = RotaryTable(angles)
    return True
