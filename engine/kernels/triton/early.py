"""Kernels whose programs begin while those of the one before them end: programmatic dependent launch, from Hopper on.

A launch costs a GPU about a microsecond between two kernels that wait for each other; a decode of a small model has
hundreds of kernels that are hardly longer. Launched early, programs are there when what they read is.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_FIRST_CAPABILITY = 9


@triton.jit
def await_inputs(EARLY: tl.constexpr):
    """To be called before anything is read or written that another kernel writes or reads. The kernel behind this one,
    if it is early too, may begin from here on."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


def early_launch(x: Tensor) -> dict[str, Any]:
    """Arguments of a launch on a tensor's device: the constant `EARLY`, and how it is launched where that is true."""
    return {"EARLY": True, "launch_pdl": True} if _is_early(x.device) else {"EARLY": False}


@cache
def _is_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _FIRST_CAPABILITY
