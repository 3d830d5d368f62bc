"""The Triton kernels against attention's definition, the torch twin, and themselves under other batches and chunks.

Splits and tiles are made small, so that short sequences have many: the interpreter takes milliseconds for each tile.
"""

import math
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import self_check, triton_backend
from engine.attention.base import AttentionRules
from engine.attention.select import select_backend
from engine.attention.self_check import find_fault
from engine.attention.torch_backend import TorchAttention
from engine.attention.triton_backend import TritonAttention, choose_split
from engine.errors import InvalidRequestError
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.kernel_device import KERNEL_DEVICE, OnKernelDevice, poisoned_memory
from tests.fakes.paged_batches import PagedWorld, dense_attention

speed_up_interpreter()
# NumPy warns where integers wrap and exponentials are infinite, as they are meant to.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# float32: sums of some terms of size 1. Else the weights' and the output's rounding, of values of size up to 4.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [
    # num_heads, num_kv_heads, head_dim, block_size
    (9, 3, 64, 16),
    (8, 1, 80, 16),
    (6, 2, 20, 3),
    (2, 1, 256, 32),
    (20, 1, 96, 5),  # more heads than the smallest tile has rows
    (1, 1, 128, 1),
]
SINKS = torch.linspace(-1, 3, 20)
LENGTHS = [1, 16, 33, 70]


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_backend, "SPLIT", 32)
    monkeypatch.setattr(triton_backend, "_TILE_KEYS", 16)
    monkeypatch.setattr(self_check, "_LENGTHS", {"cpu": [40, 17], "cuda": [600, 17]})
    with poisoned_memory():
        yield


def rules_of(name: str, shape: tuple[int, int, int, int]) -> AttentionRules:
    sinks, scaling = SINKS[: shape[0]], shape[2] ** -0.5
    return {
        "plain": AttentionRules(scaling),
        "window": AttentionRules(scaling, sliding_window=21),
        "softcap": AttentionRules(scaling, softcap=5.0),
        "sinks": AttentionRules(scaling, sinks=sinks),
        "all": AttentionRules(0.3, sliding_window=40, softcap=20.0, sinks=sinks),
    }[name]


def build(shape: tuple[int, int, int, int], dtype: torch.dtype, lengths: list[int] = LENGTHS) -> PagedWorld:
    return PagedWorld.build(lengths, *shape, dtype=dtype)


# Every shape under all rules at once, in bfloat16 and in one of the others; each rule alone.
CASES = [
    *((shape, "all", torch.bfloat16) for shape in SHAPES),
    *((shape, "all", (torch.float32, torch.float16)[at % 2]) for at, shape in enumerate(SHAPES)),
    *((SHAPES[2], rules, torch.float32) for rules in ("plain", "window", "softcap", "sinks")),
]


