"""What lies above some fixed steps below a row's maximum: between two of these is a row's threshold."""

import triton
import triton.language as tl

from engine.kernels.triton.sampling import LOWEST, load_scaled, ordered_bits, row_maximum


@triton.jit
def has_threshold(temperature, top_p, top_k, vocab_size):
    return (temperature > 0) & ((top_p < 1) | has_top_k(top_k, vocab_size))


@triton.jit
def has_top_k(top_k, vocab_size):
    return (top_k > 0) & (top_k < vocab_size)


@triton.jit
def _steps_below(temperature, STEPS: tl.constexpr):
    """Descending x `[STEPS]`, the last of which all tokens are above: distances of logits, or of x where these are
    further apart."""
    place = tl.arange(0, STEPS) + 1
    distances = tl.div_rn((place * place).to(tl.float32) * 0.25, tl.minimum(temperature, 1.0))
    return tl.where(place == STEPS, float("-inf"), -distances)


@triton.jit
def profile_kernel(
    logits_ptr,
    max_ptr,
    temperature_ptr,
    top_p_ptr,
    top_k_ptr,
    min_p_ptr,
    counts_ptr,
    masses_ptr,
    row_stride,
    vocab_size,
    num_chunks,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens of one chunk of one row above each step, and the mass that min-p keeps of them: `[..., STEPS]`."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if has_threshold(temperature, tl.load(top_p_ptr + row), tl.load(top_k_ptr + row), vocab_size):
        row_ptr = logits_ptr + row.to(tl.int64) * row_stride
        most = row_maximum(max_ptr + row * num_chunks, num_chunks, NUM_CHUNKS)
        min_p = tl.load(min_p_ptr + row)
        steps = _steps_below(temperature, STEPS)[:, None]
        # Each lane adds up its own tokens: threads wait for each other once a chunk, not once a block.
        counts = tl.zeros((STEPS, BLOCK), tl.float32)
        masses = tl.zeros((STEPS, BLOCK), tl.float32)
        first = chunk * CHUNK
        for start in tl.range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK, num_stages=3):
            x = load_scaled(row_ptr, start + tl.arange(0, BLOCK), vocab_size, most, temperature)
            weights = tl.exp(x)
            weights = tl.where(weights >= min_p, weights, 0.0)
            is_above = x[None, :] > steps
            counts += tl.where(is_above, 1.0, 0.0)
            masses += tl.where(is_above, weights[None, :], 0.0)
        places = (row * num_chunks + chunk) * STEPS + tl.arange(0, STEPS)
        tl.store(counts_ptr + places, tl.sum(counts, 1))
        tl.store(masses_ptr + places, tl.sum(masses.to(tl.float64), 1))


@triton.jit
def range_of(counts, masses, temperature, top_p, top_k, vocab_size, STEPS: tl.constexpr):
    """The step above which the threshold lies, `STEPS` if it lies nowhere; its order, and that of the step before it;
    how many tokens are above the former; and how many, or what mass, is too much above a threshold.

    counts, masses: `[NUM_CHUNKS, STEPS]`.
    """
    above = tl.sum(masses, 0)
    wanted = top_p.to(tl.float64) * tl.max(above, 0)
    num_above = tl.sum(counts, 0)
    if has_top_k(top_k, vocab_size):
        above = num_above.to(tl.float64)
        wanted = top_k.to(tl.float64)
    is_enough = above < wanted
    orders = ordered_bits(_steps_below(temperature, STEPS))
    step = tl.min(tl.where(is_enough, STEPS, tl.arange(0, STEPS)), 0)
    low = tl.max(tl.where(is_enough, LOWEST, orders), 0).to(tl.int64)
    high = tl.min(tl.where(is_enough, orders, 0), 0).to(tl.int64)
    return step, low, high, tl.min(tl.where(is_enough, vocab_size, num_above.to(tl.int32)), 0), wanted


@triton.jit
def load_profile(counts_ptr, masses_ptr, row, num_chunks, NUM_CHUNKS: tl.constexpr, STEPS: tl.constexpr):
    chunks = tl.arange(0, NUM_CHUNKS)[:, None]
    places = (row * num_chunks + chunks) * STEPS + tl.arange(0, STEPS)[None, :]
    counts = tl.load(counts_ptr + places, mask=chunks < num_chunks, other=0.0)
    return counts, tl.load(masses_ptr + places, mask=chunks < num_chunks, other=0.0)
