"""Top-k and top-p as one threshold a row, without a sort and with few readings of the row.

Of all thresholds in the order of float32, a row's is the lowest that leaves few enough tokens (top-k), and then little
enough mass (top-p), above it. It is sought in three kernels:

- `profile_kernel` counts and weighs, chunk by chunk, what lies above some fixed steps below the row's maximum. Between
  two of these is the threshold, and above the lower one all that can be kept.
- `gather_kernel` puts the latter together, in order, unless it is more than there is room for.
- `threshold_kernel` narrows the range between the two to a sixteenth at each pass over what was gathered, or else over
  the whole row.

Sums are made in an order that depends on nothing but the row.
"""

import triton
import triton.language as tl

from engine.kernels.triton.sampling import LOWEST, load_scaled, ordered_bits, row_maximum


@triton.jit
def _has_threshold(temperature, top_p, top_k, vocab_size):
    return (temperature > 0) & ((top_p < 1) | _has_top_k(top_k, vocab_size))


@triton.jit
def _has_top_k(top_k, vocab_size):
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
    if _has_threshold(temperature, tl.load(top_p_ptr + row), tl.load(top_k_ptr + row), vocab_size):
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
def _range_of(counts, masses, temperature, top_p, top_k, vocab_size, STEPS: tl.constexpr):
    """The step above which the threshold lies, `STEPS` if it lies nowhere; its order, and that of the step before it;
    how many tokens are above the former; and how many, or what mass, is too much above a threshold.

    counts, masses: `[NUM_CHUNKS, STEPS]`.
    """
    above = tl.sum(masses, 0)
    wanted = top_p.to(tl.float64) * tl.max(above, 0)
    num_above = tl.sum(counts, 0)
    if _has_top_k(top_k, vocab_size):
        above = num_above.to(tl.float64)
        wanted = top_k.to(tl.float64)
    is_enough = above < wanted
    orders = ordered_bits(_steps_below(temperature, STEPS))
    step = tl.min(tl.where(is_enough, STEPS, tl.arange(0, STEPS)), 0)
    low = tl.max(tl.where(is_enough, LOWEST, orders), 0).to(tl.int64)
    high = tl.min(tl.where(is_enough, orders, 0), 0).to(tl.int64)
    return step, low, high, tl.min(tl.where(is_enough, vocab_size, num_above.to(tl.int32)), 0), wanted


@triton.jit
def _load_profile(counts_ptr, masses_ptr, row, num_chunks, NUM_CHUNKS: tl.constexpr, STEPS: tl.constexpr):
    chunks = tl.arange(0, NUM_CHUNKS)[:, None]
    places = (row * num_chunks + chunks) * STEPS + tl.arange(0, STEPS)[None, :]
    counts = tl.load(counts_ptr + places, mask=chunks < num_chunks, other=0.0)
    return counts, tl.load(masses_ptr + places, mask=chunks < num_chunks, other=0.0)


@triton.jit
def gather_kernel(
    logits_ptr,
    max_ptr,
    temperature_ptr,
    top_p_ptr,
    top_k_ptr,
    counts_ptr,
    masses_ptr,
    room_ptr,
    row_stride,
    vocab_size,
    num_chunks,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x of one chunk's tokens above the step that the threshold lies above, behind those of the chunks before it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_p, top_k = tl.load(top_p_ptr + row), tl.load(top_k_ptr + row)
    if _has_threshold(temperature, top_p, top_k, vocab_size):
        counts, masses = _load_profile(counts_ptr, masses_ptr, row, num_chunks, NUM_CHUNKS, STEPS)
        step, low, _, size, _ = _range_of(counts, masses, temperature, top_p, top_k, vocab_size, STEPS)
        if (step < STEPS) & (size <= ROOM):
            is_before = (tl.arange(0, NUM_CHUNKS) < chunk)[:, None] & (tl.arange(0, STEPS) == step)[None, :]
            place = tl.sum(tl.sum(tl.where(is_before, counts, 0.0), 0), 0).to(tl.int32)
            row_ptr = logits_ptr + row.to(tl.int64) * row_stride
            most = row_maximum(max_ptr + row * num_chunks, num_chunks, NUM_CHUNKS)
            first = chunk * CHUNK
            for start in tl.range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK, num_stages=3):
                x = load_scaled(row_ptr, start + tl.arange(0, BLOCK), vocab_size, most, temperature)
                is_above = (ordered_bits(x) > low) & (x <= 0)  # NaN was not counted: its place would be another's
                ranks = tl.cumsum(is_above.to(tl.int32), 0)
                tl.store(room_ptr + row.to(tl.int64) * ROOM + place + ranks - 1, x, mask=is_above)
                place += tl.sum(is_above.to(tl.int32), 0)


