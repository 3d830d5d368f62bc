"""The kernels' code for AVX512 computes what that for AVX2 does; AVX2 stands in for what is not here."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionRules
from engine.attention.native import NativeAttention
from engine.kernels import build
from engine.kernels.cpu_features import cpu_flags
from engine.model import bfloat16_linear
from engine.model.int8_linear import Int8Kernels, Int8Linear
from engine.model.native_linear import NativeLinear, load_matmul
from engine.model.native_rows import NativeRows
from engine.model.norm_rule import NormRule
from engine.native_sampling import NativeSampling
from tests.fakes.paged_batches import PagedWorld

EMULATED_AVX512 = Path(__file__).parents[2] / "fakes" / "emulated_avx512.h"
DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float32, torch.bfloat16, id="float32 over bfloat16"),
    pytest.param(torch.float32, torch.float16, id="float32 over float16"),
    pytest.param(torch.float32, torch.int8, id="float32 over int8"),
    pytest.param(torch.bfloat16, torch.int8, id="bfloat16 over int8"),
]
SHAPES = [(9, 3, 64, 16), (2, 1, 80, 32), (6, 2, 20, 3), (12, 2, 32, 16)]  # heads, kv heads, head_dim, block_size
Kernels = TypeVar("Kernels")

pytestmark = pytest.mark.skipif(
    not {"avx2", "fma", "f16c"} <= cpu_flags() or "avx512f" in cpu_flags(),
    reason="for a CPU that has AVX2 and not AVX512",
)


def for_avx512(make: Callable[[Path], Kernels], kernels_dir: Path, *flags: str) -> Kernels:
    """Kernels built for AVX512, and hardly optimised, or it takes a compiler a minute."""
    optimisation, *others = build._FLAGS
    assert optimisation == "-O3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FLAGS", ("-Og", "-Wno-psabi", *flags, "-include", str(EMULATED_AVX512), *others))
        return make(kernels_dir)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(output: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    """Sums of some hundred terms of size 1, one of them without fused multiply-adds; bfloat16 rounds to 2^-8."""
    rtol = 2e-5 if expected.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(output, expected, atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize("instructions", ["BW", "BF16", "VNNI"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
def test_attention(
    native: NativeAttention, kernels_dir: Path, dtype: torch.dtype, kv_dtype: torch.dtype, instructions: str
) -> None:
    wide = for_avx512(NativeAttention, kernels_dir, f"-DEMULATED_{instructions}")
    # Weights rounded to bfloat16, by 2^-9 at most, of values of size 2.
    atol = 2**-8 if dtype == torch.bfloat16 and instructions == "BF16" else 2e-5
    atol = max(atol, 2e-4) if kv_dtype == torch.int8 else atol  # to 16 bits, whose rounding an exponential may tip
    for num_heads, num_kv_heads, head_dim, block_size in SHAPES:
        world = PagedWorld.build(
            [1, 31, 300],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
        prefill = [(i, 0, len(s.q) - 1) for i, s in enumerate(world.sequences) if len(s.q) > 1]
        decode = [(i, len(s.q) - 1, len(s.q)) for i, s in enumerate(world.sequences)]
        whole = [(i, 0, len(s.q)) for i, s in enumerate(world.sequences)]
        sinks = torch.linspace(-1, 3, num_heads)
        for rules in (None, AttentionRules(0.3, sliding_window=100, softcap=20.0, sinks=sinks)):
            expected = world.run(native, [prefill, decode], rules)
            outputs = world.run(wide, [prefill, decode], rules)
            for output, same, at_once in zip(outputs, expected, world.run(wide, [whole], rules), strict=True):
                assert_close(output, same, atol)
                assert torch.equal(output, at_once)


def test_products_in_float32(kernels_dir: Path) -> None:
    _, matmul = for_avx512(load_matmul, kernels_dir)
    wide, bias, x = random(90, 100) / 10, random(90), random(61, 100)
    for weight in (wide, wide.bfloat16().float(), wide.half().float()):
        layer = NativeLinear(weight, bias, matmul)
        whole = layer(x)
        assert_close(whole, torch.nn.functional.linear(x, weight, bias))
        for num_rows in range(1, 26):  # tiles of every height
            assert torch.equal(layer(x[:num_rows]), whole[:num_rows])


def test_products_in_bfloat16(kernels_dir: Path) -> None:
    rows = NativeRows(kernels_dir)
    _, matmul = for_avx512(bfloat16_linear.load_matmul, kernels_dir, "-DEMULATED_BF16")
    for in_features in (99, 100):
        weight, bias = random(90, in_features, dtype=torch.bfloat16) / 10, random(90, dtype=torch.bfloat16)
        x = random(61, in_features, dtype=torch.bfloat16)
        layer = bfloat16_linear.Bfloat16Linear(weight, bias, matmul)
        whole = layer(x)
        assert_close(whole, torch.nn.functional.linear(x.float(), weight.float(), bias.float()).bfloat16())
        for num_rows in range(1, 26):  # tiles of every height
            assert torch.equal(layer(x[:num_rows]), whole[:num_rows])
        plain = bfloat16_linear.Bfloat16Linear(weight, None, matmul)
        addend = random(61, 90, dtype=torch.bfloat16)
        rows.chain(len(x), plain.link(x, added := torch.empty_like(addend), addend))
        assert torch.equal(added, plain(x) + addend)


@pytest.mark.parametrize("instructions", ["BW", "VNNI"])
def test_products_in_8_bits_to_the_bit(kernels_dir: Path, instructions: str) -> None:
    own, wide = Int8Kernels(kernels_dir), for_avx512(Int8Kernels, kernels_dir, f"-DEMULATED_{instructions}")
    for dtype in DTYPES:
        weight, bias, x = random(90, 100, dtype=dtype), random(90, dtype=dtype), random(61, 100, dtype=dtype)
        x[::3, 5] += 40
        x[7, 3], x[8] = float("inf"), 0
        expected, layer = Int8Linear(weight, bias, own)(x), Int8Linear(weight, bias, wide)
        for num_rows in range(1, 62):
            torch.testing.assert_close(layer(x[:num_rows]), expected[:num_rows], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_rotation_and_activations(kernels_dir: Path, dtype: torch.dtype) -> None:
    outputs = []
    wide = for_avx512(NativeRows, kernels_dir), for_avx512(NativeRows, kernels_dir, "-DEMULATED_BF16")
    for rows in (NativeRows(kernels_dir), *wide):
        x, weight, angles = random(7, 3 * 37, dtype=dtype), random(37, dtype=dtype), random(7, 34)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        x[2, 5], x[3, 40], x[4, 80] = float("nan"), float("inf"), -3e38
        for rule in (NormRule(1e-5, False, False), NormRule(1e-6, True, True)):
            rows.norm(x, out := torch.empty_like(x), weight, rule)
            outputs.append(out)
        outputs += [rows.glu(x[:, :110].contiguous(), is_gelu=is_gelu) for is_gelu in (False, True)]
        rotated = random(7, 3 * 37, dtype=dtype)
        rows.chain(len(rotated), rows.rope_link(rotated, cos, sin, head_dim=37))
        outputs.append(rotated)
    for expected, *others in zip(outputs[:5], outputs[5:10], outputs[10:], strict=True):
        for output in others:
            assert_close(output, expected)


def test_sampling(kernels_dir: Path) -> None:
    own, wide = NativeSampling(kernels_dir), for_avx512(NativeSampling, kernels_dir)
    logits = random(40, 1003) * 3
    logits[3, 500:], logits[4], logits[5, 1002] = -float("inf"), 1, 60
    rows, temperature, min_p = torch.arange(40), torch.linspace(0.2, 3, 40), torch.linspace(0, 0.2, 40)
    keys = torch.randint(-(2**31), 2**31, (2, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert torch.equal(wide.argmax(logits), own.argmax(logits))
    assert torch.equal(wide.draw(logits, rows, temperature, keys), own.draw(logits, rows, temperature, keys))
    candidates = zip(
        wide.candidates(logits, rows, temperature, min_p, 20),
        own.candidates(logits, rows, temperature, min_p, 20),
        strict=True,
    )
    for output, expected in candidates:
        torch.testing.assert_close(output, expected)
