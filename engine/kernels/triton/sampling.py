"""The draw of one token a row: maximum, threshold of the filters, keyed Gumbel maximum. Formulas: `engine.sampler`.

Rows are cut into chunks of the vocabulary, one program each, but for the threshold. That is sought by narrowing the
range of float32's orders to a quarter at each pass over the row, so that nothing is sorted: of all thresholds it is the
lowest that leaves few enough tokens (top-k), and then little enough mass (top-p), above it. Noise is the integer
arithmetic of `engine.sampling_noise`.
"""

import triton
import triton.language as tl

NO_TOKEN = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-0x80000000)


@triton.jit
def first_of(values, ids):
    """The largest value and the lowest id that has it; `NO_TOKEN` where none compares, which is to say NaN."""
    largest = tl.max(values, 0)
    return largest, tl.min(tl.where(values == largest, ids, NO_TOKEN), 0)


@triton.jit
def ordered_bits(x):
    """int32 in the order of float32 x; -0 as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mix_32(x):
    """lowbias32 of `engine.sampling_noise`, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def mix_64(x):
    """splitmix64's finaliser, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_keys(seed, choice, position):
    """Both halves of a row's key, uint32; of int64."""
    key = mix_64(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    key = mix_64(key + ((choice << 32) + position).to(tl.uint64, bitcast=True))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def gumbel(key_low, key_high, ids):
    """Standard Gumbel noise float64 of token ids."""
    bits = mix_32(mix_32(ids.to(tl.uint32) ^ key_low) ^ key_high).to(tl.int32, bitcast=True)
    uniform = (bits.to(tl.float64) + 2147483648.5) * 2.3283064365386963e-10  # 2^31 + 1/2, 2^-32: exact
    return -tl.log(-tl.log(uniform))


@triton.jit
def load_scaled(row_ptr, ids, vocab_size, most, temperature):
    """x = (logit - max) / temperature; minus infinity behind the row."""
    logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
    return tl.div_rn(logits - most, temperature)


@triton.jit
def max_kernel(logits_ptr, max_ptr, ids_ptr, row_stride, vocab_size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of one chunk of one row, and its lowest id: to `[num_rows, num_chunks]`."""
    row_ptr = logits_ptr + tl.program_id(0).to(tl.int64) * row_stride
    first = tl.program_id(1) * CHUNK
    largest = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), NO_TOKEN, tl.int32)
    for start in range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        block_largest, block_token = first_of(logits, ids)
        is_better = (block_largest > largest) | ((block_largest == largest) & (block_token < token))
        token = tl.where(is_better, block_token, token)
        largest = tl.where(is_better, block_largest, largest)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(max_ptr + place, largest)
    tl.store(ids_ptr + place, token)


@triton.jit
def _total(lanes):
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def _above(
    row_ptr, vocab_size, most, temperature, min_p, kth, quarter, half, top, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """What lies above three thresholds: how many tokens, or the mass of those that min-p and top-k keep."""
    # Each lane adds up its own tokens: threads wait for each other once a pass, not once a block.
    above_quarter = tl.zeros((BLOCK,), tl.float32)
    above_half = tl.zeros((BLOCK,), tl.float32)
    above_top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = load_scaled(row_ptr, start + tl.arange(0, BLOCK), vocab_size, most, temperature)
        order = ordered_bits(x)
        if BY_MASS:
            weights = tl.exp(x)
            weights = tl.where((weights >= min_p) & (order >= kth), weights, 0.0)
        else:
            weights = tl.where(start + tl.arange(0, BLOCK) < vocab_size, 1.0, 0.0)
        above_quarter += tl.where(order > quarter, weights, 0.0)
        above_half += tl.where(order > half, weights, 0.0)
        above_top += tl.where(order > top, weights, 0.0)
    return _total(above_quarter), _total(above_half), _total(above_top)


@triton.jit
def lowest_threshold(
    row_ptr, vocab_size, most, temperature, min_p, kth, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """The lowest order with less than `wanted` above it; the largest x is 0, above which there is nothing."""
    low = tl.full((), LOWEST, tl.int64)
    high = tl.full((), 0, tl.int64)
    while low < high:
        half = (low + high) >> 1
        quarter = (low + half) >> 1
        top = (half + 1 + high) >> 1
        above_quarter, above_half, above_top = _above(
            row_ptr, vocab_size, most, temperature, min_p, kth, quarter, half, top, BY_MASS, BLOCK
        )
        if above_half < wanted:
            is_enough = above_quarter < wanted
            high = tl.where(is_enough, quarter, half)
            low = tl.where(is_enough, low, quarter + 1)
        else:
            is_enough = above_top < wanted
            high = tl.where(is_enough, top, high)
            low = tl.where(is_enough, half + 1, top + 1)
        low = tl.minimum(low, high)
    return high


@triton.jit
def filter_kernel(
    logits_ptr,
    max_ptr,
    ids_ptr,
    temperature_ptr,
    top_p_ptr,
    top_k_ptr,
    min_p_ptr,
    row_max_ptr,
    threshold_ptr,
    greedy_ptr,
    row_stride,
    vocab_size,
    num_chunks,
    NUM_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its maximum and greedy token, and the least order that top-k and top-p keep."""
    row = tl.program_id(0)
    chunks = tl.arange(0, NUM_CHUNKS)
    places = row * num_chunks + chunks
    largest = tl.load(max_ptr + places, mask=chunks < num_chunks, other=float("-inf"))
    tokens = tl.load(ids_ptr + places, mask=chunks < num_chunks, other=NO_TOKEN)
    most, token = first_of(largest, tokens)
    tl.store(row_max_ptr + row, most)
    tl.store(greedy_ptr + row, tl.minimum(token, vocab_size - 1).to(tl.int64))
    temperature = tl.load(temperature_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    threshold = tl.full((), LOWEST, tl.int64)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    if temperature > 0:
        if (top_k > 0) & (top_k < vocab_size):
            wanted = top_k.to(tl.float64)
            threshold = lowest_threshold(row_ptr, vocab_size, most, temperature, min_p, threshold, wanted, False, BLOCK)
        if top_p < 1:
            kept_mass, _, _ = _above(
                row_ptr, vocab_size, most, temperature, min_p, threshold, LOWEST, LOWEST, LOWEST, True, BLOCK
            )
            wanted = top_p.to(tl.float64) * kept_mass
            last = lowest_threshold(row_ptr, vocab_size, most, temperature, min_p, threshold, wanted, True, BLOCK)
            threshold = tl.maximum(threshold, last)
    tl.store(threshold_ptr + row, threshold.to(tl.int32))


@triton.jit
def draw_kernel(
    logits_ptr,
    row_max_ptr,
    threshold_ptr,
    temperature_ptr,
    min_p_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    score_ptr,
    ids_ptr,
    row_stride,
    vocab_size,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest x + noise of one chunk of one row, among what is kept: to `[num_rows, num_chunks]`."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + row)
    place = row * tl.num_programs(1) + tl.program_id(1)
    if temperature > 0:
        most = tl.load(row_max_ptr + row)
        threshold = tl.load(threshold_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        seed, choice, position = tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)
        key_low, key_high = row_keys(seed, choice, position)
        best = tl.full((), float("-inf"), tl.float64)
        token = tl.full((), NO_TOKEN, tl.int32)
        first = tl.program_id(1) * CHUNK
        for start in range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = load_scaled(row_ptr, ids, vocab_size, most, temperature)
            is_kept = (ordered_bits(x) >= threshold) & (tl.exp(x) >= min_p) & (x > float("-inf"))
            scores = tl.where(is_kept, x.to(tl.float64) + gumbel(key_low, key_high, ids), float("-inf"))
            block_best, block_token = first_of(scores, ids)
            is_better = (block_best > best) | ((block_best == best) & (block_token < token))
            token = tl.where(is_better, block_token, token)
            best = tl.where(is_better, block_best, best)
        tl.store(score_ptr + place, best)
        tl.store(ids_ptr + place, token)


@triton.jit
def choose_kernel(
    score_ptr, ids_ptr, temperature_ptr, greedy_ptr, tokens_ptr, vocab_size, num_chunks, NUM_CHUNKS: tl.constexpr
):
    """One row: the best of its chunks, or the greedy token."""
    row = tl.program_id(0)
    token = tl.load(greedy_ptr + row)
    if tl.load(temperature_ptr + row) > 0:
        chunks = tl.arange(0, NUM_CHUNKS)
        places = row * num_chunks + chunks
        scores = tl.load(score_ptr + places, mask=chunks < num_chunks, other=float("-inf"))
        ids = tl.load(ids_ptr + places, mask=chunks < num_chunks, other=NO_TOKEN)
        _, drawn = first_of(scores, ids)
        token = tl.minimum(drawn, vocab_size - 1).to(tl.int64)
    tl.store(tokens_ptr + row, token)
