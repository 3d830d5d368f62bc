"""Triton's interpreter without what makes it slow: it patches its language anew at every call between functions."""

from typing import Any

import triton
from triton.runtime import interpreter

_patched_modules: set[str] = set()


def speed_up_interpreter() -> None:
    """Have functions called from a kernel run as they are: the launch of the kernel has patched the language."""
    if triton.knobs.runtime.interpret:
        interpreter.InterpretedFunction.__call__ = _call


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = self.fn.__module__
    # Triton's own functions see the language through another module, which nobody restores after a launch.
    if module.startswith("triton.") and module not in _patched_modules:
        _patched_modules.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)
