"""Every backend against attention's definition, and against itself under other batches, chunks and threads."""

from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionRules
from engine.attention.native import NativeAttention
from engine.attention.select import select_backend
from engine.attention.torch_backend import TorchAttention
from engine.errors import InvalidRequestError
from engine.kernels import build
from engine.kernels.build import KernelBuildError, build_library
from engine.kernels.cpu_features import cpu_flags
from tests.fakes.paged_batches import PagedWorld, dense_attention

Shape: TypeAlias = tuple[int, int, int, int]
"""num_heads, num_kv_heads, head_dim, block_size"""

SHAPES: list[Shape] = [
    (9, 3, 64, 16),  # SmolLM2
    (4, 4, 8, 4),
    (8, 1, 80, 16),
    (6, 2, 20, 3),
    (2, 1, 256, 32),
    (1, 1, 128, 1),
]
LENGTHS = [1, 2, 17, 255, 256, 257, 600]
# Of queries and outputs; of keys and values in the cache.
FORMATS = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float32, torch.bfloat16, id="float32 over bfloat16"),
    pytest.param(torch.float32, torch.float16, id="float32 over float16"),
    pytest.param(torch.float32, torch.int8, id="float32 over int8"),
    pytest.param(torch.bfloat16, torch.int8, id="bfloat16 over int8"),
]

# Over int8 the kernel rounds queries of size 8 to 16 bits, by 2^-13 at most: scores by some 2^-12, and so weights, of
# values of size 4.
INT8_ATOL = 2e-3


def chunked(world: PagedWorld, size: int) -> list[list[tuple[int, int, int]]]:
    """Steps of `size` tokens of each sequence that has some left."""
    longest = max(len(sequence.q) for sequence in world.sequences)
    return [
        [
            (i, first, min(first + size, len(sequence.q)))
            for i, sequence in enumerate(world.sequences)
            if first < len(sequence.q)
        ]
        for first in range(0, longest, size)
    ]


def rules_of(name: str, shape: Shape) -> AttentionRules:
    sinks, scaling = torch.linspace(-1, 3, shape[0]), shape[2] ** -0.5
    return {
        "plain": AttentionRules(scaling),
        "window": AttentionRules(scaling, sliding_window=37),
        "wide window": AttentionRules(scaling, sliding_window=300),
        "softcap": AttentionRules(scaling, softcap=5.0),
        "sinks": AttentionRules(scaling, sinks=sinks),
        "all": AttentionRules(0.3, sliding_window=100, softcap=20.0, sinks=sinks),
    }[name]


