"""How a model's embeddings are made: which hidden states, and what is done with the vector. Values only.

A folder says so in the files of sentence-transformers, if it has them; what else they ask for is refused by name.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError
from engine.pooler import PoolingMode

_MODULES = "modules.json"
_MODES: dict[str, PoolingMode] = {
    "lasttoken": "last",
    "mean": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """The last token's hidden state, of length one, unless a folder says otherwise."""

    mode: PoolingMode = "last"
    normalizes: bool = True
    dimensions: int | None = None  # leading numbers that are kept (Matryoshka); None: all

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Raises `InvalidRequestError` (param `task`) for a folder that asks for what is not done, or is broken."""
        if not (folder / _MODULES).is_file():
            return cls()
        modules = _read(folder / _MODULES, list)
        names = [_module_name(module) for module in modules]
        kinds = {"Transformer", "Pooling", "Normalize"}
        if unknown := [name for name in names if name not in kinds]:
            raise _refusal(folder / _MODULES, f"asks for the module {unknown[0]}")
        mode: PoolingMode = "last"
        for module, name in zip(modules, names, strict=True):
            if name == "Pooling":
                mode = _mode(folder / str(module.get("path", "")) / "config.json")
        return cls(mode=mode, normalizes="Normalize" in names)

    def finish(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """vector: `[hidden_size]`, as pooled. Returns `[dimensions]`."""
        kept = vector[: self.dimensions].astype(np.float64)
        if self.normalizes and (length := np.sqrt(np.sum(kept * kept))) > 0:
            kept /= length
        return kept.astype(np.float32)


def _mode(path: Path) -> PoolingMode:
    config = _read(path, dict)
    if config.get("include_prompt") is False:
        raise _refusal(path, "asks for include_prompt: false")
    named = config.get("pooling_mode")
    asked = [named] if named is not None else [name for name, value in config.items() if _is_chosen(name, value)]
    if len(asked) != 1 or not isinstance(asked[0], str) or asked[0] not in _MODES:
        raise _refusal(path, f"asks for the pooling {' + '.join(map(str, asked)) or 'of nothing'}")
    return _MODES[asked[0]]


def _is_chosen(name: str, value: object) -> bool:
    return name.startswith("pooling_mode_") and value is True


def _module_name(module: object) -> str:
    """`sentence_transformers.models.Pooling`, or wherever the class lies in a later release: `Pooling`."""
    return str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""


def _read(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _refusal(path, f"cannot be read ({error})") from error
    if not isinstance(value, kind):
        raise _refusal(path, f"holds no JSON {'object' if kind is dict else 'array'}")
    return value


def _refusal(path: Path, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"this model is not served for embeddings: {path} {why}; served are the last token's hidden state and the mean "
        "of all, normalised or not",
        param="task",
    )
