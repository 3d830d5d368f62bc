"""Linear layers of a CPU model through oneDNN, with weights packed once at load.

A packed product is computed block by block in one order of additions for any number of rows from 2 on, where the
library behind torch's own `linear` chooses its order by the number of rows; and nothing is packed again at every step.

The operators are torch's own, those its compiler emits for frozen CPU models. They are private, so they are tried
before they are used (`engine.model.packed_linear`).
"""

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16)
_PACKED_FOR_ROWS = 64  # a hint to oneDNN; any number of rows may follow


class OneDnnLinear(nn.Module):
    """`x @ weight.T + bias` for `weight` `[out_features, in_features]`; keeps no copy of the plain weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACKED_FOR_ROWS)
        self._bias = None if bias is None else bias.detach()

    def __reduce__(self) -> tuple[type["OneDnnLinear"], tuple[Tensor, Tensor | None]]:
        """How oneDNN packs is this machine's affair: it is written as a plain weight, and packed where it is read."""
        return OneDnnLinear, (self._packed.to_dense(), self._bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., in_features]`; returns `[..., out_features]`."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return output
