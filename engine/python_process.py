"""Starts a process of ours: Python, from what this one imports from, with nothing to read but the ends it is handed."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

_Output = int | IO[bytes] | None  # None: this process's own


def start_python(
    module: str,
    arguments: Sequence[object],
    *,
    fds: Sequence[int],
    env: Mapping[str, str],
    stdout: _Output = None,
    stderr: _Output = None,
) -> "subprocess.Popen[bytes]":
    """Run `main()` of a module. fds: what it inherits; env: its environment but for the search path of modules."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {module} import main; main()", *map(str, arguments)],
        pass_fds=fds,
        env={**env, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
    )
