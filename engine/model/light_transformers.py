"""transformers without what a child of the engine never uses, which is half of what its import takes.

Its modelling code imports torch's compiler, for decorators of kernels that are not called and for masks of another
attention; its sharding over processes; and its own continuous batching. While it is imported, stand-ins lie in their
place. Its import structure is taken from a file. For a process that is the engine's alone: elsewhere somebody may want
them.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed

from engine.config import EngineConfig
from engine.model.import_structure import keep_import_structure
from engine.model.locate import cache_dir_of

logger = logging.getLogger(__name__)

# What the modelling code imports first, whichever model comes.
_COMMON = ("transformers.modeling_utils", "transformers.modeling_layers", "transformers.generation.utils")
# Modules and the names that are imported of them.
_BATCHING = "transformers.generation.continuous_batching"
_DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")  # the compiler's
_STAND_INS: dict[str, dict[str, Any]] = {
    "torch._dynamo": {},
    "torch._dynamo._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": object},
    _BATCHING: {"ContinuousMixin": type("ContinuousMixin", (), {}), "PagedAttentionCache": object},
    f"{_BATCHING}.cache": {"PagedAttentionCache": object},
}
_ABSENT = ("torchvision",)  # where it is installed, transformers imports it for images, and it the compiler


def import_transformers(config: EngineConfig) -> None:
    """Import its modelling code, lightly where that works; nothing after a first call or a plain import."""
    if "transformers" in sys.modules:
        return
    try:
        with _stand_ins():
            keep_import_structure(cache_dir_of(config) / "transformers")
            for name in _COMMON:
                import_module(name)
    except (ImportError, AttributeError) as error:
        logger.warning("action=light_import_failed reason=%r", str(error))
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


@contextmanager
def light_loading() -> Iterator[None]:
    """Around the loading of a model: it would bring the compiler in after all. Nothing after a plain import."""
    utils = sys.modules.get("transformers.generation.utils")
    if getattr(utils, "ContinuousMixin", None) is _STAND_INS[_BATCHING].get("ContinuousMixin"):
        with _stand_ins():
            yield
    else:
        yield


@contextmanager
def _stand_ins() -> Iterator[None]:
    modules: dict[str, Any] = {name: _module(name, members) for name, members in _STAND_INS.items()}
    modules |= dict.fromkeys(_ABSENT)  # None: it is not found
    modules = {name: module for name, module in modules.items() if name not in sys.modules}
    is_available: Callable[[], bool] = torch.distributed.is_available
    sys.modules.update(modules)
    if "torch._dynamo" in modules:
        torch._dynamo = modules["torch._dynamo"]
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        if "torch._dynamo" in modules:
            del torch._dynamo
        for name in modules:
            del sys.modules[name]


def _module(name: str, members: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    module.__dict__.update(dict.fromkeys(_DECORATORS, _plain) | members)
    return module


def _plain(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The function as it is; without one, what gives it back so."""
    return _plain if function is None else function
