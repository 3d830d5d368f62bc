"""Linear layers through the GPU's own matrix library for `deterministic`, wherever it gives a row the same bits always.

Without split-K the library adds up in an order that its choice of a kernel decides, and that goes with the number of
rows. So rows are padded to few numbers, no fewer than fill a tile, and a trial at load computes a layer with each of
them: kernels of one order of additions give the same bits, and a layer for which they do not is not computed so.
"""

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ROW_STEP = 64
_MOST_ROWS = 8192
_MOST_OUTPUTS = 1 << 28  # of one product
_product = nn.functional.linear


class LibraryLinear(nn.Module):
    """`x @ weight.T + bias` for `weight` `[out_features, in_features]`, by products of the numbers of rows tried."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._most_rows = row_counts(self.out_features)[-1]

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., in_features]`; returns `[..., out_features]`."""
        rows = x.reshape(-1, self.in_features)
        parts = [self._of_part(part) for part in torch.split(rows, self._most_rows)]
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output.view(*x.shape[:-1], self.out_features)

    def keeps_bits(self) -> bool:
        """Whether a row has the same bits with all numbers of rows, first or last among them."""
        generator = torch.Generator(self._weight.device).manual_seed(0)
        shape = (self._most_rows, self.in_features)
        x = torch.randn(shape, generator=generator, device=self._weight.device).to(self._weight.dtype)
        whole = self._of_part(x)
        return all(
            torch.equal(self._of_part(x[:rows]), whole[:rows])
            # A copy: memory that is aligned otherwise than a step's would bring another kernel.
            and torch.equal(self._of_part(x[-rows:].clone()), whole[-rows:])
            for rows in row_counts(self.out_features)
        )

    def _of_part(self, rows: Tensor) -> Tensor:
        num_rows = len(rows)
        if (padded := padded_rows(num_rows)) > num_rows:
            wide = rows.new_zeros((padded, self.in_features))
            wide[:num_rows] = rows
            rows = wide
        return _product(rows, self._weight, self._bias)[:num_rows]


class LibraryTrials:
    """Which layers the library may compute, tried once for each shape."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, bool], bool] = {}

    def layer(self, weight: Tensor, bias: Tensor | None) -> LibraryLinear | None:
        """None: it does not keep the bits of such a layer's rows."""
        layer = LibraryLinear(weight, bias)
        key = layer.out_features, layer.in_features, bias is not None
        if key not in self._found:
            try:
                self._found[key] = layer.keeps_bits()
            except RuntimeError as error:
                # As torch does where another library, which cannot be kept from splitting K, has to help out. An error
                # of the device, which stays, comes again with the next call.
                logger.warning("action=library_refused shape=%s reason=%r", key, str(error).partition("\n")[0])
                self._found[key] = False
            logger.info("action=library_tried shape=%s keeps_bits=%s", key, self._found[key])
        return layer if self._found[key] else None


def padded_rows(num_rows: int) -> int:
    """Multiples of 64 to 512, of 128 to 2,048, of 512 beyond."""
    step = ROW_STEP if num_rows <= 512 else 128 if num_rows <= 2048 else 512
    return -(-num_rows // step) * step


def row_counts(out_features: int) -> list[int]:
    """All numbers of rows of one product; an output layer's are fewer, since its outputs take much memory."""
    most = max(ROW_STEP, min(_MOST_ROWS, _MOST_OUTPUTS // out_features))
    return [rows for rows in range(ROW_STEP, most + 1, ROW_STEP) if padded_rows(rows) == rows]


def forbid_split_k() -> bool:
    """Have torch's products on a GPU add up in one piece, in this whole process; whether this torch can."""
    matmul = torch.backends.cuda.matmul
    try:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        matmul.allow_bf16_reduced_precision_reduction = (False, False)
        matmul.allow_fp16_reduced_precision_reduction = (False, False)
    except (RuntimeError, TypeError, AttributeError) as error:
        logger.warning("action=library_has_split_k reason=%r", str(error).partition("\n")[0])
        return False
    return True
