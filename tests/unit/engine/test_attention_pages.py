"""What attention keeps in its pages: their layout in the native kernel; keys and values in 16 bits under float32."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionRules
from engine.attention.native import NativeAttention
from engine.attention.torch_backend import TorchAttention
from engine.kernels.build import KernelBuildError, build_library
from tests.fakes.kernel_builds import hardly_optimise
from tests.fakes.paged_batches import PagedWorld, dense_attention


def small_world(length: int, kv_dtype: torch.dtype = torch.float16, block_size: int = 16) -> PagedWorld:
    return PagedWorld.build(
        [length], num_heads=4, num_kv_heads=2, head_dim=32, block_size=block_size, kv_dtype=kv_dtype
    )


def write(backend: AttentionBackend, world: PagedWorld) -> None:
    """Prefill the world's sequence into the world's own cache."""
    q, k, v, batch = world.step([(0, 0, len(world.sequences[0].q))])
    backend.forward(q, k, v, world.kv_cache, batch, AttentionRules(0.2))


@pytest.mark.parametrize("block_size", [16, 32, 5])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_native_kernel_lays_keys_out_by_dimension_and_values_by_slot(
    native: NativeAttention, kv_dtype: torch.dtype, block_size: int
) -> None:
    world = small_world(45, kv_dtype, block_size)
    sequence = world.sequences[0]
    write(native, world)
    keys, values = world.kv_cache
    for position in range(45):
        block, slot = sequence.blocks[position // block_size], position % block_size
        key = keys[block].view(2, 32, block_size)[:, :, slot]
        value = values[block].view(2, block_size, 32)[:, slot]
        assert torch.equal(key, sequence.k[position].to(kv_dtype))
        assert torch.equal(value, sequence.v[position].to(kv_dtype))
    last = len(sequence.blocks) * block_size - 45
    assert keys[sequence.blocks[-1]].view(2, 32, block_size)[:, :, block_size - last :].isnan().all(), (
        "nothing is written behind the sequence"
    )


@pytest.mark.parametrize(("head_dim", "block_size"), [(32, 16), (32, 32), (32, 5), (20, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_8_bits_the_native_kernel_writes_the_codes_and_scales_of_its_twin(
    native: NativeAttention, dtype: torch.dtype, head_dim: int, block_size: int
) -> None:
    world = PagedWorld.build([45], 4, 2, head_dim, block_size, dtype=dtype, kv_dtype=torch.int8)
    sequence = world.sequences[0]
    for x in (sequence.k, sequence.v):
        x[::3] *= 2.0 ** torch.linspace(-90, 90, 15).to(dtype)[:, None, None]
        x[4], x[7], x[10, 1] = 0, 1e-35, 0
        x[13] = torch.arange(head_dim).to(dtype) - 8 * head_dim + 0.5  # ties
    q, k, v, batch = world.step([(0, 0, 45)])
    expected = world.kv_cache.clone()
    TorchAttention().forward(q, k, v, expected, batch, AttentionRules(0.2))
    native.forward(q, k, v, world.kv_cache, batch, AttentionRules(0.2))
    for pages, same, is_value in zip(world.kv_cache, expected, (False, True), strict=True):
        assert torch.equal(slots_of(pages, head_dim, block_size, is_value), same)


def slots_of(pages: Tensor, head_dim: int, block_size: int, is_value: bool) -> Tensor:
    """Pages as the torch backend has them: int8 `[num_blocks, block_size, num_kv_heads, head_dim + 4]`."""
    size = 16 if head_dim % 16 == block_size % 16 == 0 else block_size  # of a panel
    panels = pages.view(len(pages), 2, block_size // size, size * (head_dim + 4))
    codes, scales = panels.split((size * head_dim, size * 4), dim=-1)
    if size < 16 or head_dim % 16:
        codes = codes.unflatten(-1, (size, head_dim) if is_value else (head_dim, size))
        codes = codes if is_value else codes.transpose(-1, -2)
    elif is_value:  # pairs of slots
        codes = codes.unflatten(-1, (size // 2, head_dim, 2)).transpose(-1, -2).flatten(-3, -2)
    else:  # pairs of dimensions
        codes = codes.unflatten(-1, (head_dim // 2, size, 2)).transpose(-2, -3).flatten(-2, -1)
    slots = torch.cat((codes, scales.unflatten(-1, (size, 4))), dim=-1)
    return slots.flatten(2, 3).transpose(1, 2)


@pytest.mark.parametrize("architecture", ["native", "x86-64-v2"])
def test_keys_are_rounded_to_float16_as_torch_rounds_them(
    architecture: str, kernels_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture != "native" and platform.machine() != "x86_64":
        pytest.skip("for the conversion in plain C on x86-64")
    if platform.machine() == "x86_64":
        monkeypatch.setattr("engine.kernels.build._architecture_flag", lambda: f"-march={architecture}")
    try:
        backend = NativeAttention(kernels_dir)
    except KernelBuildError as error:
        pytest.skip(str(error))
    world = small_world(256)
    sequence = world.sequences[0]
    generator = torch.Generator().manual_seed(1)
    # All that half precision has: subnormal numbers, ties between two of them, and some it has no room for.
    sequence.k = torch.randn(sequence.k.shape, generator=generator) * 2.0 ** torch.randint(
        -30, 16, sequence.k.shape, generator=generator
    )
    sequence.k[:64] = (sequence.k[:64].half().view(torch.int16) & 0x7BFF).view(torch.float16).float()
    sequence.k[:64] += 2.0**-12 * sequence.k[:64]
    sequence.k[:2, :, :4] = torch.tensor([-0.0, 2.0**-25, 3 * 2.0**-25, 65519.0])
    write(backend, world)
    written = torch.cat([world.kv_cache[0, block].view(2, 32, 16) for block in sequence.blocks], dim=2)
    expected = sequence.k.clamp(-65504, 65504).half().permute(1, 2, 0).contiguous()
    assert torch.equal(written.view(torch.int16), expected.view(torch.int16))
    steps, rules = [[(0, 0, 256)]], AttentionRules(1e-5)
    outputs = world.run(backend, steps, rules)
    for a, b in zip(outputs, world.run(TorchAttention(), steps, rules), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)  # as the twins' sums in float32 may differ


@pytest.mark.parametrize("rules", [AttentionRules(0.2), AttentionRules(0.2, 37, 5.0, torch.linspace(-1, 3, 4))])
def test_attention_over_float16_equals_its_definition_over_the_rounded_keys_and_values(
    backend: AttentionBackend, rules: AttentionRules
) -> None:
    world = small_world(300)
    outputs = world.run(backend, [[(0, 0, 256)], [(0, 256, 299)], [(0, 299, 300)]], rules)
    sequence = world.sequences[0]
    rounded = replace(sequence, k=sequence.k.half(), v=sequence.v.half())
    expected = dense_attention(rounded, rules)
    assert outputs[0].dtype == torch.float32
    # Sums of a few hundred terms of size 1 in float32.
    torch.testing.assert_close(outputs[0].double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rules", [AttentionRules(0.2), AttentionRules(0.2, 37, 5.0, torch.linspace(-1, 3, 4))])
def test_attention_over_int8_equals_its_definition_over_the_rounded_keys_and_values(
    backend: AttentionBackend, rules: AttentionRules
) -> None:
    world = small_world(300, torch.int8)
    outputs = world.run(backend, [[(0, 0, 256)], [(0, 256, 299)], [(0, 299, 300)]], rules)
    sequence = world.sequences[0]
    k, v = ((x / (scale := x.abs().amax(-1, True) / 127)).round() * scale for x in (sequence.k, sequence.v))
    expected = dense_attention(replace(sequence, k=k, v=v), rules)
    # Queries of size 8 are rounded to 16 bits by the kernel, by 2^-13 at most, and scores by some 2^-12.
    tolerance = 2e-5 if backend.name == "torch" else 2e-3
    torch.testing.assert_close(outputs[0].double(), expected, atol=tolerance, rtol=tolerance)


def test_keys_and_values_beyond_float16_become_its_largest_number_and_a_nan_stays_one(
    backend: AttentionBackend,
) -> None:
    world = small_world(40)
    sequence = world.sequences[0]
    sequence.k[3], sequence.v[3] = 1e6, -float("inf")
    expected = replace(sequence, k=sequence.k.clamp(-65504, 65504), v=sequence.v.clamp(-65504, 65504))
    sequence.k[20] = float("nan")
    rules = AttentionRules(1e-6)
    output = world.run(backend, [[(0, 0, 40)]], rules)[0]
    rounded = replace(expected, k=expected.k.half(), v=expected.v.half())
    torch.testing.assert_close(output[:20].double(), dense_attention(rounded, rules)[:20], atol=1e-4, rtol=2e-5)
    assert output[20:].isnan().all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of x86-64's instruction sets")
@pytest.mark.parametrize("march", ["skylake-avx512", "sapphirerapids", "x86-64"])
def test_the_kernel_compiles_for_instruction_sets_that_are_not_here(
    march: str, kernels_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.kernels.build._architecture_flag", lambda: f"-march={march}")
    hardly_optimise(monkeypatch)
    try:
        assert build_library("attention", kernels_dir).exists()
    except KernelBuildError as error:
        if "no C compiler" in str(error) or "-march" in str(error):
            pytest.skip(str(error))
        raise
