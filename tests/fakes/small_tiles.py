"""The smallest tiles of the GPU's kernels, and trials at a model's start that need few of them.

Triton's interpreter takes milliseconds for each. Its attention is held against its twin once a process, not every load.
"""

from collections.abc import Callable
from typing import Any

from engine import triton_sampling
from engine.attention import self_check, triton_backend
from engine.attention.base import AttentionBackend
from engine.model import triton_linear

_find_fault = self_check.find_fault
_faults: dict[tuple[object, ...], str | None] = {}


def set_small_tiles(set_attribute: Callable[[object, str, object], None]) -> None:
    """`set_attribute`: `setattr`, or a test's that puts everything back."""
    for name, size in (("_BLOCK_M", 16), ("_BLOCK_N", 16), ("_BLOCK_K", 32), ("_TRIAL_ROWS", (1, 2, 17, 20))):
        set_attribute(triton_linear, name, size)
    set_attribute(triton_linear, "_TRIAL_SHAPE", (33, 50))
    set_attribute(triton_backend, "SPLIT", 16)
    set_attribute(triton_backend, "_TILE_KEYS", 16)
    set_attribute(triton_sampling, "_FILTER_BLOCK", 512)
    set_attribute(self_check, "_LENGTHS", {"cpu": [33, 17], "cuda": [600, 17]})
    set_attribute(self_check, "find_fault", _find_fault_once)


def _find_fault_once(backend: AttentionBackend, dtype: object, **options: Any) -> str | None:
    key = (backend.build, dtype, *sorted(options.items()))
    if key not in _faults:
        _faults[key] = _find_fault(backend, dtype, **options)  # type: ignore[arg-type]
    return _faults[key]