@triton.jit
def _above(x_ptr, size, most, temperature, min_p, kth, points, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """What lies above each of the points: how many tokens, or the mass of those that min-p and top-k keep."""
    lanes = tl.zeros((points.shape[0], BLOCK), tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=3):
        x = load_scaled(x_ptr, start + tl.arange(0, BLOCK), size, most, temperature)
        order = ordered_bits(x)
        if BY_MASS:
            weights = tl.exp(x)
            weights = tl.where((weights >= min_p) & (order >= kth), weights, 0.0)
        else:
            weights = tl.where(start + tl.arange(0, BLOCK) < size, 1.0, 0.0)
        lanes += tl.where(order[None, :] > points[:, None], weights[None, :], 0.0)
    return tl.sum(lanes.to(tl.float64), 1)


@triton.jit
def _lowest(
    x_ptr,
    size,
    most,
    temperature,
    min_p,
    kth,
    wanted,
    low,
    high,
    BY_MASS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest order from `low` to `high` with less than `wanted` above it, if that is so of `high`."""
    while low < high:
        points = low + (high - low) * tl.arange(0, POINTS) // POINTS
        above = _above(x_ptr, size, most, temperature, min_p, kth, points.to(tl.int32), BY_MASS, BLOCK)
        is_enough = above < wanted
        low = tl.max(tl.where(is_enough, low, points + 1), 0)
        high = tl.min(tl.where(is_enough, points, high), 0)
        low = tl.minimum(low, high)
    return high


@triton.jit
def _threshold(
    x_ptr,
    size,
    most,
    temperature,
    filters,
    found,
    vocab_size,
    STEPS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least order that top-k and top-p keep, among `size` values of which x = (value - most) / temperature.

    filters: top-p, top-k and min-p; found: what `_range_of` gives.
    """
    top_p, top_k, min_p = filters
    step, low, high, _, wanted = found
    threshold = tl.full((), LOWEST, tl.int64)
    everything = tl.full((POINTS,), LOWEST, tl.int32)
    if _has_top_k(top_k, vocab_size):
        if step < STEPS:
            threshold = _lowest(
                x_ptr, size, most, temperature, min_p, LOWEST, wanted, low + 1, high, False, POINTS, BLOCK
            )
        low = threshold - 1
        high = tl.full((), 0, tl.int64)
        above = _above(x_ptr, size, most, temperature, min_p, threshold, everything, True, BLOCK)
        wanted = top_p.to(tl.float64) * tl.max(above, 0)
    if top_p < 1:
        last = _lowest(x_ptr, size, most, temperature, min_p, threshold, wanted, low + 1, high, True, POINTS, BLOCK)
        threshold = tl.maximum(threshold, last)
    return threshold


@triton.jit
def threshold_kernel(
    logits_ptr,
    max_ptr,
    temperature_ptr,
    top_p_ptr,
    top_k_ptr,
    min_p_ptr,
    counts_ptr,
    masses_ptr,
    room_ptr,
    threshold_ptr,
    row_stride,
    vocab_size,
    num_chunks,
    NUM_CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    ROOM: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least order of one row that top-k and top-p keep."""
    row = tl.program_id(0)
    temperature, min_p = tl.load(temperature_ptr + row), tl.load(min_p_ptr + row)
    top_p, top_k = tl.load(top_p_ptr + row), tl.load(top_k_ptr + row)
    threshold = tl.full((), LOWEST, tl.int64)
    if _has_threshold(temperature, top_p, top_k, vocab_size):
        counts, masses = _load_profile(counts_ptr, masses_ptr, row, num_chunks, NUM_CHUNKS, STEPS)
        step, low, high, size, wanted = _range_of(counts, masses, temperature, top_p, top_k, vocab_size, STEPS)
        most = row_maximum(max_ptr + row * num_chunks, num_chunks, NUM_CHUNKS)
        filters = (top_p, top_k, min_p)
        found = (step, low, high, size, wanted)
        if (step < STEPS) & (size <= ROOM):
            x_ptr = room_ptr + row.to(tl.int64) * ROOM
            threshold = _threshold(x_ptr, size, 0.0, 1.0, filters, found, vocab_size, STEPS, POINTS, BLOCK)
        else:
            row_ptr = logits_ptr + row.to(tl.int64) * row_stride
            threshold = _threshold(
                row_ptr, vocab_size, most, temperature, filters, found, vocab_size, STEPS, POINTS, BLOCK
            )
    tl.store(threshold_ptr + row, threshold.to(tl.int32))
