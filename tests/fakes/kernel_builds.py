"""Builds of the C kernels that nobody runs: that they compile shows in a third of the time.

With -O0 it takes twice as long: what a constant rules out is left out by the optimiser alone.
"""

import pytest

from engine.kernels import build


def hardly_optimise(monkeypatch: pytest.MonkeyPatch) -> None:
    optimisation, *others = build._FLAGS
    assert optimisation == "-O3"
    monkeypatch.setattr(build, "_FLAGS", ("-Og", *others))
