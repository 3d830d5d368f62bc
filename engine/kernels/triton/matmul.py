"""x @ weight.T + bias with one order of additions: a row has the same bits whatever is computed beside it.

Every output is the sum over K in tiles of `BLOCK_K`, in order, by one program; no tile depends on the number of rows.
Programs are persistent and take tiles in groups of rows that share weights.
"""

import triton
import triton.language as tl

from engine.kernels.triton.numerics import narrow, product, widen


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    x_stride,
    weight_stride,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles `program_id`, `program_id + num_programs`, ... of the output `[num_rows, OUT_FEATURES]`."""
    num_m = tl.cdiv(num_rows, BLOCK_M)
    num_n = tl.cdiv(OUT_FEATURES, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        group = tile // (GROUP * num_n)
        group_size = tl.minimum(num_m - group * GROUP, GROUP)
        tile_m = group * GROUP + tile % (GROUP * num_n) % group_size
        tile_n = tile % (GROUP * num_n) // group_size
        rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = rows < num_rows
        is_column = columns < OUT_FEATURES
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, IN_FEATURES, BLOCK_K):
            places = start + tl.arange(0, BLOCK_K)
            is_place = (places < IN_FEATURES)[None, :]
            x = tl.load(
                x_ptr + (rows * x_stride)[:, None] + places[None, :], mask=is_row[:, None] & is_place, other=0.0
            )
            weight_ptrs = weight_ptr + (columns * weight_stride)[:, None] + places[None, :]
            weight = tl.load(weight_ptrs, mask=is_column[:, None] & is_place, other=0.0)
            total = product(x, tl.trans(weight), total)
        if HAS_BIAS:
            total += widen(tl.load(bias_ptr + columns, mask=is_column, other=0.0))[None, :]
        out_ptrs = out_ptr + (rows * OUT_FEATURES)[:, None] + columns[None, :]
        tl.store(out_ptrs, narrow(total, out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
