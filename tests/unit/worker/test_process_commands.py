"""The commands by which our processes start others: what lies in the folder they start in is none of their modules."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from producer.gateway.batches import carrier_child
from worker import demo, gateway_process, worker_process


@pytest.mark.parametrize(
    "command",
    [worker_process.COMMAND, gateway_process.COMMAND, carrier_child.COMMAND, demo.VIEWER],
    ids=["worker", "gateway", "carrier", "demo's viewer"],
)
def test_a_users_own_modules_of_our_names_are_not_imported(command: Sequence[str], tmp_path: Path) -> None:
    for name in ("producer", "click"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the folder is searched')")
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PROMPTMILL_REDIS_URL": "nowhere"},  # so that it ends at once
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stderr and "the folder is searched" not in ended.stderr
