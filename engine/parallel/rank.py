"""Which of the processes that share one model this is. Knows neither torch nor how the processes speak."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ModelLoadError

# What a model's config.json counts and ranks share out evenly: heads with their keys and values, units of the MLP.
SHARED_OUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `size` processes, each with a device and a part of every layer."""

    index: int
    size: int

    @property
    def is_leader(self) -> bool:
        """Whether it decides and samples; the others compute what it announces."""
        return self.index == 0

    def __str__(self) -> str:
        return f"rank {self.index} of {self.size}"


ALONE = Rank(0, 1)


def check_even(config: Mapping[str, object], size: int) -> None:
    """Raises `ModelLoadError` if a model cannot be shared out evenly among `size` ranks.

    config: of the model; what it does not hold is not looked at.
    """
    counts = {name: count for name in SHARED_OUT if isinstance(count := config.get(name), int)}
    for name, count in counts.items():
        if count % size:
            sizes = [n for n in range(1, min(counts.values()) + 1) if not any(count % n for count in counts.values())]
            raise ModelLoadError(
                f"tensor_parallel_size {size} does not divide the model's {name} ({count}); "
                f"set it to {' or '.join(map(str, sizes))}"
            )
