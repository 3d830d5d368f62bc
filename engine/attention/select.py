"""Picks the attention backend of a device: by name, or the best one that works here."""

import logging
from pathlib import Path

import torch

from engine.attention.base import AttentionBackend
from engine.attention.torch_backend import TorchAttention
from engine.errors import InvalidRequestError

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "native", "torch")


def select_backend(name: str, *, device: torch.device, dtype: torch.dtype, cache_dir: Path) -> AttentionBackend:
    """The backend called `name`, or for `auto` the fastest that works on this device.

    cache_dir: where compiled kernels are kept. Raises `InvalidRequestError` for a backend that is unknown, or that was
    asked for by name and does not work here.
    """
    if name not in BACKENDS:
        raise InvalidRequestError(f"attention must be one of {', '.join(BACKENDS)}; got {name!r}", param="attention")
    if name == "torch" or (name == "auto" and device.type != "cpu"):
        return TorchAttention()
    reason = "there is no kernel for " + (f"{dtype} on a CPU" if device.type == "cpu" else str(device))
    if device.type == "cpu":
        from engine.attention.native import DTYPES

        if dtype in DTYPES:
            backend, reason = _make_native(dtype, cache_dir / "kernels")
            if backend is not None:
                return backend
    if name == "native":
        raise InvalidRequestError(f"attention 'native' does not work here: {reason}; use 'torch'", param="attention")
    logger.warning("attention runs in torch, slower than in the native kernel: %s", reason)
    return TorchAttention()


def _make_native(dtype: torch.dtype, kernels_dir: Path) -> tuple[AttentionBackend | None, str]:
    """The native backend if it can be compiled here and computes rightly, else None and the reason."""
    from engine.attention.native import NativeAttention
    from engine.attention.self_check import find_fault
    from engine.kernels.build import KernelBuildError

    try:
        backend = NativeAttention(kernels_dir)
    except KernelBuildError as error:
        return None, str(error)
    fault = find_fault(backend, dtype)
    return (backend, "") if fault is None else (None, f"{backend.build} is wrong: {fault}")
