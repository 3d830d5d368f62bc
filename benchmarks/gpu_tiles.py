"""Attention with other tiles than those it has: chosen by reasoning, they may not be a device's fastest.

Each is one change to what `engine.attention.triton_backend` chooses; the first row of a case is as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.gpu_kernels import attention_seconds, by_bytes, by_flops
from benchmarks.gpu_models import DeviceLimits, ModelSize
from benchmarks.gpu_timer import Timer
from engine.attention import triton_backend

_DECODES = {  # contexts
    "16 x 1024": [1024] * 16,
    "64 x 1024": [1024] * 64,
    "64 x 100 to 1864": [100 + 28 * i for i in range(64)],
    "256 x 100 to 1885": [100 + 7 * i for i in range(256)],
}
_PREFILLS = [(1, 4096), (16, 512)]
# What is changed, by the backend's names.
_DECODE_CHANGES: list[dict[str, int]] = [
    {},
    {"_DECODE_STAGES": 3},
    {"_DECODE_STAGES": 4},
    {"_TILE_KEYS": 32},
    {"_TILE_KEYS": 32, "_DECODE_STAGES": 3},
    {"_DECODE_WARPS": 2, "_TILE_KEYS": 32},
    {"_TILE_KEYS": 64},
    {"_TILE_BYTES": 32_768},
    {"_TILE_KEYS": 256, "_TILE_BYTES": 32_768},
    {"_DECODE_WARPS": 8},
    {"_DECODE_WARPS": 2},
    {"SPLIT": 256},
    {"SPLIT": 1024},
    {"_UNSPLIT": 1},
    {"_UNSPLIT": 4},
    {"_ENOUGH_PROGRAMS": 1024},
    {"_MANY_PROGRAMS": 512},
    {"_MANY_PROGRAMS": 1 << 30},
]
_PREFILL_CHANGES: list[dict[str, int]] = [
    {},
    {"_PREFILL_ROWS": 128},
    {"_PREFILL_ROWS": 128, "_PREFILL_STAGES": 2},
    {"_PREFILL_ROWS": 128, "_TILE_BYTES": 32_768},
    {"_PREFILL_ROWS": 128, "_TILE_BYTES": 32_768, "_PREFILL_STAGES": 2},
    {"_TILE_BYTES": 32_768, "_PREFILL_STAGES": 2},
    {"_TILE_KEYS": 32},
    {"_PREFILL_STAGES": 2},
    {"_PREFILL_STAGES": 4},
]


def time_tiles(size: ModelSize, timer: Timer, limits: DeviceLimits, *, is_smoke: bool) -> Iterator[list[str]]:
    """Rows of `gpu_report.KERNEL_COLUMNS` without the model."""
    decodes, prefills = ({"2 x 20": [20, 20]}, [(1, 20)]) if is_smoke else (_DECODES, _PREFILLS)
    for name, contexts in decodes.items():
        num_bytes = sum(contexts) * size.kv_bytes / size.layers
        for changes in _DECODE_CHANGES[: 2 if is_smoke else None]:
            seconds = _seconds(size, timer, [(1, context) for context in contexts], changes)
            case = name + _named(changes)
            yield _failed("decode tile", case, seconds) or by_bytes(
                "decode tile", case, float(seconds), num_bytes, limits
            )
    for num_seqs, length in prefills:
        flops = 2 * num_seqs * size.heads * size.head_dim * length**2
        for changes in _PREFILL_CHANGES[: 2 if is_smoke else None]:
            seconds = _seconds(size, timer, [(length, length)] * num_seqs, changes)
            case = f"{num_seqs} x {length}{_named(changes)}"
            yield _failed("prefill tile", case, seconds) or by_flops(
                "prefill tile", case, float(seconds), flops, limits
            )


def _seconds(size: ModelSize, timer: Timer, parts: list[tuple[int, int]], changes: dict[str, int]) -> float | str:
    """Or why there are none: a tile may not fit a multiprocessor."""
    try:
        with _changed(changes):
            return attention_seconds(size, timer, parts)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:80]


def _failed(name: str, case: str, seconds: float | str) -> list[str] | None:
    return [name, case, "-", seconds, "-"] if isinstance(seconds, str) else None


def _named(changes: dict[str, int]) -> str:
    return "".join(f", {name.strip('_').lower()} {value}" for name, value in changes.items())


@contextmanager
def _changed(changes: dict[str, int]) -> Iterator[None]:
    before = {name: getattr(triton_backend, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(triton_backend, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(triton_backend, name, value)
