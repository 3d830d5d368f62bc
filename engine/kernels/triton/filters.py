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
def _above(values, min_p, kth, points, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """What lies above each of the points: how many tokens, or the mass of those that min-p and top-k keep."""
    x_ptr, size, most, temperature = values
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
    values,
    filters,
    kth,
    wanted,
    low,
    high,
    room_ptr,
    BY_MASS: tl.constexpr,
    ROOM: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest order from `low` to `high` with less than `wanted` above it, if that is so of `high`.

    room_ptr: takes the values in the range as soon as there is room for them; None where no others are read anyway.
    """
    min_p = filters[2]
    above_high = tl.full((), 0, tl.float64)
    if room_ptr is not None:
        first_place = tl.full((), 0, tl.int32)
        num_between = first_place + ROOM + 1
        while (low < high) & (num_between > ROOM):
            points = _points(low, high, POINTS - 1, POINTS)  # what is above `high` is not gathered, and must be known
            above = _above(values, min_p, kth, points, BY_MASS, BLOCK)
            low, high = _narrowed(low, high, points, above < wanted)
            above_high = tl.max(tl.where(above < wanted, above, above_high), 0)
            num_between = _gather(values, 0, values[1], low, high, room_ptr, first_place, ROOM, BLOCK)
        tl.debug_barrier()  # each thread goes on to read what others have put there
        values = (room_ptr, num_between, None, None)
    while low < high:
        points = _points(low, high, POINTS, POINTS)
        above = above_high + _above(values, min_p, kth, points, BY_MASS, BLOCK)
        low, high = _narrowed(low, high, points, above < wanted)
    return high


@triton.jit
def _threshold(
    values,
    filters,
    found,
    vocab_size,
    room_ptr,
    STEPS: tl.constexpr,
    ROOM: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least order that top-k and top-p keep.

    values: as `_gather` has them; filters: top-p, top-k and min-p; found: what `range_of` gives; room_ptr: as `_lowest`
    has it.
    """
    top_p, top_k, min_p = filters
    step, low, high, wanted = found[0], found[1], found[2], found[4]
    threshold = tl.full((), LOWEST, tl.int64)
    if has_top_k(top_k, vocab_size):
        if step < STEPS:
            threshold = _lowest(values, filters, threshold, wanted, low + 1, high, room_ptr, False, ROOM, POINTS, BLOCK)
        low = threshold - 1
        high = tl.full((), 0, tl.int64)
        everything = tl.full((POINTS,), LOWEST, tl.int32)
        wanted = top_p.to(tl.float64) * tl.max(_above(values, min_p, threshold, everything, True, BLOCK), 0)
    if top_p < 1:
        last = _lowest(values, filters, threshold, wanted, low + 1, high, room_ptr, True, ROOM, POINTS, BLOCK)
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
        row_room_ptr = room_ptr + row.to(tl.int64) * ROOM
        filters = (top_p, top_k, min_p)
        if (found[0] < STEPS) & (found[3] <= ROOM):
            gathered = (row_room_ptr, found[3], None, None)
            threshold = _threshold(gathered, filters, found, vocab_size, None, STEPS, ROOM, POINTS, BLOCK)
        else:
            row_ptr = logits_ptr + row.to(tl.int64) * row_stride
            most = row_maximum(max_ptr + row * num_chunks, num_chunks, NUM_CHUNKS)
            values = (row_ptr, vocab_size, most, temperature)
            threshold = _threshold(values, filters, found, vocab_size, row_room_ptr, STEPS, ROOM, POINTS, BLOCK)
    tl.store(threshold_ptr + row, threshold.to(tl.int32))