def cases(*rules: str) -> list[tuple[tuple[int, int, int, int], str]]:
    """Every shape under all rules at once, and each rule alone on a usual shape and on an odd one."""
    return [(shape, "all") for shape in SHAPES] + [(SHAPES[at], rule) for rule in rules for at in (0, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rules"), cases("plain", "window", "wide window", "softcap", "sinks"))
def test_attention_over_pages_equals_its_definition(
    backend: AttentionBackend, shape: Shape, rules: str, dtype: torch.dtype
) -> None:
    world = PagedWorld.build(LENGTHS, *shape, dtype=dtype)
    options = rules_of(rules, shape)
    outputs = world.run(backend, world.whole(), options)
    # float32: sums of a few hundred terms of size 1; bfloat16: the output's own rounding, 2^-8 relative.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for sequence, output in zip(world.sequences, outputs, strict=True):
        assert output.dtype == dtype
        expected = dense_attention(sequence, options)
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
@pytest.mark.parametrize(("shape", "rules"), cases("plain", "window"))
def test_a_row_has_the_same_bits_alone_packed_chunked_and_decoded(
    backend: AttentionBackend,
    shape: Shape,
    rules: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> None:
    world = PagedWorld.build([1, 40, 263, 530], *shape, dtype=dtype, kv_dtype=kv_dtype)
    options = rules_of(rules, shape)
    expected = world.run(backend, world.whole(), options)
    for steps in (world.alone(), chunked(world, 23), chunked(world, 129), world.decoded()):
        assert_same_bits(expected, world.run(backend, steps, options))


def test_decoding_token_by_token_gives_the_bits_of_one_prefill(backend: AttentionBackend) -> None:
    world = PagedWorld.build([3, 280], num_heads=9, num_kv_heads=3, head_dim=64)
    assert_same_bits(world.run(backend, world.whole()), world.run(backend, chunked(world, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_under_any_number_of_threads(backend: AttentionBackend, dtype: torch.dtype) -> None:
    world = PagedWorld.build([5, 64, 300, 420], num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    expected = world.run(backend, world.whole())
    for count in (2, 3, 16):
        torch.set_num_threads(count)
        assert_same_bits(expected, world.run(backend, chunked(world, 150)))


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_native_kernel_equals_its_torch_twin(
    native: NativeAttention, shape: Shape, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    world = PagedWorld.build([1, 31, 300], *shape, dtype=dtype, kv_dtype=kv_dtype)
    options = rules_of("all", shape)
    expected = world.run(TorchAttention(), chunked(world, 40), options)
    # A CPU with products of bfloat16 rounds weights to it, by 2^-9 at most, of values of size 2.
    rounds_weights = dtype == torch.bfloat16 and "avx512_bf16" in cpu_flags()
    for a, b in zip(expected, world.run(native, chunked(world, 40), options), strict=True):
        # Both sum in float32, scores of size 10 among it; in bfloat16 that may tip a rounding, which is 2^-8 relative.
        rtol = 1e-5 if dtype == torch.float32 else 2**-7
        atol = INT8_ATOL if kv_dtype == torch.int8 else 2**-8 if rounds_weights else 2e-5
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


@pytest.mark.skipif(not {"avx2", "fma"} <= cpu_flags(), reason="needs a CPU with AVX2")
# Haswell's are those of a CPU without AVX512.
@pytest.mark.parametrize("architecture", [*(["haswell"] if "avx512f" in cpu_flags() else []), "x86-64-v2"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_narrower_vectors_compute_the_same(
    native: NativeAttention,
    architecture: str,
    kv_dtype: torch.dtype,
    kernels_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.kernels.build._architecture_flag", lambda: f"-march={architecture}")
    narrow = NativeAttention(kernels_dir)
    for shape in SHAPES:
        world = PagedWorld.build([1, 31, 300], *shape, kv_dtype=kv_dtype)
        options = rules_of("all", shape)
        expected = world.run(native, chunked(world, 40), options)
        outputs = world.run(narrow, chunked(world, 40), options)
        if architecture == "haswell":  # both fuse multiply and add
            assert_same_bits(expected, outputs)
        # Over int8 weights are rounded to 16 bits, of values of size 4: other exponentials tip some roundings.
        atol = 2e-4 if kv_dtype == torch.int8 else 2e-5
        for a, b in zip(expected, outputs, strict=True):
            torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("block_size", [16, 5])
def test_a_sequence_that_went_bad_harms_only_itself(
    backend: AttentionBackend, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
) -> None:
    world = PagedWorld.build([40, 300], 4, 2, 32, block_size, dtype=dtype, kv_dtype=kv_dtype)
    expected = world.run(backend, chunked(world, 64))
    bad = world.sequences[1]
    bad.v[290, 1, 3] = float("nan")
    outputs = world.run(backend, chunked(world, 64))
    assert not outputs[1][290:, 2:].isfinite().all(-1).any(), "a bad value shows"
    bad.k[7] = float("nan")
    outputs = world.run(backend, chunked(world, 64))
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1][:7], expected[1][:7])
    assert outputs[1][7:].isnan().all(), "a bad key shows, it is not passed over"


def test_a_shared_prefix_is_read_by_both_sequences_in_the_step_that_writes_it(backend: AttentionBackend) -> None:
    world = PagedWorld.build([32, 40], num_heads=4, num_kv_heads=2, head_dim=32)
    first, second = world.sequences
    second.k[:32], second.v[:32] = first.k, first.v
    expected = world.run(backend, [[(1, 0, 40)]])[1][32:]
    second.blocks[:2] = first.blocks
    assert torch.equal(world.run(backend, [[(0, 0, 32), (1, 32, 40)]])[1][32:], expected)


def test_queries_of_any_strides_are_read_right(backend: AttentionBackend) -> None:
    world = PagedWorld.build([30, 9], num_heads=4, num_kv_heads=2, head_dim=16)
    q, k, v, batch = world.step(world.whole()[0])
    rules = AttentionRules(0.25)
    expected = backend.forward(q, k, v, world.kv_cache.clone(), batch, rules)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    cache = world.kv_cache.clone()
    assert torch.equal(backend.forward(q, k, v, cache, batch, rules), expected)


def assert_same_bits(expected: list[Tensor], outputs: list[Tensor]) -> None:
    for row, (a, b) in enumerate(zip(expected, outputs, strict=True)):
        assert torch.equal(a, b), f"sequence {row}: {int((a != b).sum())} of {a.numel()} values differ"


def test_auto_is_native_on_a_cpu_that_compiles_it(native: NativeAttention, kernels_dir: Path) -> None:
    cpu = torch.device("cpu")
    backend = select_backend("auto", device=cpu, dtype=torch.float32, cache_dir=kernels_dir.parent)
    assert backend.name == "native"
    assert select_backend("auto", device=cpu, dtype=torch.float16, cache_dir=kernels_dir.parent).name == "torch"
    assert select_backend("torch", device=cpu, dtype=torch.float32, cache_dir=kernels_dir.parent).name == "torch"


def test_without_a_compiler_auto_falls_back_to_torch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.kernels.build.shutil.which", lambda name: None)
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "cache_dir": tmp_path}
    assert select_backend("auto", **options).name == "torch"
    assert "no C compiler" in caplog.text
    with pytest.raises(InvalidRequestError, match="attention 'native' does not work here: no C compiler"):
        select_backend("native", **options)


def test_a_kernel_that_computes_wrongly_is_not_used(
    native: NativeAttention, kernels_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*args: Any, **options: Any) -> Tensor:
        return native_forward(*args, **options) * 1.01

    native_forward = native.forward
    monkeypatch.setattr(NativeAttention, "forward", lambda self, *args, **options: wrong(*args, **options))
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "cache_dir": kernels_dir.parent}
    assert select_backend("auto", **options).name == "torch"
    assert "differs from its torch twin" in caplog.text


@pytest.mark.parametrize(
    ("machine", "features", "flag"),
    [
        ("x86_64", {"avx2"}, "-march=native"),
        ("aarch64", {"asimd", "asimddp", "sve2", "sha3"}, "-march=armv8.2-a+dotprod"),
        ("aarch64", {"asimd"}, "-march=armv8-a"),
    ],
)
def test_on_arm_the_kernels_are_compiled_for_what_they_use_whatever_the_compiler_calls_native(
    machine: str, features: set[str], flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.kernels.build.platform.machine", lambda: machine)
    monkeypatch.setattr("engine.kernels.build.cpu_flags", lambda: frozenset(features))
    assert build._architecture_flag() == flag


def test_on_macos_the_compiler_is_asked_for_openmp_in_the_way_that_apples_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$0.arguments"\n'
        'for argument; do [ "$last" = -o ] && : > "$argument"; last=$argument; done\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("engine.kernels.build._is_macos", lambda: True)
    build_library("matmul", tmp_path / "kernels")
    arguments = Path(f"{compiler}.arguments").read_text().splitlines()
    assert arguments[arguments.index("-fopenmp") - 1] == "-Xclang", "its driver refuses -fopenmp"
    assert arguments[arguments.index("dynamic_lookup") - 2 :][:3] == ["-undefined", "-Xlinker", "dynamic_lookup"]
    assert "-lomp" not in arguments, "it has no library of OpenMP"


def test_a_build_is_reused_and_a_failed_one_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        path = build_library("matmul", tmp_path)
    except KernelBuildError as error:
        pytest.skip(str(error))
    built = path.stat().st_mtime_ns
    assert build_library("matmul", tmp_path) == path
    assert path.stat().st_mtime_ns == built
    monkeypatch.setattr("engine.kernels.build._FLAGS", ("-no-such-flag", "-lm"))
    with pytest.raises(KernelBuildError, match=r"cannot compile matmul\.c"):
        build_library("matmul", tmp_path)
    assert list(tmp_path.iterdir()) == [path]
