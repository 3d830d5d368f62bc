"""Calls of the C kernels with all that they read and write, for replay.py: record.py FILE.

Replaying needs no torch, whose import takes an emulated CPU minutes.
"""

import ctypes
import gc
import pickle
import struct
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import AttentionRules
from engine.attention.native import NativeAttention
from engine.kernels import build
from engine.model import bfloat16_linear
from engine.model.int8_linear import Int8Kernels, Int8Linear
from engine.model.locate import default_cache_dir
from engine.model.native_linear import NativeLinear, load_matmul
from engine.model.native_rows import NativeRows, _rope_arguments
from engine.model.norm_rule import NormRule
from engine.native_sampling import NativeSampling
from tests.fakes.paged_batches import PagedWorld

KERNELS = default_cache_dir() / "kernels"
BOTH = (torch.float32, torch.bfloat16)
NARROW = (torch.bfloat16, torch.float16)
KEPT = (*NARROW, torch.int8)  # as keys and values are, under float32
FORMATS = [*((dtype, dtype) for dtype in BOTH), *((torch.float32, kv_dtype) for kv_dtype in KEPT)]
SHAPES = [(9, 3, 64, 16), (8, 1, 80, 16), (6, 2, 20, 3), (2, 1, 256, 32), (12, 2, 32, 16)]
calls: list[tuple[str, str, bytes, list[tuple[int, int, int]], list[bytes], list[bytes]]] = []


class RecordingLibrary(ctypes.CDLL):
    """Its functions note what they are called with."""

    def __getitem__(self, name: str) -> Any:
        library, plain = Path(self._name).name.rpartition("-")[0], self._FuncPtr

        class Recorded(plain):  # type: ignore[misc, valid-type]
            _flags_, _restype_ = plain._flags_, plain._restype_

            def __call__(self, arguments: bytes, *others: object) -> Any:
                places, regions = find_regions(arguments)
                before = [ctypes.string_at(*region) for region in regions]
                result = super().__call__(arguments, *others)
                after = [ctypes.string_at(*region) for region in regions]
                calls.append((library, name, arguments, places, before, after))
                return result

        return Recorded((name, self))


def find_regions(arguments: bytes) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Where pointers stand, with the region and the place in it of each; and the regions, which are tensors' memory."""
    storages = {x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu"}
    known = sorted({(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()})
    places: list[tuple[int, int, int]] = []
    regions: list[tuple[int, int]] = []
    for offset in range(0, len(arguments) - 7, 8):
        (pointer,) = struct.unpack_from("@Q", arguments, offset)
        for address, size in known:
            if address <= pointer < address + size:
                if (address, size) not in regions:
                    regions.append((address, size))
                places.append((offset, regions.index((address, size)), pointer - address))
                break
    return places, regions


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attend() -> None:
    backend = NativeAttention(KERNELS)
    for shape in SHAPES:
        for dtype, kv_dtype in FORMATS:
            names = dict(zip(("num_heads", "num_kv_heads", "head_dim", "block_size"), shape, strict=True))
            world = PagedWorld.build([1, 31, 300], dtype=dtype, kv_dtype=kv_dtype, **names)
            steps = [
                [(i, *part) for i, s in enumerate(world.sequences) for part in [part_of(len(s.q), step)] if part]
                for step in range(2)
            ]
            sinks = torch.linspace(-1, 3, shape[0])
            for rules in (None, AttentionRules(0.3, sliding_window=100, softcap=20.0, sinks=sinks)):
                world.run(backend, steps, rules)


def part_of(length: int, step: int) -> tuple[int, int] | None:
    """All but the last token first, then the last."""
    return [*pairwise([0, length - 1, length])][step] if length > 1 or step else None


def multiply() -> None:
    matmul, kernels = load_matmul(KERNELS)[1], Int8Kernels(KERNELS)
    for out_features, in_features in [(37, 45), (90, 100), (192, 576)]:
        for dtype in BOTH:
            weight = (random(out_features, in_features) * in_features**-0.5).to(dtype)
            layers: list[torch.nn.Module] = [Int8Linear(weight, random(out_features).to(dtype), kernels)]
            if dtype == torch.float32:
                bias = random(out_features)
                layers += [NativeLinear(weight.to(kept).float(), bias, matmul) for kept in (torch.float32, *NARROW)]
            elif bfloat16_linear.is_best_here():
                bias = random(out_features).to(dtype)
                matmul_bf16 = bfloat16_linear.load_matmul(KERNELS)[1]
                layers += [bfloat16_linear.Bfloat16Linear(weight, bias, matmul_bf16)]
            for layer in layers:
                for num_rows in (*range(1, 26), 61):
                    x = random(num_rows, in_features, dtype=dtype)
                    x[::3, 5] += 40
                    layer(x)


def pass_rows() -> None:
    rows = NativeRows(KERNELS)
    for dtype in BOTH:
        for size in (34, 64):
            x, weight, angles = random(7, 3 * size, dtype=dtype), random(size, dtype=dtype), random(7, size - 2)
            x[2, 5], x[3, 40], x[4, 80] = float("nan"), float("inf"), -3e38
            for rule in (NormRule(1e-5, False, False), NormRule(1e-6, True, True)):
                out = torch.empty_like(x)
                rows.norm(x, out, weight, rule)
            for is_gelu in (False, True):
                rows.glu(x[:, : 2 * size].contiguous(), is_gelu=is_gelu)
            rotated, cos, sin = random(7, 3 * size, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype)
            rows._rope(_rope_arguments(rotated, cos, sin, size))


def sample() -> None:
    passes = NativeSampling(KERNELS)
    logits = random(40, 1003) * 3
    logits[3, 500:], logits[4], logits[5, 1002] = -float("inf"), 1, 60
    rows, temperature, min_p = torch.arange(40), torch.linspace(0.2, 3, 40), torch.linspace(0, 0.2, 40)
    keys = torch.randint(-(2**31), 2**31, (2, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    bits = torch.randint(-(2**31), 2**31, (40, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    passes.argmax(logits)
    passes.draw(logits, rows, temperature, keys)
    passes.candidates(logits, rows, temperature, min_p, 20)
    passes.mask(logits, rows, bits)


def main() -> None:
    torch.set_num_threads(1)
    build.ctypes.CDLL = RecordingLibrary  # type: ignore[attr-defined]
    for record in (attend, multiply, pass_rows, sample):
        record()
    Path(sys.argv[1]).write_bytes(pickle.dumps(calls))


if __name__ == "__main__":
    main()
