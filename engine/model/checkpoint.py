"""A model folder before it is loaded: what must be there, whether it is whole, and what identifies it.

Knows files only: no torch, no transformers.
"""

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_SAMPLE_BYTES = 1 << 16
_NUM_SAMPLES = 64  # per file, evenly spread


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with config.json, tokenizer.json and whole safetensors files."""

    folder: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ends that generation_config.json and config.json name, each once."""
        generation = self.folder / "generation_config.json"
        sources = [read_json(generation) if generation.exists() else {}, self.config]
        ids: list[int] = []
        for value in (source.get("eos_token_id") for source in sources):
            ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
        return tuple(dict.fromkeys(ids))

    @property
    def dtype_name(self) -> str | None:
        """The dtype that config.json says the weights were saved in, like `bfloat16`."""
        name = self.config.get("dtype") or self.config.get("torch_dtype")
        return name if isinstance(name, str) else None

    def fingerprint(self) -> str:
        """A hash of the config, every tensor's name, dtype, shape and place, and samples spread over the weights."""
        digest = blake2b(digest_size=16)
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for path in self.weight_files:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(file.read(8 + _header_bytes(path)))
                for i in range(_NUM_SAMPLES):
                    file.seek(i * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check that the folder is whole. Raises `ModelLoadError` naming the file at fault and the remedy."""
    if not (folder / "config.json").exists():
        raise ModelLoadError(f"{folder} has no config.json; give the folder of a transformers model")
    config = read_json(folder / "config.json")
    if not (folder / "tokenizer.json").exists():
        raise ModelLoadError(
            f"{folder} has no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    weight_files = _weight_files(folder)
    for path in weight_files:
        _check_whole(path)
    return Checkpoint(folder, config, weight_files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises `ModelLoadError` if it is anything else."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object; fetch the model again")
    return value


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index_path = folder / _INDEX_NAME
    if index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{index_path} has no weight_map; fetch the model again")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise ModelLoadError(f"{folder} lacks {', '.join(missing)}, named in {_INDEX_NAME}; fetch the model again")
        return tuple(paths)
    if (folder / _SINGLE_NAME).exists():
        return (folder / _SINGLE_NAME,)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{folder} has its weights only in {pickles[0]}, a pickle that could run code and is never opened; convert "
            "it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER) "
            "writes model.safetensors"
        )
    raise ModelLoadError(f"{folder} has no {_SINGLE_NAME}; give a folder with safetensors weights")


def _check_whole(path: Path) -> None:
    """A safetensors file is eight bytes of header length, a JSON header and the tensors one after the other."""
    damaged = f"{path} is damaged; fetch the model again"
    length = _header_bytes(path)
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelLoadError(f"{damaged} (its header cannot be read: {error})") from error
    expected = 8 + length + end
    if path.stat().st_size != expected:
        raise ModelLoadError(f"{damaged} ({path.stat().st_size} bytes, {expected} by its header)")


def _header_bytes(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise ModelLoadError(f"{path} is damaged; fetch the model again (no safetensors header)")
    return length
