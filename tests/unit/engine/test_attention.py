"""Every backend against attention's definition, and against itself under other batches, chunks and threads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionBackend
from engine.attention.native import NativeAttention
from engine.attention.torch_backend import TorchAttention
from engine.kernels.build import KernelBuildError
from tests.fakes.paged_batches import PagedWorld, dense_attention

SHAPES = [
    # num_heads, num_kv_heads, head_dim, block_size
    (9, 3, 64, 16),  # SmolLM2
    (4, 4, 8, 4),
    (8, 1, 80, 16),
    (6, 2, 20, 3),
    (2, 1, 256, 32),
    (1, 1, 128, 1),
]
LENGTHS = [1, 2, 17, 255, 256, 257, 600]


@pytest.fixture(scope="session")
def kernels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest, kernels_dir: Path) -> AttentionBackend:
    if request.param == "torch":
        return TorchAttention()
    try:
        return NativeAttention(kernels_dir)
    except KernelBuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def whole(world: PagedWorld) -> list[list[tuple[int, int, int]]]:
    """One step that prefills every sequence."""
    return [[(i, 0, len(sequence.q)) for i, sequence in enumerate(world.sequences)]]


def alone(world: PagedWorld) -> list[list[tuple[int, int, int]]]:
    """A step for each sequence."""
    return [[(i, 0, len(sequence.q))] for i, sequence in enumerate(world.sequences)]


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


def rules_of(name: str, num_heads: int) -> dict[str, object]:
    sinks = torch.linspace(-1, 3, num_heads)
    return {
        "plain": {},
        "window": {"sliding_window": 37},
        "wide window": {"sliding_window": 300},
        "softcap": {"softcap": 5.0},
        "sinks": {"sinks": sinks},
        "all": {"sliding_window": 100, "softcap": 20.0, "sinks": sinks, "scaling": 0.3},
    }[name]


RULES = ["plain", "window", "wide window", "softcap", "sinks", "all"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rules", RULES)
def test_attention_over_pages_equals_its_definition(
    backend: AttentionBackend, shape: tuple[int, int, int, int], rules: str, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim, block_size = shape
    world = PagedWorld.build(
        LENGTHS, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    options = {"scaling": head_dim**-0.5} | rules_of(rules, num_heads)
    outputs = world.run(backend, whole(world), **options)
    # float32: sums of a few hundred terms of size 1; bfloat16: the output's own rounding, 2^-8 relative.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for sequence, output in zip(world.sequences, outputs, strict=True):
        assert output.dtype == dtype
        expected = dense_attention(sequence, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rules", RULES)
def test_a_row_has_the_same_bits_alone_packed_chunked_and_decoded(
    backend: AttentionBackend, shape: tuple[int, int, int, int], rules: str, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim, block_size = shape
    world = PagedWorld.build(
        [1, 40, 263, 530],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    options = rules_of(rules, num_heads)
    expected = world.run(backend, whole(world), **options)
    last = [[(i, 0, len(s.q) - 1) for i, s in enumerate(world.sequences) if len(s.q) > 1]]
    decode = [[(i, len(s.q) - 1, len(s.q)) for i, s in enumerate(world.sequences)]]
    for steps in (alone(world), chunked(world, 7), chunked(world, 129), last + decode):
        assert_same_bits(expected, world.run(backend, steps, **options))


def test_decoding_token_by_token_gives_the_bits_of_one_prefill(backend: AttentionBackend) -> None:
    world = PagedWorld.build([3, 280], num_heads=9, num_kv_heads=3, head_dim=64)
    assert_same_bits(world.run(backend, whole(world)), world.run(backend, chunked(world, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_under_any_number_of_threads(
    backend: AttentionBackend, threads: None, dtype: torch.dtype
) -> None:
    world = PagedWorld.build([5, 64, 300, 700], num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    torch.set_num_threads(1)
    expected = world.run(backend, whole(world))
    for count in (2, 3, 4, 8, 16):
        torch.set_num_threads(count)
        assert_same_bits(expected, world.run(backend, chunked(world, 50)))
        assert_same_bits(expected, world.run(backend, alone(world)))


def test_queries_of_any_strides_are_read_right(backend: AttentionBackend) -> None:
    world = PagedWorld.build([30, 9], num_heads=4, num_kv_heads=2, head_dim=16)
    q, k, v, batch = world.step(whole(world)[0])
    options = {"scaling": 0.25, "sliding_window": None, "softcap": None, "sinks": None}
    expected = backend.forward(q, k, v, world.kv_cache.clone(), batch, **options)  # type: ignore[arg-type]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    cache = world.kv_cache.clone()
    torch.testing.assert_close(
        backend.forward(*strided, cache, batch, **options),  # type: ignore[arg-type]
        expected,
        atol=0,
        rtol=0,
    )


def assert_same_bits(expected: list[Tensor], outputs: list[Tensor]) -> None:
    for row, (a, b) in enumerate(zip(expected, outputs, strict=True)):
        assert torch.equal(a, b), f"sequence {row}: {int((a != b).sum())} of {a.numel()} values differ"
