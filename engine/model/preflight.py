"""What a model is refused for by its files alone: known in milliseconds, where importing torch takes seconds.

Knows nothing of devices and dtypes, nor of what is in a `.gguf` file.
"""

from collections.abc import Callable

from engine.config import EngineConfig
from engine.model.checkpoint import open_checkpoint
from engine.model.locate import cache_dir_of, find_gguf, find_model_dir
from engine.model.registry import find_architecture
from engine.parallel.rank import check_even


def check_model(config: EngineConfig, report: Callable[[str], None]) -> None:
    """Raises `ModelLoadError`, as loading the model would. `report` is told how far a download has come."""
    if find_gguf(config.model_path) is None:
        checkpoint = open_checkpoint(find_model_dir(config.model_path, cache_dir_of(config), report))
        find_architecture(checkpoint.config, source=config.model_path)
        check_even(checkpoint.config, config.tensor_parallel_size)
