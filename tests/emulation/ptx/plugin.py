"""A plugin of pytest: tests that run Triton's kernels run their machine code instead of the interpreter.

TRITON_INTERPRET=0 pytest -p tests.emulation.ptx.plugin tests/unit/engine/test_triton_attention.py
"""

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "0"


@pytest.fixture(autouse=True, scope="session")
def _emulated_gpu() -> Iterator[None]:
    from engine.attention import select
    from tests.emulation.ptx.launches import emulated_launches

    select._runs_triton = lambda device: ""
    with emulated_launches(90):
        yield
