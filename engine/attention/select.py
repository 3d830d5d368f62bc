"""Picks the attention backend of a device: by name, or the best one that works here."""

import importlib.util
import logging
from pathlib import Path

import torch

from engine.attention.base import AttentionBackend
from engine.attention.torch_backend import TorchAttention
from engine.errors import InvalidRequestError

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "native", "torch", "triton")


def select_backend(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    cache_dir: Path,
    deterministic: bool = False,
) -> AttentionBackend:
    """The backend called `name`, or for `auto` the fastest that works on this device.

    kv_dtype: of keys and values, None: dtype; cache_dir: where compiled kernels are kept; deterministic: a row has the
    same bits in any batch and any chunks.
    Raises `InvalidRequestError` for a backend that is unknown, or that was asked for by name and does not work here.
    """
    if name not in BACKENDS:
        raise InvalidRequestError(f"attention must be one of {', '.join(BACKENDS)}; got {name!r}", param="attention")
    if name == "torch":
        return TorchAttention()
    if name == "triton" or (name == "auto" and device.type != "cpu"):
        backend, reason = _make_triton(device, dtype, kv_dtype or dtype, deterministic=deterministic)
    else:
        backend, reason = _make_native(device, dtype, kv_dtype or dtype, cache_dir / "kernels")
    if backend is not None:
        return backend
    if name != "auto":
        raise InvalidRequestError(f"attention {name!r} does not work here: {reason}; use 'torch'", param="attention")
    logger.warning("action=attention_in_torch cost='slower than the kernel made for this device' reason=%r", reason)
    return TorchAttention()


def _make_native(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, kernels_dir: Path
) -> tuple[AttentionBackend | None, str]:
    """The native backend if it can be compiled here and computes rightly, else None and the reason."""
    from engine.attention.native import DTYPES, NativeAttention
    from engine.kernels.build import KernelBuildError

    if device.type != "cpu" or dtype not in DTYPES:
        return None, "there is no kernel for " + (f"{dtype} on a CPU" if device.type == "cpu" else str(device))
    try:
        backend = NativeAttention(kernels_dir)
    except KernelBuildError as error:
        return None, str(error)
    return _checked(backend, dtype, kv_dtype, device)


def _make_triton(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, *, deterministic: bool
) -> tuple[AttentionBackend | None, str]:
    """The Triton backend if it runs here and computes rightly, else None and the reason."""
    if reason := _runs_triton(device):
        return None, reason
    if kv_dtype != dtype:  # as under int8, which is a CPU's: its kernels write one dtype
        return None, f"it takes keys of the model's dtype, {dtype}, and this cache's are {kv_dtype}"
    from engine.attention.triton_backend import TritonAttention

    try:
        return _checked(TritonAttention(deterministic=deterministic), dtype, kv_dtype, device)
    except Exception as error:  # whatever a compiler makes of a GPU that it does not know
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _checked(
    backend: AttentionBackend, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> tuple[AttentionBackend | None, str]:
    from engine.attention.self_check import find_fault

    fault = find_fault(backend, dtype, kv_dtype=kv_dtype, device=device)
    return (backend, "") if fault is None else (None, f"{backend.build} is wrong: {fault}")


def _runs_triton(device: torch.device) -> str:
    """Why Triton's kernels do not run on the device, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; torch's CUDA builds bring it"
    import triton

    # The interpreter runs them anywhere, a tile in milliseconds: for tests.
    return "" if device.type == "cuda" or triton.knobs.runtime.interpret else "there is no CUDA device"
