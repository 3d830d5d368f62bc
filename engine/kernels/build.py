"""Compiles the C kernels for this very CPU on first use, with the system's C compiler, and keeps the result.

A build is named by a hash of the sources, the compiler, its flags and the CPU, so that a cache shared between machines
never hands one the other's code. It gets its name only when it is whole.
"""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
from hashlib import blake2b
from pathlib import Path

import torch

from engine.kernels.cpu_features import cpu_flags, cpu_name
from engine.staged_file import staged_file

logger = logging.getLogger(__name__)

_SOURCE_DIR = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
# Nothing here may reorder floating-point operations (no -ffast-math): a row's order is the kernels' promise.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-lm")
_COMPILE_TIMEOUT_SECONDS = 120.0


class KernelBuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def build_library(name: str, kernels_dir: Path, *, flags: tuple[str, ...] = ()) -> Path:
    """Return the compiled `name`.c as a shared library under `kernels_dir`. Raises `KernelBuildError`.

    flags: the compiler's, beside those that all kernels get.
    """
    compiler = next((path for path in map(shutil.which, _COMPILERS) if path), None)
    if compiler is None:
        raise KernelBuildError(f"no C compiler ({', '.join(_COMPILERS)}) is installed")
    flags = (_architecture_flag(), *flags, *_openmp_flags(), *_FLAGS)
    library = kernels_dir / f"{name}-{_build_key(compiler, flags)}.so"
    if not library.exists():
        _compile(compiler, _SOURCE_DIR / f"{name}.c", flags, library)
    return library


def load_library(path: Path) -> ctypes.CDLL:
    """Load a built library. Raises `KernelBuildError` if it does not load here."""
    try:
        if _is_macos():
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libomp.dylib"), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"{path} does not load ({error}); delete it to have it built again") from error


def _compile(compiler: str, source: Path, flags: tuple[str, ...], library: Path) -> None:
    try:
        with staged_file(library) as staging:
            _run_compiler(compiler, source, flags, staging)
            staging.chmod(0o755)
    except OSError as error:
        raise KernelBuildError(
            f"{library.parent} cannot be written ({error}); set HOME, or cache_dir, to a folder that can"
        ) from error
    logger.info("action=kernels_compiled name=%s compiler=%s", library.name, compiler)


def _run_compiler(compiler: str, source: Path, flags: tuple[str, ...], target: Path) -> None:
    # Libraries stand behind the sources that need them, or some linkers drop them.
    command = [compiler, *flags[:-1], "-o", str(target), str(source), flags[-1]]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{compiler} cannot compile {source.name}: {error}") from error
    if result.returncode != 0:
        raise KernelBuildError(f"{compiler} cannot compile {source.name}: {result.stderr.strip()[-500:]}")


def _architecture_flag() -> str:
    """On 64-bit Arm not `native`: of a CPU that gcc 12 does not know it makes a set of features that its own header for
    vectors, or the assembler, refuses. Beyond these two the kernels would use nothing."""
    if platform.machine() in ("x86_64", "AMD64", "i686"):
        return "-march=native"
    if platform.machine() not in ("aarch64", "arm64"):
        return "-mcpu=native"
    has_dot_product = _is_macos() or "asimddp" in cpu_flags()  # Linux' name; every chip of Apple's has it
    return "-march=armv8.2-a+dotprod" if has_dot_product else "-march=armv8-a"


def _openmp_flags() -> tuple[str, ...]:
    """Apple's compiler knows OpenMP but has no library of it: there the kernels find torch's when they are loaded."""
    if not _is_macos():
        return ("-fopenmp",)
    return ("-Xclang", "-fopenmp", "-Xlinker", "-undefined", "-Xlinker", "dynamic_lookup")


def _is_macos() -> bool:
    return platform.system() == "Darwin"


def _build_key(compiler: str, flags: tuple[str, ...]) -> str:
    """Names the build. The compiler is told apart by its file, which costs less than asking it for its version."""
    stat = os.stat(compiler)
    parts = [path.read_text() for path in sorted(_SOURCE_DIR.glob("*.[ch]"))]
    parts += [os.path.realpath(compiler), str(stat.st_size), str(stat.st_mtime_ns), *flags]
    parts += [platform.machine(), cpu_name(), *sorted(cpu_flags())]
    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
