"""Builds of the C kernels that nobody runs: that they compile shows without the optimiser, in a third of the time."""

import pytest

from engine.kernels import build


def leave_unoptimised(monkeypatch: pytest.MonkeyPatch) -> None:
    optimisation, *others = build._FLAGS
    assert optimisation == "-O3"
    monkeypatch.setattr(build, "_FLAGS", ("-O0", *others))
