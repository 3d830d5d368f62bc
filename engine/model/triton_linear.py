"""Linear layers of a GPU model whose rows have the same bits in every batch, for `deterministic`.

The GPU's own matrix library chooses tiles, and with them the order of additions, by the number of rows. Where it keeps
bits nevertheless (`engine.model.library_linear`) it computes a layer, since it is faster; else our own product does.
"""

import torch
import triton
from torch import Tensor, nn

from engine.errors import ModelLoadError
from engine.kernels.triton.matmul import linear_kernel
from engine.model.library_linear import LibraryTrials, forbid_split_k
from engine.model.packed_linear import LinearPacker

# One tile for every number of rows. Chosen by reasoning, not measured: wide enough for prefill, and with 64 columns
# enough tiles of a decode's output to occupy a GPU.
_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 64, 64  # half of the last in float32
_GROUP = 8
_TRIAL_ROWS = (1, 2, 17, 129, 200)
_TRIAL_SHAPE = (90, 200)  # out_features, in_features


class TritonLinear(nn.Module):
    """`x @ weight.T + bias` for `weight` `[out_features, in_features]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach()
        self._weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self._bias = None if bias is None else bias.detach().contiguous()
        self._num_programs = 1
        if weight.device.type == "cuda":
            # Two of them have room in a multiprocessor's shared memory, and one is short of warps.
            self._num_programs = 2 * torch.cuda.get_device_properties(weight.device).multi_processor_count

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., in_features]`; returns `[..., out_features]`."""
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        assert rows.dtype == self._weight.dtype, "rows in the weight's dtype"
        output = rows.new_empty((len(rows), self.out_features))
        num_tiles = triton.cdiv(len(rows), _BLOCK_M) * triton.cdiv(self.out_features, _BLOCK_N)
        linear_kernel[(min(num_tiles, self._num_programs),)](
            rows,
            self._weight,
            self._bias,
            output,
            len(rows),
            rows.stride(0),
            self._weight.stride(0),
            OUT_FEATURES=self.out_features,
            IN_FEATURES=self.in_features,
            HAS_BIAS=self._bias is not None,
            GROUP=_GROUP,
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K // (rows.element_size() // 2),
            num_warps=4,
            num_stages=4,
        )
        return output.view(*x.shape[:-1], self.out_features)


def invariant_packer(dtype: torch.dtype, device: torch.device) -> LinearPacker:
    """Layers whose rows do not depend on their batch. Raises `ModelLoadError` where a trial shows that they do."""
    build = f"triton {triton.__version__} {_BLOCK_M} {_BLOCK_N} {_BLOCK_K}"
    packer = LinearPacker(build, TritonLinear, 64 * torch.finfo(dtype).eps)
    _try(packer, dtype, device)
    if device.type != "cuda" or not forbid_split_k():
        return packer
    trials = LibraryTrials()
    return LinearPacker(
        f"cuBLASLt without split-K, or {build}",
        lambda weight, bias: trials.layer(weight, bias) or TritonLinear(weight, bias),
        packer.tolerance,
    )


def _try(packer: LinearPacker, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_TRIAL_SHAPE, generator=generator) * _TRIAL_SHAPE[1] ** -0.5  # outputs of about 1
    x = torch.randn(max(_TRIAL_ROWS), _TRIAL_SHAPE[1], generator=generator).to(device, dtype)
    weight = weight.to(device, dtype)
    layer = packer.pack(weight, None)
    whole = layer(x)
    refused = f"deterministic does not work on {device}: "
    if not all(torch.equal(layer(x[-rows:]), whole[-rows:]) for rows in _TRIAL_ROWS):
        raise ModelLoadError(refused + "the rows of a matrix product depend on their batch; set it to false")
    expected = x.double() @ weight.double().t()
    if not torch.allclose(whole.double(), expected, rtol=0, atol=packer.tolerance):
        raise ModelLoadError(refused + f"the matrix product of {packer.build} is wrong; set it to false")
