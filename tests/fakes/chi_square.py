"""The judge of drawn frequencies."""

import math

import torch
from torch import Tensor


def chi_square_tail(counts: Tensor, expected: Tensor) -> float:
    """Probability of a statistic at least as large (Wilson and Hilferty, 1931); rare tokens are counted together."""
    common = expected >= 5
    observed = torch.cat([counts[common].double(), counts[~common].sum()[None].double()])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom == 0:
        return 1.0
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))
