"""Triton's interpreter without what makes it slow and computes nothing.

It patches its language anew at every launch and at every call between functions, looks for integers that overflow and
drops what it finds, and describes the type of every value from scratch. Here the language stays patched, nothing is
looked for in vain, and each shape is described once.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import triton
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_language = interpreter._patch_lang
_numpy_dtype = cache(interpreter._get_np_dtype)
_ADDRESS = np.dtype(np.uint64)
_patched_modules: set[str] = set()


def speed_up_interpreter() -> None:
    """For every kernel that this process runs from now on. Where kernels are compiled it does nothing."""
    if not triton.knobs.runtime.interpret or interpreter._patch_lang is _patch_once:
        return
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _get_np_dtype
    interpreter.InterpretedFunction.__call__ = _call
    TritonSemantic.binary_op_sanitize_overflow_impl = _look_for_nothing
    core.block_type.__init__ = _describe_block
    core.tensor.__init__ = _describe_tensor


def _patch_once(function: Any) -> Any:
    """What a module sees of the language is patched, and never restored."""
    if function.__module__ not in _patched_modules:
        _patched_modules.add(function.__module__)
        _patch_language(function)
    return interpreter._LangPatchScope()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of one function by another."""
    _patch_once(self.fn)
    return self.rewrite()(*args, **kwargs)


def _look_for_nothing(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """Overflow is an error with the interpreter's option `debug` alone, which is off."""


def _get_np_dtype(dtype: Any) -> Any:
    element = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
    return _ADDRESS if isinstance(element, core.pointer_type) else _numpy_dtype(element)


@cache
def _describe_shape(shape: tuple[int, ...]) -> tuple[Any, int, Any, Any]:
    """A block's shape and number of elements, and the same as a value of that type has them."""
    num_elements = core.validate_block_shape(shape) if shape else 1
    dims = core.tuple([core.constexpr(size) for size in shape])
    return core.tuple(shape), num_elements, dims, core.constexpr(math.prod(shape))


def _describe_block(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in core._unwrap_if_constexpr(shape))
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, *_ = _describe_shape(sizes)
    self.name = f"<{sizes}, {element_ty}>"


def _describe_tensor(self: Any, handle: Any, type: Any) -> None:
    _, _, self.shape, self.numel = _describe_shape(tuple(type.shape) if type.is_block() else ())
    self.handle, self.type, self.dtype = handle, type, type.scalar