@pytest.mark.parametrize(("shape", "rules", "dtype"), CASES)
def test_prefill_and_decode_equal_attentions_definition(
    shape: tuple[int, int, int, int], rules: str, dtype: torch.dtype
) -> None:
    world = build(shape, dtype)
    options = rules_of(rules, shape)
    outputs = world.run(OnKernelDevice(TritonAttention()), world.decoded(), options)
    for sequence, output in zip(world.sequences, outputs, strict=True):
        assert output.dtype == dtype
        expected = dense_attention(sequence, options)
        torch.testing.assert_close(output.double(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_step_equals_the_torch_twin(dtype: torch.dtype) -> None:
    world = build((6, 2, 48, 4), dtype, [40, 5, 70, 23])
    options = rules_of("all", SHAPES[2])
    steps = [[(0, 0, 39), (2, 0, 30)], [(0, 39, 40), (2, 30, 70), (1, 0, 5), (3, 0, 23)]]
    expected = world.run(TorchAttention(), steps, options)
    for a, b in zip(expected, world.run(OnKernelDevice(TritonAttention()), steps, options), strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rules", ["plain", "all"])
def test_a_row_has_the_same_bits_alone_packed_chunked_and_decoded_where_it_is_promised(
    rules: str, dtype: torch.dtype
) -> None:
    world = build(SHAPES[2], dtype, [1, 20, 45])
    backend, options = OnKernelDevice(TritonAttention(deterministic=True)), rules_of(rules, SHAPES[2])
    expected = world.run(backend, world.whole(), options)
    chunks = [[(1, 0, 7), (2, 0, 33)], [(1, 7, 20), (0, 0, 1)], [(2, 33, 44)], [(2, 44, 45)]]
    for steps in (world.alone(), chunks, world.decoded()):
        for a, b in zip(expected, world.run(backend, steps, options), strict=True):
            assert torch.equal(a, b)


def test_a_step_that_says_how_many_decodes_lead_computes_the_same() -> None:
    world = build(SHAPES[2], torch.float32, [40, 9, 30])
    first, second = [(0, 0, 39), (1, 0, 8)], [(0, 39, 40), (1, 8, 9), (2, 0, 30)]
    backend = OnKernelDevice(TritonAttention())
    outputs = []
    for num_decodes in (0, 1, 2):
        for parts in (first, second):
            q, k, v, batch = world.step(parts)
            batch.num_decodes = num_decodes if parts is second else 0
            output = backend.forward(q, k, v, world.kv_cache, batch, AttentionRules(0.2))
        outputs.append(output)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("is_deterministic", "num_padding"), [(False, 21), (True, 21), (False, 1), (False, 0)])
def test_a_graphs_step_finds_its_decodes_itself_and_gives_them_the_bits_of_a_step_of_decodes(
    is_deterministic: bool, num_padding: int
) -> None:
    world = build(SHAPES[2], torch.float32, [40, 9, 70, 30])
    backend = OnKernelDevice(TritonAttention(deterministic=is_deterministic))
    rules = AttentionRules(0.2, sliding_window=60)

    def run(parts: list[tuple[int, int, int]], *, is_open: bool) -> Tensor:
        """The last step's output, behind a prefill; an open one ends in a sequence whose tokens are padding."""
        for step in ([(0, 0, 39), (1, 0, 8), (2, 0, 69)], parts):
            q, k, v, batch = world.step(step)
            if step is parts and is_open:
                batch.is_open = True
                batch.num_seqs += 1
                batch.num_tokens += num_padding
                batch.query_start = torch.cat([batch.query_start, batch.query_start[-1:] + num_padding])
                batch.context_lens = torch.cat([batch.context_lens, torch.zeros(1, dtype=torch.int32)])
                batch.block_tables = torch.cat([batch.block_tables, batch.block_tables[:1]])
                batch.slot_mapping = torch.cat([batch.slot_mapping, torch.full((num_padding,), -1)])
                q, k, v = (torch.cat([x, x[:num_padding]]) for x in (q, k, v))
            output = backend.forward(q, k, v, world.kv_cache, batch, rules)
        return output

    mixed = run([(0, 39, 40), (3, 0, 30), (1, 8, 9), (2, 69, 70)], is_open=True)
    decodes = run([(0, 39, 40), (1, 8, 9), (2, 69, 70)], is_open=False)
    assert torch.equal(mixed[[0, 31, 32]], decodes)
    torch.testing.assert_close(mixed[1:31].double(), dense_attention(world.sequences[3], rules), atol=2e-5, rtol=0)
    assert torch.equal(mixed[33:], torch.zeros_like(mixed[:num_padding]))


@pytest.mark.parametrize("is_open", [False, True])
def test_where_their_splits_would_take_much_memory_decodes_take_turns_and_keep_their_bits(
    is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build(SHAPES[2], torch.float32, [40, 9, 70])
    parts_bytes: list[int] = []
    merge = triton_backend._merge

    def note(parts: Tensor, *args: Any, **options: Any) -> None:
        parts_bytes.append(4 * parts.numel())
        merge(parts, *args, **options)

    monkeypatch.setattr(triton_backend, "_merge", note)
    backend, steps = OnKernelDevice(TritonAttention()), world.decoded()

    def attend() -> Tensor:
        for step in steps:
            q, k, v, batch = world.step(step)
            batch.is_open = is_open and step is steps[1]
            output = backend.forward(q, k, v, world.kv_cache, batch, AttentionRules(0.2))
        return output

    together = attend()
    of_all = parts_bytes.pop()
    monkeypatch.setattr(triton_backend, "_TURN_STEP", 1)
    monkeypatch.setattr(triton_backend, "_MOST_PART_BYTES", of_all * 2 // 3)
    assert torch.equal(attend(), together)
    assert parts_bytes == [of_all * 2 // 3, of_all // 3]


def test_the_splits_of_few_sequences_are_smaller() -> None:
    assert triton_backend.SPLIT == 32, "as this file sets it"
    sizes = {programs: choose_split(programs, 64, least=8) for programs in (1, 64, 65, 128, 129)}
    assert sizes == {1: 8, 64: 8, 65: 16, 128: 16, 129: 32}
    assert choose_split(1, 64, least=16) == 16 and choose_split(1, 15, least=8) == 32, "all keys are one split"


def test_many_sequences_of_some_length_are_not_split() -> None:
    assert triton_backend.SPLIT == 32, "as this file sets it"
    assert choose_split(512, 64, least=8) == 64
    assert choose_split(511, 64, least=8) == 32 and choose_split(512, 65, least=8) == 32


def test_decodes_of_many_sequences_take_larger_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_TILE_KEYS", 32)
    monkeypatch.setattr(triton_backend, "_TILE_BYTES", 16 * 32 * 4)  # of 16 keys
    world = build((4, 2, 32, 8), torch.float32, [40, 60])
    tiles: list[int] = []
    constants = triton_backend._constants

    def note_tile(*args: Any, **kwargs: Any) -> dict[str, Any]:
        tiles.append(constants(*args, **kwargs)["BLOCK_N"])
        return constants(*args, **kwargs)

    monkeypatch.setattr(triton_backend, "_constants", note_tile)
    for most in (5, 4):  # programs: two sequences of two heads
        monkeypatch.setattr(triton_backend, "_MANY_PROGRAMS", most)
        outputs = world.run(OnKernelDevice(TritonAttention()), world.decoded(), AttentionRules(0.2))
        for sequence, output in zip(world.sequences, outputs, strict=True):
            expected = dense_attention(sequence, AttentionRules(0.2))
            torch.testing.assert_close(output.double(), expected, atol=2e-5, rtol=0)
    assert 32 in tiles and set(tiles) == {16, 32}


def test_a_sequence_that_went_bad_harms_only_itself() -> None:
    world = build((4, 2, 32, 8), torch.float32, [40, 60])
    backend = OnKernelDevice(TritonAttention())
    expected = world.run(backend, world.decoded())
    world.sequences[1].k[7] = float("nan")
    outputs = world.run(backend, world.decoded())
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1][:7], expected[1][:7])
    assert outputs[1][7:].isnan().all(), "a bad key shows, it is not passed over"


def far_pages(shape: tuple[int, ...]) -> Tensor:
    """bfloat16; on a CPU memory that is taken where it is touched alone."""
    if KERNEL_DEVICE.type == "cuda":
        return torch.empty(shape, dtype=torch.bfloat16, device=KERNEL_DEVICE)
    linux_map_noreserve = 0x4000  # Python has it from 3.13 on
    try:
        memory = mmap.mmap(-1, 2 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | linux_map_noreserve)
    except OSError as error:
        pytest.skip(f"there is no room for so many addresses: {error}")
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)


def test_pages_may_lie_further_than_32_bits_count() -> None:
    """A layer of a large GPU's cache has more elements than that."""
    num_kv_heads, head_dim, block_size = 2, 64, 16
    num_blocks = (1 << 31) // (block_size * num_kv_heads * head_dim) + 5
    world = PagedWorld.build([40], 4, num_kv_heads, head_dim, block_size, dtype=torch.bfloat16)
    world.sequences[0].blocks = [num_blocks - 1, 0, num_blocks - 3]
    world.kv_cache = far_pages((2, num_blocks, block_size, num_kv_heads, head_dim))
    rules = AttentionRules(head_dim**-0.5)
    outputs = []
    for parts in ([(0, 0, 39)], [(0, 39, 40)]):
        q, k, v, batch = world.step(parts)
        outputs.append(OnKernelDevice(TritonAttention()).forward(q, k, v, world.kv_cache, batch, rules))
    expected = dense_attention(world.sequences[0], rules)
    torch.testing.assert_close(torch.cat(outputs).double(), expected, atol=TOLERANCES[torch.bfloat16], rtol=3e-2)


def test_padding_is_not_written_and_comes_out_as_zeros() -> None:
    world = build((4, 2, 32, 8), torch.float32, [5, 6])
    q, k, v, batch = world.step([(0, 4, 5), (1, 5, 6)])
    batch.context_lens[1] = 0
    batch.slot_mapping[1] = -1
    cache = torch.zeros_like(world.kv_cache)
    output = OnKernelDevice(TritonAttention()).forward(q, k, v, cache, batch, AttentionRules(1.0))
    assert output[0].any() and not output[1].any()
    assert int(cache.ne(0).any(-1).sum()) == 2 * 2, "one token's keys and values in two heads"


def test_queries_of_any_strides_are_read_right() -> None:
    world = build((4, 2, 16, 4), torch.float32, [30, 9])

    def strided(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    backend = OnKernelDevice(TritonAttention())
    expected = world.run(backend, world.whole())
    for sequence in world.sequences:
        sequence.q, sequence.k, sequence.v = map(strided, (sequence.q, sequence.k, sequence.v))
    for a, b in zip(expected, world.run(backend, world.whole()), strict=True):
        assert torch.equal(a, b)


def test_the_self_check_finds_no_fault_in_it_and_one_in_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TritonAttention()
    assert find_fault(backend, torch.bfloat16, device=KERNEL_DEVICE) is None
    right = TritonAttention.attend
    monkeypatch.setattr(TritonAttention, "attend", lambda self, *args: right(self, *args) * 1.1)
    fault = find_fault(backend, torch.bfloat16, device=KERNEL_DEVICE)
    assert fault is not None and "differs from its torch twin" in fault


def test_it_is_taken_by_name_where_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    options = {"device": KERNEL_DEVICE, "dtype": torch.bfloat16, "cache_dir": tmp_path}
    assert select_backend("triton", **options).name == "triton"  # type: ignore[arg-type]
    monkeypatch.setattr("engine.attention.select._runs_triton", lambda device: "there is no CUDA device")
    with pytest.raises(InvalidRequestError, match="'triton' does not work here: there is no CUDA device"):
        select_backend("triton", **options)  # type: ignore[arg-type]
