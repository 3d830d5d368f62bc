"""The draw of one token a row: maximum, then the keyed Gumbel maximum of what the filters keep (`filters.py`).

Formulas: `engine.sampler`; noise is the integer arithmetic of `engine.sampling_noise`, and its logarithms count in
float64. These cost a GPU more than reading the row, so each chunk of the vocabulary, a program each, finds its best
score in float32, and only chunks that come near the best of these are looked at in float64.
"""

import triton
import triton.language as tl

NO_TOKEN = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-0x80000000)
LN_2 = tl.constexpr(0.6931471805599453)
MARGIN = tl.constexpr(1e-3)  # between a score in float32 and in float64 lies less


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
def noise_bits(key_low, key_high, ids):
    """32 random bits a token, as int32."""
    return mix_32(mix_32(ids.to(tl.uint32) ^ key_low) ^ key_high).to(tl.int32, bitcast=True)


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise float64."""
    uniform = (bits.to(tl.float64) + 2147483648.5) * 2.3283064365386963e-10  # 2^31 + 1/2, 2^-32: exact
    return -tl.log(-tl.log(uniform))


@triton.jit
def near_gumbel(bits):
    """The same in float32, off by a tenth of `MARGIN` at most. Near 1 the uniform has no digits left: its distance
    from 1 has them. A GPU has an instruction for the logarithm to base 2, right to 2^-22; others take it twenty."""
    places = bits.to(tl.uint32, bitcast=True) ^ 0x80000000
    uniform = (places.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((places ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(rest < 0.01, rest + 0.5 * rest * rest, tl.log2(uniform) * -LN_2)
    return tl.log2(exponential) * -LN_2


@triton.jit
def load_scaled(row_ptr, ids, vocab_size, most, temperature):
    """x = (logit - max) / temperature; minus infinity behind the row. most: None where x itself is read."""
    logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    if most is not None:
        logits = tl.div_rn(logits - most, temperature)
    return logits


@triton.jit
def row_maximum(max_ptr, num_chunks, NUM_CHUNKS: tl.constexpr):
    """The largest logit of a row; max_ptr: those of its chunks."""
    chunks = tl.arange(0, NUM_CHUNKS)
    return tl.max(tl.load(max_ptr + chunks, mask=chunks < num_chunks, other=float("-inf")), 0)


@triton.jit
def max_kernel(logits_ptr, max_ptr, ids_ptr, row_stride, vocab_size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of one chunk of one row, and its lowest id: to `[num_rows, num_chunks]`."""
    row_ptr = logits_ptr + tl.program_id(0).to(tl.int64) * row_stride
    first = tl.program_id(1) * CHUNK
    largest = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), NO_TOKEN, tl.int32)
    for start in range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        block_largest, block_token = first_of(logits, ids)
        is_better = (block_largest > largest) | ((block_largest == largest) & (block_token < token))
        token = tl.where(is_better, block_token, token)
        largest = tl.where(is_better, block_largest, largest)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(max_ptr + place, largest)
    tl.store(ids_ptr + place, token)


@triton.jit
def _kept(row_ptr, ids, vocab_size, most, temperature, threshold, min_p):
    """x of some tokens, and whether the filters keep them."""
    x = load_scaled(row_ptr, ids, vocab_size, most, temperature)
    return x, (ordered_bits(x) >= threshold) & (tl.exp(x) >= min_p) & (x > float("-inf"))


@triton.jit
def _load_threshold(threshold_ptr, row):
    """threshold_ptr: None where no row has one."""
    if threshold_ptr is not None:
        return tl.load(threshold_ptr + row)
    return tl.full((), LOWEST, tl.int32)


