"""Which device and dtypes a model runs in, and what names their arithmetic."""

import platform
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.kernels.cpu_features import cpu_flags
from engine.model.registry import Architecture
from engine.parallel.rank import ALONE, Rank

_CPU_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 and, last, Arm


def resolve_device(name: str, rank: Rank = ALONE) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that is there: this rank's, of as many GPUs as there are ranks.

    Raises `ModelLoadError` otherwise.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ModelLoadError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    first = device.index or 0
    if first >= count:
        raise ModelLoadError(f"device {name!r} is not there: torch sees {count} CUDA devices; use cpu or another")
    if first + rank.size > count:
        raise ModelLoadError(
            f"tensor_parallel_size {rank.size} takes as many GPUs from cuda:{first} on, but torch sees {count} CUDA "
            f"devices; set it to {count - first} or less"
        )
    return torch.device("cuda", first + rank.index)


def describe_devices(device: torch.device, num_ranks: int) -> str:
    """The leader's device and those behind it, such as `cuda:0`, `cuda:0-3` or `cpu x2`."""
    if num_ranks == 1:
        return str(device)
    return f"{device} x{num_ranks}" if device.type == "cpu" else f"{device}-{device.index + num_ranks - 1}"


def use_device(device: torch.device) -> None:
    """Make this thread launch on it: streams, events and Triton's kernels follow that choice, not their tensors."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@dataclass(frozen=True, slots=True)
class Dtypes:
    """The formats of a model's numbers: what is kept in fewer bytes than it is computed in is widened as it is read."""

    weights: torch.dtype  # what `EngineConfig.dtype` names; rounded to, whatever they are kept in
    activations: torch.dtype  # computed in
    kv_cache: torch.dtype


def resolve_dtypes(
    config: EngineConfig, device: torch.device, architecture: Architecture, checkpoint_dtype: str | None
) -> Dtypes:
    """`config.dtype` is the weights' and, but for `config.kv_cache_dtype`, the cache's. Where the CPU has no products
    of it, float32 is computed.

    In int8 half of float32's bytes are enough for keys and values: a decode's attention waits for them alone.
    """
    weights = resolve_dtype(config.dtype, device, checkpoint_dtype)
    kv_cache = torch.float16 if config.quantize == "int8" and weights == torch.float32 else weights
    if config.kv_cache_dtype == "int8":
        kv_cache = torch.int8
    return Dtypes(weights, torch.float32 if _widens(config, device, architecture, weights) else weights, kv_cache)


def _widens(config: EngineConfig, device: torch.device, architecture: Architecture, weights: torch.dtype) -> bool:
    """Whether weights are widened as they are read: on a CPU, by our own products."""
    if device.type != "cpu" or config.attention == "triton":  # whose kernels know one dtype, by its interpreter too
        return False
    if architecture.has_experts:  # they would all be kept in float32
        return False
    return weights == torch.float16 or (weights == torch.bfloat16 and not cpu_has_bfloat16())


def resolve_dtype(name: str, device: torch.device, checkpoint_dtype: str | None) -> torch.dtype:
    """`auto` is the checkpoint's own on CUDA; on a CPU bfloat16 where it is computed natively, else float32.

    checkpoint_dtype: as config.json names it, or None.
    """
    if name == "auto":
        if device.type == "cpu":
            name = "bfloat16" if cpu_has_bfloat16() else "float32"
        else:
            name = checkpoint_dtype or "bfloat16"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelLoadError(f"dtype {name} cannot be computed in; set dtype to float32, bfloat16 or float16")
    assert isinstance(dtype, torch.dtype)
    return dtype


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself. torch computes it anywhere, but without this slower than float32."""
    return bool(_CPU_BFLOAT16_FLAGS & cpu_flags())


def describe_arithmetic(device: torch.device) -> str:
    """The part of a fingerprint that the device and the libraries make: equal strings, equal bits."""
    if device.type == "cuda":
        unit = torch.cuda.get_device_name(device)
    else:
        unit = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        unit += f" {' '.join(sorted(flag for flag in cpu_flags() if flag in _CPU_BFLOAT16_FLAGS))}"
    return f"{unit.strip()}; torch {torch.__version__}"
