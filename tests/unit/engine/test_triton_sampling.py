"""The Triton sampler draws the torch sampler's tokens; masks and penalties change the logits to the same bits."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine import triton_sampling
from engine.kernels.triton.sampling import MARGIN, gumbel, near_gumbel
from engine.logit_editor import LogitEditor, undo
from engine.sampler import Sampler, SamplingBatch
from engine.step_plan import BAD_LOGITS
from engine.triton_sampling import TritonLogitEditor, TritonSampler
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.kernel_device import KERNEL_DEVICE, poisoned_memory
from tests.fakes.sampling_batches import batch_of, random_batch

speed_up_interpreter()
# NumPy warns where integers wrap, and of NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_sampling, "_CHUNK", 512)
    monkeypatch.setattr(triton_sampling, "_BLOCK", 256)
    monkeypatch.setattr(triton_sampling, "_FILTER_BLOCK", 256)
    with poisoned_memory():
        yield


def random_logits(num_rows: int, vocab_size: int, *, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    moved = batch.to(KERNEL_DEVICE)
    return TritonSampler().sample(logits.to(KERNEL_DEVICE), moved).cpu()


@pytest.mark.parametrize(
    ("vocab_size", "scale", "num_rows", "room"),  # room for a whole row, for some of it, or for next to nothing
    [
        (1, 3.0, 8, 9),
        (15, 0.1, 32, 99),
        (257, 0.1, 16, 64),
        (257, 3.0, 32, 64),
        (1100, 0.1, 16, 8),
        (1100, 3.0, 16, 99),
    ],
)
def test_the_tokens_are_those_that_torch_draws(
    vocab_size: int, scale: float, num_rows: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_sampling, "_ROOM", room)
    logits, batch = random_logits(num_rows, vocab_size, scale=scale), random_batch(num_rows, seed=9)
    expected = Sampler().sample(logits.clone(), batch)
    copy = logits.clone()
    assert torch.equal(sample(logits, batch), expected)
    assert torch.equal(logits, copy), "the logits are left as they were"


@pytest.mark.parametrize(("scale", "room"), [(0.05, 2048), (0.3, 30), (2.0, 30)])
def test_exactly_as_many_tokens_are_kept_as_are_asked_for(
    scale: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_sampling, "_ROOM", room)
    monkeypatch.setattr(triton_sampling, "_FILTER_BLOCK", 512)
    logits = random_logits(1, 1500, scale=scale).expand(48, -1)
    batch = batch_of(48)
    batch.top_k = torch.arange(1, 49) * 31
    assert num_kept(logits, batch).tolist() == batch.top_k.tolist()
    batch = batch_of(48)
    batch.top_p = (torch.arange(48) + 0.5) / 48
    weights = logits[:1].double().sub(logits.max()).exp().sort(descending=True).values
    before = (weights.cumsum(1) - weights) / weights.sum()
    assert num_kept(logits, batch).tolist() == (before < batch.top_p[:, None]).sum(dim=1).tolist()


def num_kept(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Tokens of each row that are not below its threshold."""
    device_logits, moved = logits.to(KERNEL_DEVICE).contiguous(), batch.to(KERNEL_DEVICE)
    thresholds = triton_sampling._thresholds(device_logits, chunk_maxima(device_logits), moved).cpu()
    bits = (logits - logits.max(dim=1, keepdim=True).values + 0.0).contiguous().view(torch.int32)
    orders = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (orders >= thresholds[:, None]).sum(dim=1)


