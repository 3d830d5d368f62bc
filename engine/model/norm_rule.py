"""How the RMS norms of models differ. Knows nothing of what computes them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NormRule:
    """What an RMS norm does beside its formula."""

    epsilon: float
    adds_one: bool  # to the weight
    rounds_first: bool  # before the weight is applied
