"""Top-k and top-p as one threshold a row, without a sort and with few readings of the row.

Of all thresholds in the order of float32, a row's is the lowest that leaves few enough tokens (top-k), and then little
enough mass (top-p), above it. It is sought in three kernels:

- `profile_kernel` counts and weighs, chunk by chunk, what lies above some fixed steps below the row's maximum. Between
  two of these is the threshold, and above the lower one all that can be kept.
- `gather_kernel` puts the latter together, in order, unless it is more than there is room for.
- `threshold_kernel` narrows the range between the two to a sixteenth at each pass over what was gathered; else over the
  whole row, until there is room for what lies in the range.

Sums are made in an order that depends on nothing but the row.
"""

import triton
import triton.language as tl

from engine.kernels.triton.row_profile import has_threshold, has_top_k, load_profile, range_of
from engine.kernels.triton.sampling import LOWEST, load_scaled, ordered_bits, row_maximum


@triton.jit
def _gather(values, first, end, low, high, room_ptr, place, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """Put x of the tokens from `first` to `end` whose order is above `low` and not above `high` into the room, from
    `place` on and as far as it goes; the place behind the last.

    values: where a row is, how many there are, and `most` and `temperature` as `load_scaled` has them; high: 0 at most,
    so that NaN is not among them, which was not counted.
    """
    x_ptr, size, most, temperature = values
    for start in tl.range(first, end, BLOCK, num_stages=3):
        x = load_scaled(x_ptr, start + tl.arange(0, BLOCK), size, most, temperature)
        order = ordered_bits(x)
        is_between = (order > low) & (order <= high)
        places = place + tl.cumsum(is_between.to(tl.int32), 0) - 1
        tl.store(room_ptr + places, x, mask=is_between & (places < ROOM))
        place += tl.sum(is_between.to(tl.int32), 0)
    return place


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
    if has_threshold(temperature, top_p, top_k, vocab_size):
        counts, masses = load_profile(counts_ptr, masses_ptr, row, num_chunks, NUM_CHUNKS, STEPS)
        step, low, _, num_above, _ = range_of(counts, masses, temperature, top_p, top_k, vocab_size, STEPS)
        if (step < STEPS) & (num_above <= ROOM):
            is_before = (tl.arange(0, NUM_CHUNKS) < chunk)[:, None] & (tl.arange(0, STEPS) == step)[None, :]
            place = tl.sum(tl.sum(tl.where(is_before, counts, 0.0), 0), 0).to(tl.int32)
            row_ptr = logits_ptr + row.to(tl.int64) * row_stride
            values = (row_ptr, vocab_size, row_maximum(max_ptr + row * num_chunks, num_chunks, NUM_CHUNKS), temperature)
            first = chunk * CHUNK
            end = tl.minimum(first + CHUNK, vocab_size)
            _gather(values, first, end, low, 0, room_ptr + row.to(tl.int64) * ROOM, place, ROOM, BLOCK)


@triton.jit
def _above(values, min_p, kth, points, by_mass, BLOCK: tl.constexpr):
    """What lies above each of the points: how many tokens, or the mass of those that min-p and top-k keep."""
    x_ptr, size, most, temperature = values
    lanes = tl.zeros((points.shape[0], BLOCK), tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=3):
        ids = start + tl.arange(0, BLOCK)
        x = load_scaled(x_ptr, ids, size, most, temperature)
        order = ordered_bits(x)
        mass = tl.exp(x)
        mass = tl.where((mass >= min_p) & (order >= kth), mass, 0.0)
        weights = tl.where(by_mass, mass, tl.where(ids < size, 1.0, 0.0))
        lanes += tl.where(order[None, :] > points[:, None], weights[None, :], 0.0)
    return tl.sum(lanes.to(tl.float64), 1)


@triton.jit
def _points(low, high, PARTS: tl.constexpr, POINTS: tl.constexpr):
    """From `low` on, one at each of the equal parts of the range: `high` is the last of as many and one."""
    return (low + (high - low) * tl.arange(0, POINTS) // PARTS).to(tl.int32)


@triton.jit
def _narrowed(low, high, points, is_enough):
    """The range, once it is known of some points in it whether what lies above them is little enough."""
    points = points.to(tl.int64)
    high = tl.min(tl.where(is_enough, points, high), 0)
    return tl.minimum(tl.max(tl.where(is_enough, low, points + 1), 0), high), high


@triton.jit
def _lowest(
    row,
    gathered,
    min_p,
    kth,
    wanted,
    low,
    high,
    by_mass,
    ROOM: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest order from `low` to `high` with less than `wanted` above it, if that is so of `high`.

    row: the values of all tokens; gathered: where those in the range lie, and how many they are. More than `ROOM`: they
    do not yet, and are put there as soon as there is room for them.
    """
    room_ptr, num_between = gathered
    first_place = tl.full((), 0, tl.int32)
    above_high = tl.full((), 0, tl.float64)
    while (low < high) & (num_between > ROOM):
        points = _points(low, high, POINTS - 1, POINTS)  # what is above `high` is not gathered, and must be known
        above = _above(row, min_p, kth, points, by_mass, BLOCK)
        low, high = _narrowed(low, high, points, above < wanted)
        above_high = tl.max(tl.where(above < wanted, above, above_high), 0)
        num_between = _gather(row, 0, row[1], low, high, room_ptr, first_place, ROOM, BLOCK)
    tl.debug_barrier()  # each thread goes on to read what others have put there
    while low < high:
        points = _points(low, high, POINTS, POINTS)
        above = above_high + _above((room_ptr, num_between, None, None), min_p, kth, points, by_mass, BLOCK)
        low, high = _narrowed(low, high, points, above < wanted)
    return high


@triton.jit
def _kept_mass(row, gathered, min_p, kth, ROOM: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr):
    """Of what min-p and top-k keep; row, gathered: as `_lowest` has them."""
    room_ptr, num_gathered = gathered
    everything = tl.full((POINTS,), LOWEST, tl.int32)
    if num_gathered <= ROOM:
        above = _above((room_ptr, num_gathered, None, None), min_p, kth, everything, True, BLOCK)
    else:
        above = _above(row, min_p, kth, everything, True, BLOCK)
    return tl.max(above, 0)


@triton.jit
def _threshold(
    row,
    gathered,
    filters,
    found,
    vocab_size,
    STEPS: tl.constexpr,
    ROOM: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least order that top-k and top-p keep.

    row, gathered: as `_lowest` has them; filters: top-p, top-k and min-p; found: what `range_of` gives.
    """
    top_p, top_k, min_p = filters
    step, low, high, wanted = found[0], found[1], found[2], found[4]
    threshold = tl.full((), LOWEST, tl.int64)
    # First by top-k, then by top-p: twice the same code, which takes a compiler seconds.
    for turn in range(2):
        by_mass = turn > 0
        is_wanted = has_top_k(top_k, vocab_size) & (step < STEPS)
        if by_mass:
            is_wanted = top_p < 1
            if is_wanted & has_top_k(top_k, vocab_size):
                wanted = top_p.to(tl.float64) * _kept_mass(row, gathered, min_p, threshold, ROOM, POINTS, BLOCK)
                low = threshold - 1
                high = tl.full((), 0, tl.int64)
        if is_wanted:
            last = _lowest(row, gathered, min_p, threshold, wanted, low + 1, high, by_mass, ROOM, POINTS, BLOCK)
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
    if has_threshold(temperature, top_p, top_k, vocab_size):
        counts, masses = load_profile(counts_ptr, masses_ptr, row, num_chunks, NUM_CHUNKS, STEPS)
        found = range_of(counts, masses, temperature, top_p, top_k, vocab_size, STEPS)
        num_gathered = tl.where((found[0] < STEPS) & (found[3] <= ROOM), found[3], ROOM + 1)
        gathered = (room_ptr + row.to(tl.int64) * ROOM, num_gathered)
        most = row_maximum(max_ptr + row * num_chunks, num_chunks, NUM_CHUNKS)
        values = (logits_ptr + row.to(tl.int64) * row_stride, vocab_size, most, temperature)
        filters = (top_p, top_k, min_p)
        threshold = _threshold(values, gathered, filters, found, vocab_size, STEPS, ROOM, POINTS, BLOCK)
    tl.store(threshold_ptr + row, threshold.to(tl.int32))
