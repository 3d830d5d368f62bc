"""Noise for sampling that is a pure function of (seed, choice, position, token id), the same on every device.

A row's key is two rounds of splitmix64's finaliser (Steele, Lea and Flood, 2014) over the seed and over choice and
position; a token's 32 bits are two rounds of Wellons' lowbias32 (hash-prospector, 2018) over its id, one half of the
key before each. All of it is integer arithmetic, exact everywhere; the logarithms are taken in float64, so that devices
which round them differently still agree on the maximum.
"""

import torch
from torch import Tensor

_GOLDEN_64 = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
_MIX_64 = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's multipliers, as int64
_MIX_32 = (0x7FEB352D, 0x846CA68B - (1 << 32))  # lowbias32's multipliers, as int32


def row_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """Keys int32 `[2, num_rows]` for int64 `[num_rows]` each; choice and position are below 2^31."""
    key = _mix_64(seed + _GOLDEN_64)
    key = _mix_64(key + (choice << 32) + position)
    return torch.stack([key.to(torch.int32), (key >> 32).to(torch.int32)])


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise float64 `[num_rows, num_ids]`.

    keys: int32 `[2, num_rows]`; token_ids: int32 `[num_ids]` or `[num_rows, num_ids]`. Lies in (-3.2, 22.9).
    """
    bits = _mix_32(_mix_32(token_ids ^ keys[0][:, None]) ^ keys[1][:, None])
    uniform = (bits.double() + (2.0**31 + 0.5)) * 2.0**-32  # in (0, 1), exact
    return uniform.log_().neg_().log_().neg_()


def _mix_64(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30, 64)) * _MIX_64[0]
    x = (x ^ _shift(x, 27, 64)) * _MIX_64[1]
    return x ^ _shift(x, 31, 64)


def _mix_32(x: Tensor) -> Tensor:
    """Mutates and returns x, int32."""
    x ^= _shift(x, 16, 32)
    x *= _MIX_32[0]
    x ^= _shift(x, 15, 32)
    x *= _MIX_32[1]
    x ^= _shift(x, 16, 32)
    return x


def _shift(x: Tensor, count: int, width: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> count).bitwise_and_((1 << (width - count)) - 1)