def chunk_maxima(logits: Tensor) -> Tensor:
    return torch.stack([chunk.max(dim=1).values for chunk in torch.split(logits, triton_sampling._CHUNK, dim=1)], dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("room", [64, 9])
def test_logits_in_16_bits_are_widened_as_they_are_read(
    dtype: torch.dtype, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_sampling, "_ROOM", room)
    logits, batch = random_logits(16, 257).to(dtype), random_batch(16, seed=4)
    tokens = sample(logits, batch)
    assert tokens.equal(Sampler().sample(logits.float(), batch))
    logits[3, tokens[3]] = float("inf")
    logits[5, 0] = float("nan")
    settled = tokens.clone().to(KERNEL_DEVICE)
    TritonSampler().settle(logits.to(KERNEL_DEVICE), settled)
    assert (settled.cpu() == BAD_LOGITS).nonzero()[:, 0].tolist() == [3, 5]


@pytest.mark.parametrize("temperature", [1e-30, 0.05, 30.0])
def test_thresholds_are_found_at_any_temperature(temperature: float) -> None:
    logits, batch = random_logits(8, 700), random_batch(8, seed=4)
    batch.temperature = torch.full((8,), temperature)
    assert torch.equal(sample(logits, batch), Sampler().sample(logits.clone(), batch))


def test_what_the_host_knows_of_the_rows_spares_kernels_and_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(4, 600)
    greedy, drawn = batch_of(4, temperature=0.0), batch_of(4, temperature=0.8, min_p=0.01)
    expected = [sample(logits, batch) for batch in (greedy, drawn)]
    assert expected[0].tolist() == logits.argmax(dim=1).tolist()
    with monkeypatch.context() as patched:
        patched.setattr(triton_sampling, "_thresholds", None)
        drawn.may_cut = False
        assert torch.equal(sample(logits, drawn), expected[1])
        patched.setattr(triton_sampling, "draw_kernel", None)
        greedy.may_draw = False
        assert torch.equal(sample(logits, greedy), expected[0])


@triton.jit
def _noise_kernel(bits_ptr, near_ptr, exact_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + places)
    tl.store(near_ptr + places, near_gumbel(bits))
    tl.store(exact_ptr + places, gumbel(bits))


def test_noise_in_float32_is_within_a_tenth_of_the_margin_of_the_noise_that_counts() -> None:
    edges = [start + step for start in (-(2**31), -(2**24), -1, 2**20, 2**31 - 4096) for step in range(1024)]
    anywhere = torch.randint(-(2**31), 2**31, (8192 - len(edges),), generator=torch.Generator().manual_seed(5))
    bits = torch.cat([torch.tensor(edges), anywhere]).to(torch.int32)
    bits[-1] = 2**31 - 1
    near, exact = torch.empty(8192, device=KERNEL_DEVICE), torch.empty(8192, dtype=torch.float64, device=KERNEL_DEVICE)
    _noise_kernel[(1,)](bits.to(KERNEL_DEVICE), near, exact, BLOCK=8192)
    difference = (near.double() - exact).abs().max()
    assert difference < MARGIN.value / 10 and exact.max() > 22


def test_ties_with_the_last_one_kept_are_kept_and_greedy_rows_take_the_lowest_id() -> None:
    logits = random_logits(32, 700).round()
    logits[8, 50:] = 1.5
    batch = random_batch(32, seed=9)
    assert torch.equal(sample(logits, batch), Sampler().sample(logits.clone(), batch))


def test_a_row_draws_the_same_token_alone_and_out_of_wider_rows() -> None:
    logits, batch = random_logits(9, 600), random_batch(9, seed=9)
    expected = sample(logits, batch)
    wide = torch.full((9, 700), float("nan"))
    wide[:, :600] = logits
    assert torch.equal(sample(wide[:, :600], batch), expected)
    for row in (0, 3, 5, 8):
        one = torch.tensor([row])
        assert sample(logits[one], batch.select(one)) == expected[row]


def test_minus_infinity_is_never_drawn_and_a_row_of_nan_gives_some_token() -> None:
    logits = torch.full((16, 300), float("-inf"))
    logits[:, [7, 9]] = 0.0
    logits[3] = float("nan")
    tokens = sample(logits, random_batch(16, seed=9)).tolist()
    assert set(tokens[:3] + tokens[4:]) <= {7, 9} and 0 <= tokens[3] < 300


def test_a_row_is_settled_as_in_torch() -> None:
    logits = random_logits(300, 50)
    tokens = torch.arange(300) % 50
    for row, place, value in ((3, 0, "nan"), (9, 0, "inf"), (20, 20, "nan"), (21, 21, "-inf"), (299, 49, "inf")):
        logits[row, place] = float(value)
    logits[77, 0] = -float("inf")  # as a mask makes it
    settled = tokens.clone().to(KERNEL_DEVICE)
    TritonSampler().settle(logits.to(KERNEL_DEVICE), settled)
    Sampler().settle(logits, tokens)
    assert torch.equal(settled.cpu(), tokens) and (tokens < 0).nonzero()[:, 0].tolist() == [3, 9, 20, 21, 299]


def test_a_row_with_nan_writes_into_no_other_rows_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sampling, "_ROOM", 64)
    logits, batch = random_logits(8, 600), batch_of(8, top_p=0.5)
    expected = sample(logits, batch)
    logits[:7:2, 40:] = float("nan")
    tokens = sample(logits, batch)
    assert torch.equal(tokens[1::2], expected[1::2])


@pytest.mark.parametrize("vocab_size", [31, 320, 1000])
def test_a_mask_hides_the_tokens_whose_bit_is_not_set(vocab_size: int) -> None:
    logits = random_logits(6, vocab_size)
    allowed = torch.rand(3, -(-vocab_size // 32) * 32, generator=torch.Generator().manual_seed(1)) < 0.3
    bits = torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32))
    rows = torch.tensor([4, 1, 2])
    expected = logits.clone()
    Sampler().mask(expected, rows, bits)
    masked = logits.clone().to(KERNEL_DEVICE)
    TritonSampler().mask(masked, rows.to(KERNEL_DEVICE), bits.to(KERNEL_DEVICE))
    assert torch.equal(masked.cpu(), expected)


def test_penalties_change_the_logits_to_torchs_bits_and_back() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = random_logits(5, 900)
    owners = torch.arange(3).repeat_interleave(300)
    entries = [
        torch.tensor([4, 0, 2]),
        1 + torch.rand(3, generator=generator),
        torch.rand(3, generator=generator) - 0.5,
        torch.rand(3, generator=generator),
        owners,
        torch.cat([torch.randperm(900, generator=generator)[:300] for _ in range(3)]),
        torch.randint(0, 9, (900,), generator=generator).float(),
    ]
    nothing = torch.zeros(0, dtype=torch.int64)
    edits = [nothing, nothing, torch.zeros(0), *entries, nothing, nothing]
    expected = logits.clone()
    LogitEditor(*edits).apply(expected)
    changed = logits.clone().to(KERNEL_DEVICE)
    saved = TritonLogitEditor(*(edit.to(KERNEL_DEVICE) for edit in edits)).apply(changed)
    assert torch.equal(changed.cpu(), expected) and not torch.equal(expected, logits)
    undo(changed, saved)
    assert torch.equal(changed.cpu(), logits)
