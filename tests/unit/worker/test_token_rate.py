"""The rate of tokens a worker reports."""

import pytest

from worker.token_rate import TokenRate


def test_the_rate_is_that_of_the_last_window() -> None:
    rate = TokenRate()
    for second in range(100):
        rate.add(float(second), 50 if second < 50 else 7)
    assert rate.per_second(99.0) == pytest.approx(7, rel=0.15)


def test_the_rate_falls_to_zero_when_nothing_comes() -> None:
    rate = TokenRate()
    rate.add(0.0, 100)
    assert rate.per_second(5.0) == pytest.approx(20)
    assert rate.per_second(11.0) == 0


def test_the_first_moment_is_not_blown_up() -> None:
    rate = TokenRate()
    rate.add(0.0, 40)
    assert rate.per_second(0.001) == 40
