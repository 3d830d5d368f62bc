"""Which packed linear layers a CPU model gets, and their exchange for torch's.

A packed layer gains twice: a row's result is the same to the bit in every batch, and the weight lies as the product
reads it. Our own kernels come first (`benchmarks/linear_speed.py`); oneDNN's packed product is for where they cannot be
compiled, and in bfloat16 for CPUs whose instructions for it they do not know.

Every kind is tried before it is used. Where none works the model keeps torch's layers. Layers in 8 bits are made only
where they are asked for, and an engine that cannot make them does not start.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.errors import ModelLoadError
from engine.kernels.build import KernelBuildError
from engine.kernels.threads import one_thread
from engine.model import bfloat16_linear, int8_linear, native_linear, onednn_linear
from engine.model.narrow_weights import NARROW

logger = logging.getLogger(__name__)

_TRIAL_ROWS = (2, 3, 17, 64)


@dataclass(frozen=True, slots=True)
class LinearPacker:
    """One kind of packed layer."""

    build: str  # names its arithmetic: equal builds, equal bits
    pack: Callable[[Tensor, Tensor | None], nn.Module]  # weight [out_features, in_features], bias
    tolerance: float  # of outputs of about 1
    kernel: object = None  # what its layers hold of the process they run in: the compiled product; None: nothing


def choose_packer(dtype: torch.dtype, kernels_dir: Path) -> LinearPacker | None:
    """The first kind that works here in `dtype`; kernels_dir: where compiled kernels are kept."""
    with one_thread():
        return next((packer for packer in _packers(dtype, kernels_dir) if _works(packer, dtype)), None)


def int8_packer(dtype: torch.dtype, kernels_dir: Path) -> LinearPacker:
    """Layers in 8 bits. Raises `ModelLoadError` where they cannot be computed."""
    reason = f"{dtype} has no 8-bit layers; set dtype to float32 or bfloat16"
    if dtype in int8_linear.DTYPES:
        try:
            kernels = int8_linear.Int8Kernels(kernels_dir)
        except KernelBuildError as error:
            reason = str(error)
        else:
            pack = partial(int8_linear.Int8Linear, kernels=kernels)
            packer = LinearPacker(kernels.build, pack, tolerance=0.1, kernel=kernels.matmul)
            with one_thread():
                if _works(packer, dtype):
                    return packer
            reason = f"{kernels.build} is wrong on this CPU"
    raise ModelLoadError(f"quantize int8 does not work here: {reason}; or set quantize to none")


def pack_linears(model: nn.Module, packer: LinearPacker) -> None:
    """Replace the linear layers of a model."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if (plain := plain_weight(layer)) is not None:
                setattr(parent, name, packer.pack(*plain))


def plain_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """A linear layer's weight `[out_features, in_features]` and bias; None if it is something else."""
    if type(layer) is nn.Linear:
        return layer.weight, layer.bias
    if isinstance(layer, Conv1D):  # GPT-2's linear layer, with its weight transposed
        weight: Tensor = layer.weight
        bias: Tensor = layer.bias
        return weight.t(), bias
    return None


def _packers(dtype: torch.dtype, kernels_dir: Path) -> Iterator[LinearPacker]:
    try:
        if dtype == torch.float32:
            build, matmul = native_linear.load_matmul(kernels_dir)
            of_floats = partial(native_linear.NativeLinear, matmul=matmul)
            yield LinearPacker(build, of_floats, _tolerance(dtype), kernel=matmul)
        elif dtype == torch.bfloat16 and bfloat16_linear.is_best_here():
            build, matmul = bfloat16_linear.load_matmul(kernels_dir)
            of_pairs = partial(bfloat16_linear.Bfloat16Linear, matmul=matmul)
            yield LinearPacker(build, of_pairs, _tolerance(dtype), kernel=matmul)
    except KernelBuildError as error:
        logger.warning("action=native_linear_unavailable reason=%r", str(error))
    if dtype in onednn_linear.DTYPES:
        yield LinearPacker("oneDNN packed", onednn_linear.OneDnnLinear, _tolerance(dtype))


def _tolerance(dtype: torch.dtype) -> float:
    """Some roundings of the dtype, at sums of about 1."""
    return 64 * torch.finfo(dtype).eps


def _works(packer: LinearPacker, dtype: torch.dtype) -> bool:
    """Whether a packed layer computes what torch's does, each row the same in every batch."""
    weight = torch.randn(90, 80, generator=torch.Generator().manual_seed(0)) * 80**-0.5  # outputs of about 1
    formats = (dtype, *NARROW) if dtype == torch.float32 else (dtype,)  # narrow numbers may be kept in their own
    return all(_computes(packer, weight.to(numbers).to(dtype)) for numbers in formats)


def _computes(packer: LinearPacker, weight: Tensor) -> bool:
    generator, dtype = torch.Generator().manual_seed(1), weight.dtype
    bias = torch.randn(90, generator=generator).to(dtype)
    x = torch.randn(max(_TRIAL_ROWS), 80, generator=generator).to(dtype)
    try:
        packed = packer.pack(weight, bias)
        whole = packed(x)
        is_invariant = all(torch.equal(packed(x[:rows]), whole[:rows]) for rows in _TRIAL_ROWS)
        expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    except (AttributeError, RuntimeError) as error:
        logger.warning(
            "action=packed_linear_unavailable kind=%s reason=%r", packer.build, str(error).partition("\n")[0]
        )
        return False
    is_close = torch.allclose(whole.double(), expected, rtol=0, atol=packer.tolerance)
    if not (is_invariant and is_close):
        logger.warning(
            "action=packed_linear_rejected kind=%s dtype=%s invariant=%s close=%s",
            packer.build,
            dtype,
            is_invariant,
            is_close,
        )
    return is_invariant and is_close
