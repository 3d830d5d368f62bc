"""A model as loading left it, in one file: its modules as a pickle, its weights as they lie in memory, to be mapped.

What a model shares with the process that it runs in (compiled kernels, the attention's context) is named, not written.
A pickle can run code: such files are read only from the cache folder, from where compiled kernels are loaded, too.
"""

import io
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

_MAGIC = b"pmmodel1"
_HEAD = struct.Struct("<8s2Q16s")  # magic, bytes of the pickle and of the file, digest of the pickle
_PAGE = 4096
_ALIGNMENT = 64  # bytes, of a weight: a vector of the widest kernel


class NotPreparedError(Exception):
    """A file that cannot be used, or a model that cannot be written; the message says why."""


@dataclass(slots=True)
class _Weights:
    """Where each tensor's bytes will lie; tensors that share all their bytes lie there once."""

    places: dict[tuple[int, int], int] = field(default_factory=dict)  # by address and number of bytes
    tensors: list[tuple[int, Tensor]] = field(default_factory=list)
    num_bytes: int = 0

    def place(self, tensor: Tensor) -> int:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.is_contiguous():
            raise NotPreparedError(f"a tensor {tuple(tensor.shape)} does not lie in plain memory")
        key = tensor.data_ptr(), tensor.nbytes
        if key not in self.places:
            self.places[key] = offset = -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT
            self.tensors.append((offset, tensor))
            self.num_bytes = offset + tensor.nbytes
        return self.places[key]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, shared: Mapping[str, object]) -> None:
        super().__init__(file, protocol=5)
        self.weights = _Weights()
        self._names = {id(part): name for name, part in shared.items()}

    def persistent_id(self, part: Any) -> Any:
        if (name := self._names.get(id(part))) is not None:
            return "shared", name
        if not isinstance(part, Tensor):
            return None
        place = self.weights.place(part.detach())
        return "tensor", place, part.dtype, tuple(part.shape), isinstance(part, nn.Parameter)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Mapping[str, object], weights: Tensor) -> None:
        super().__init__(file)
        self._shared = shared
        self._weights = weights
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "shared":
            return self._shared[rest[0]]
        if (key := tuple(rest)) not in self._tensors:
            offset, dtype, shape, is_parameter = rest
            num_bytes = dtype.itemsize * torch.Size(shape).numel()
            tensor = self._weights[offset : offset + num_bytes].view(dtype).view(shape)
            self._tensors[key] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return self._tensors[key]


def freeze(prepared: object, shared: Mapping[str, object]) -> tuple[int, Callable[[BinaryIO], None]]:
    """The bytes that a file of it takes, and what writes them; its tensors must not change until then.

    shared: by name, what is found again in the process that reads it. Raises `NotPreparedError` for what no file holds.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, shared)
    try:
        pickler.dump(prepared)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise NotPreparedError(f"it cannot be written: {error}") from error
    code = stream.getvalue()
    start = _data_start(len(code))
    size = start + pickler.weights.num_bytes

    def write(file: BinaryIO) -> None:
        file.write(_HEAD.pack(_MAGIC, len(code), size, _digest(code)) + code)
        for offset, tensor in pickler.weights.tensors:
            file.seek(start + offset)
            if tensor.nbytes:
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.truncate(size)

    return size, write


def thaw(path: Path, shared: Mapping[str, object]) -> Any:
    """What `freeze` was given, its tensors mapped from the file: memory that processes share until one writes to it.

    Raises `NotPreparedError` for a file that is not whole, OSError for one that cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        magic, code_size, size, digest = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0, b"")
        if magic != _MAGIC or size != path.stat().st_size:
            raise NotPreparedError(f"{path} is not whole")
        code = file.read(code_size)
    if _digest(code) != digest:
        raise NotPreparedError(f"{path} is damaged")
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    try:
        return _Unpickler(io.BytesIO(code), shared, mapped[_data_start(code_size) :]).load()
    except (pickle.UnpicklingError, ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotPreparedError(f"{path} does not fit this build: {error!r}") from error


def _data_start(code_size: int) -> int:
    return -(-(_HEAD.size + code_size) // _PAGE) * _PAGE


def _digest(code: bytes) -> bytes:
    return blake2b(code, digest_size=16).digest()
