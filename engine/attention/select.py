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
    from engine.attention.native import DTYPES, NativeAttention
    from engine.kernels.build import KernelBuildError

    reason = None
    if device.type != "cpu" or dtype not in DTYPES:
        reason = f"it has no kernel for {dtype} on {device}"
    else:
        try:
            return NativeAttention(cache_dir / "kernels")
        except KernelBuildError as error:
            reason = str(error)
    if name == "native":
        raise InvalidRequestError(f"attention 'native' does not work here: {reason}; use 'torch'", param="attention")
    logger.warning("the native attention kernel is not used, torch's slower one is: %s", reason)
    return TorchAttention()
