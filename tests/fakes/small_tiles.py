"""The smallest tiles of the GPU's kernels, and trials at a model's start that need few of them.

Triton's interpreter takes milliseconds for each.
"""

from collections.abc import Callable

from engine import triton_sampling
from engine.attention import self_check, triton_backend
from engine.model import triton_linear


def set_small_tiles(set_attribute: Callable[[object, str, object], None]) -> None:
    """`set_attribute`: `setattr`, or a test's that puts everything back."""
    for name, size in (("_BLOCK_M", 16), ("_BLOCK_N", 16), ("_BLOCK_K", 32), ("_TRIAL_ROWS", (1, 2, 17, 20))):
        set_attribute(triton_linear, name, size)
    set_attribute(triton_linear, "_TRIAL_SHAPE", (33, 50))
    set_attribute(triton_backend, "SPLIT", 16)
    set_attribute(triton_backend, "_TILE_KEYS", 16)
    set_attribute(triton_sampling, "_FILTER_BLOCK", 512)
    set_attribute(self_check, "_LENGTHS", {"cpu": [33, 17], "cuda": [600, 17]})
