"""The sampler against its definition, transformers' own filters, and itself under other batches."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.kernels.build import KernelBuildError
from engine.native_sampling import NativeSampling
from engine.sampler import Sampler, SamplingBatch
from engine.sampling_noise import gumbel_noise, row_keys
from tests.fakes.chi_square import chi_square_tail
from tests.fakes.sampling_batches import batch_of

VOCAB_SIZE = 1000


@pytest.fixture(scope="session")
def native_passes(kernels_dir: Path) -> NativeSampling:
    try:
        return NativeSampling(kernels_dir)
    except KernelBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["torch", "native"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    if request.param == "torch":
        return Sampler()
    return Sampler(request.getfixturevalue("native_passes"))


def draw(sampler: Sampler, logits: Tensor, **params: float) -> Tensor:
    """One token a row."""
    return sampler.sample(logits.clone(), batch_of(len(logits), **params))  # type: ignore[arg-type]


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE, *, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def filtered_by_transformers(
    logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Tensor:
    """Probabilities `[num_rows, vocab_size]` after temperature, min-p, top-k, top-p."""
    ids = torch.zeros((len(logits), 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, logits)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return torch.softmax(scores, dim=-1)


FILTERS = [
    {},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 300},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1e-4},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 400, "top_p": 0.95},
    {"top_k": 256, "top_p": 0.8},  # as many as the candidates: what lies outside is no part of the mass
    {"min_p": 1e-5, "top_p": 0.97},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_drawn_frequencies_match_the_exact_distribution(sampler: Sampler, params: dict[str, float]) -> None:
    logits = random_logits(1, 600, scale=2.0)
    expected = filtered_by_transformers(logits, **params)[0].double()  # type: ignore[arg-type]
    num_draws = 10_000
    tokens = draw(sampler, logits.expand(num_draws, -1), **params)
    counts = torch.bincount(tokens, minlength=600)
    assert counts[expected == 0].sum() == 0, "a token that the filters remove was drawn"
    assert chi_square_tail(counts, expected * num_draws) > 1e-4


@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_the_filters_keep_what_transformers_processors_keep(
    sampler: Sampler, params: dict[str, float], scale: float
) -> None:
    logits = random_logits(400, scale=scale, seed=5)
    allowed = filtered_by_transformers(logits, **params) > 0  # type: ignore[arg-type]
    tokens = draw(sampler, logits, **params)
    assert allowed.gather(1, tokens[:, None]).all()
    # The same maximum over what transformers keeps: a token kept too many or too few shows where the noise favours it.
    assert torch.equal(brute_force(logits, allowed, params), tokens)


def brute_force(logits: Tensor, allowed: Tensor, params: dict[str, float]) -> Tensor:
    """The Gumbel maximum over the allowed tokens, by its definition."""
    keys = row_keys(torch.zeros(len(logits), dtype=torch.int64), torch.tensor(0), torch.arange(len(logits)))
    noise = gumbel_noise(keys, torch.arange(logits.shape[1], dtype=torch.int32))
    scores = (logits - logits.amax(-1, keepdim=True)) / params.get("temperature", 1.0) + noise
    return scores.masked_fill(~allowed, float("-inf")).argmax(dim=-1)


def mixed_batch(num_rows: int) -> SamplingBatch:
    generator = torch.Generator().manual_seed(9)
    pick = torch.randint(0, 6, (num_rows,), generator=generator)
    return SamplingBatch(
        temperature=torch.where(pick == 0, 0.0, 0.5 + torch.rand(num_rows, generator=generator)),
        top_p=torch.where(pick == 1, 0.9, 1.0) * torch.where(pick == 5, 0.7, 1.0),
        top_k=torch.where(pick == 2, 50, 0) + torch.where(pick == 5, 400, 0),
        min_p=torch.where(pick == 3, 0.1, 0.0),
        seed=torch.randint(-(2**62), 2**62, (num_rows,), generator=generator),
        choice=torch.randint(0, 4, (num_rows,), generator=generator),
        position=torch.randint(0, 4096, (num_rows,), generator=generator),
    )


def test_a_row_draws_the_same_token_alone_in_any_order_and_under_any_number_of_threads(sampler: Sampler) -> None:
    logits, batch = random_logits(60, 5000, scale=2.0), mixed_batch(60)
    expected = sampler.sample(logits.clone(), batch)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    assert torch.equal(sampler.sample(logits[order], batch.select(order)), expected[order])
    for count in (1, 3, 8):
        torch.set_num_threads(count)
        for row in range(60):
            one = torch.tensor([row])
            assert sampler.sample(logits[one], batch.select(one)) == expected[row]


def test_native_passes_draw_what_torch_draws(native_passes: NativeSampling) -> None:
    for vocab_size in (1, 15, 257, 5003, 49152):
        logits, batch = random_logits(40, vocab_size, scale=2.0, seed=vocab_size), mixed_batch(40)
        assert torch.equal(Sampler(native_passes).sample(logits, batch), Sampler().sample(logits, batch))


def test_logprobs_equal_log_softmax_with_the_likeliest_in_order(sampler: Sampler) -> None:
    for vocab_size in (1, 40, 5003):
        logits = random_logits(9, vocab_size)
        logits[4] = logits[4].round()  # ties
        rows, num_top = torch.tensor([1, 4, 8, 4]), min(20, vocab_size)
        tokens = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0])
        expected = logits.double().log_softmax(-1)[rows]
        order = sorted_ids(logits[rows])[:, :num_top]
        for wanted in (0, num_top):
            found = sampler.logprobs(logits, rows, wanted)
            chosen, top_ids, top = found.of(logits, tokens), found.top_ids, found.top_logprobs
            assert torch.equal(top_ids, order[:, :wanted])
            # float32 sums of blocks of e^x: 1e-6 is some ulps of the values' size
            torch.testing.assert_close(chosen.double(), expected.gather(1, tokens[:, None])[:, 0], atol=2e-6, rtol=1e-6)
            torch.testing.assert_close(top.double(), expected.gather(1, top_ids), atol=2e-6, rtol=1e-6)
        assert chosen[order[:, 0] == tokens].tolist() == top[order[:, 0] == tokens][:, 0].tolist()


def sorted_ids(logits: Tensor) -> Tensor:
    """By falling logit, equal ones by id."""
    return logits.sort(dim=-1, descending=True, stable=True).indices


def test_a_rows_logprobs_are_the_same_to_the_bit_alone_and_under_any_number_of_threads(sampler: Sampler) -> None:
    logits = random_logits(30, 5000)
    tokens = torch.arange(30)
    together = sampler.logprobs(logits, torch.arange(30), 5)
    expected = together.of(logits, tokens)
    for count in (1, 3, 8):
        torch.set_num_threads(count)
        for row in (0, 7, 29):
            one = torch.tensor([0])
            alone = logits[row : row + 1]
            found = sampler.logprobs(alone, one, 20)
            assert torch.equal(found.of(alone, tokens[row : row + 1])[0], expected[row])
            assert torch.equal(found.top_logprobs[0, :5], together.top_logprobs[row])


def test_the_logits_are_left_as_they_were(sampler: Sampler) -> None:
    logits = random_logits(60, 500)
    copy = logits.clone()
    sampler.sample(logits, mixed_batch(60))
    assert torch.equal(logits, copy)


def test_greedy_rows_take_the_lowest_id_among_equal_logits(sampler: Sampler) -> None:
    logits = torch.zeros(3, 50)
    logits[1, [30, 7, 41]] = 2.0
    assert draw(sampler, logits, temperature=0.0).tolist() == [0, 7, 0]


def test_a_temperature_near_zero_draws_the_largest_logit(sampler: Sampler) -> None:
    logits = random_logits(50)
    assert torch.equal(draw(sampler, logits, temperature=1e-38), logits.argmax(-1))


def test_tokens_that_tie_with_the_last_one_kept_are_kept_too(sampler: Sampler) -> None:
    logits = torch.full((2000, 600), 1.0)
    for params in ({"top_k": 3}, {"top_k": 256}, {"top_k": 400}, {"top_p": 0.5}, {"min_p": 1.0}):
        assert len(draw(sampler, logits, **params).unique()) > 500


def test_a_nucleus_that_ends_among_equal_logits_keeps_all_of_them(sampler: Sampler) -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])  # the first holds 0.61 of the mass
    for top_p, num_kept in ((0.6, 1), (0.7, 5), (0.8, 5), (0.97, 7)):
        tokens = draw(sampler, logits.expand(2000, -1), top_p=top_p)
        assert sorted(set(tokens.tolist())) == list(range(num_kept))


def test_a_nucleus_of_the_whole_vocabulary_is_drawn_from_whole(sampler: Sampler) -> None:
    logits = torch.linspace(0, 1e-3, 5000).expand(1500, -1)
    tokens = draw(sampler, logits, top_p=0.9)
    assert tokens.min() >= 490, "the least probable tenth is cut"
    assert len(tokens.unique()) > 1000


def test_tokens_ruled_out_by_minus_infinity_are_never_drawn(sampler: Sampler) -> None:
    logits = torch.full((500, 300), float("-inf"))
    logits[:, 7] = 0.0
    logits[:, 9] = 0.0
    for params in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.1}):
        assert set(draw(sampler, logits, **params).tolist()) == {7, 9}


@pytest.mark.parametrize("vocab_size", [31, 320, 1000])
def test_a_masked_row_draws_among_the_tokens_whose_bit_is_set(sampler: Sampler, vocab_size: int) -> None:
    logits = random_logits(6, vocab_size)
    allowed = torch.zeros(3, -(-vocab_size // 32) * 32, dtype=torch.bool)
    allowed[0, [1, 30]] = True
    allowed[1, :vocab_size:7] = True
    allowed[2] = True
    words = np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32)
    rows = torch.tensor([4, 1, 2])
    masked = logits.clone()
    sampler.mask(masked, rows, torch.from_numpy(words))
    expected = logits.clone()
    expected[rows] = expected[rows].masked_fill(~allowed[:, :vocab_size], -torch.inf)
    assert torch.equal(masked, expected)
    every: list[dict[str, float]] = [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}]
    for params in every:
        for seed in range(20):
            tokens = draw(sampler, masked, seed=seed, **params)
            assert all(allowed[i, tokens[row]] for i, row in enumerate(rows))


def test_the_noise_differs_between_seeds_choices_positions_and_tokens() -> None:
    seeds = torch.tensor([0, 1, 0, 0, -1, 2**62])
    choices = torch.tensor([0, 0, 1, 0, 0, 0])
    positions = torch.tensor([0, 0, 0, 1, 0, 0])
    ids = torch.arange(20_000, dtype=torch.int32)
    noise = gumbel_noise(row_keys(seeds, choices, positions), ids)
    correlation = torch.corrcoef(noise)
    # Independent samples of 20,000 correlate by 0.007 in standard deviation.
    assert (correlation - torch.eye(len(seeds))).abs().max() < 0.035
    shifted = torch.corrcoef(torch.stack([noise[0][:-1], noise[0][1:]]))
    assert shifted[0, 1].abs() < 0.035


def test_the_noise_is_standard_gumbel() -> None:
    keys = row_keys(torch.arange(50), torch.tensor(0), torch.tensor(3).expand(50))
    noise = gumbel_noise(keys, torch.arange(20_000, dtype=torch.int32)).flatten()
    # A million samples: the mean lies within 0.0013 of Euler's constant in one standard deviation.
    assert abs(float(noise.mean()) - 0.5772157) < 0.006
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    assert noise.isfinite().all()


def test_the_noise_is_pinned_for_ever_because_stored_streams_resume_with_it() -> None:
    keys = row_keys(torch.tensor([0, 123456789]), torch.tensor([0, 2]), torch.tensor([0, 77]))
    noise = gumbel_noise(keys, torch.tensor([0, 1, 49151], dtype=torch.int32))
    expected = [[reference_noise(s, c, p, t) for t in (0, 1, 49151)] for s, c, p in ((0, 0, 0), (123456789, 2, 77))]
    torch.testing.assert_close(noise, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def reference_noise(seed: int, choice: int, position: int, token_id: int) -> float:
    """The same in Python's integers."""

    def mix_64(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def mix_32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    key = mix_64((seed + 0x9E3779B97F4A7C15) % 2**64)
    key = mix_64((key + (choice << 32) + position) % 2**64)
    bits = mix_32(mix_32(token_id ^ key % 2**32) ^ key >> 32)
    bits = bits - 2**32 if bits >= 2**31 else bits
    return -math.log(-math.log((bits + 2**31 + 0.5) / 2**32))
