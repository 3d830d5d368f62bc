"""The table of promises in worker/README.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_every_promise_is_shown_by_a_test_that_exists() -> None:
    readme = (TESTS.parent / "worker" / "README.md").read_text()
    named = re.findall(r"`((?:integration|acceptance|unit)/\S+?\.py)::(test_\w+)`", readme)
    assert len(named) > 30
    for path, name in named:
        assert f"def {name}(" in (TESTS / path).read_text(), f"{path}::{name}"