@triton.jit
def draw_kernel(
    logits_ptr,
    max_ptr,
    threshold_ptr,
    temperature_ptr,
    min_p_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    score_ptr,
    row_stride,
    vocab_size,
    num_chunks,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """About the largest x + noise of one chunk of one row, among what is kept: to `[num_rows, num_chunks]`."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        row_ptr = logits_ptr + row.to(tl.int64) * row_stride
        most = row_maximum(max_ptr + row * num_chunks, num_chunks, NUM_CHUNKS)
        threshold, min_p = _load_threshold(threshold_ptr, row), tl.load(min_p_ptr + row)
        seed, choice, position = tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)
        key_low, key_high = row_keys(seed, choice, position)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        first = tl.program_id(1) * CHUNK
        for start in range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x, is_kept = _kept(row_ptr, ids, vocab_size, most, temperature, threshold, min_p)
            if threshold_ptr is None or tl.max(is_kept.to(tl.int32), 0) > 0:
                score = x + near_gumbel(noise_bits(key_low, key_high, ids))
                best = tl.maximum(best, tl.where(is_kept, score, float("-inf")))
        tl.store(score_ptr + row * num_chunks + tl.program_id(1), tl.max(best, 0))


@triton.jit
def _best_drawn(x, is_kept, ids, key_low, key_high):
    """The largest x + noise, in float64, of those that are kept, and whose it is."""
    scores = x.to(tl.float64) + gumbel(noise_bits(key_low, key_high, ids))
    return first_of(tl.where(is_kept, scores, float("-inf")), ids)


@triton.jit
def choose_kernel(
    logits_ptr,
    max_ptr,
    ids_ptr,
    threshold_ptr,
    temperature_ptr,
    min_p_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    score_ptr,
    tokens_ptr,
    row_stride,
    vocab_size,
    num_chunks,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: the largest logit, or the largest x + noise, in float64, of the chunks that may have it.

    score_ptr: None where all rows are greedy.
    """
    row = tl.program_id(0)
    chunks = tl.arange(0, NUM_CHUNKS)
    is_chunk = chunks < num_chunks
    largest = tl.load(max_ptr + row * num_chunks + chunks, mask=is_chunk, other=float("-inf"))
    tokens = tl.load(ids_ptr + row * num_chunks + chunks, mask=is_chunk, other=NO_TOKEN)
    most, token = first_of(largest, tokens)
    if score_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            row_ptr = logits_ptr + row.to(tl.int64) * row_stride
            threshold, min_p = _load_threshold(threshold_ptr, row), tl.load(min_p_ptr + row)
            seed, choice, position = tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)
            key_low, key_high = row_keys(seed, choice, position)
            least = row_maximum(score_ptr + row * num_chunks, num_chunks, NUM_CHUNKS) - MARGIN
            best = tl.full((), float("-inf"), tl.float64)
            token = tl.full((), NO_TOKEN, tl.int32)
            for chunk in range(num_chunks):
                score = tl.load(score_ptr + row * num_chunks + chunk)
                if (score >= least) & (score > float("-inf")):
                    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, vocab_size), BLOCK):
                        ids = start + tl.arange(0, BLOCK)
                        x, is_kept = _kept(row_ptr, ids, vocab_size, most, temperature, threshold, min_p)
                        block_best, block_token = _best_drawn(x, is_kept, ids, key_low, key_high)
                        is_better = (block_best > best) | ((block_best == best) & (block_token < token))
                        token = tl.where(is_better, block_token, token)
                        best = tl.where(is_better, block_best, best)
    tl.store(tokens_ptr + row, tl.minimum(token, vocab_size - 1).to(tl.int64))


@triton.jit(do_not_specialize=["num_rows"])
def settle_kernel(logits_ptr, tokens_ptr, row_stride, num_rows, BAD_LOGITS: tl.constexpr, BLOCK: tl.constexpr):
    """`BAD_LOGITS` in place of a block of rows' tokens whose logits are no finite numbers, or whose rows begin so."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    row_ptrs = logits_ptr + rows.to(tl.int64) * row_stride
    first = tl.load(row_ptrs, mask=mask, other=0.0).to(tl.float32)
    tokens = tl.load(tokens_ptr + rows, mask=mask, other=0)
    chosen = tl.load(row_ptrs + tokens, mask=mask, other=0.0).to(tl.float32)
    is_sound = (first < float("inf")) & (tl.abs(chosen) < float("inf"))  # nor is NaN
    tl.store(tokens_ptr + rows, tl.full((BLOCK,), BAD_LOGITS, tl.int64), mask=mask & (is_sound == 0))
