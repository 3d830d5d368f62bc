"""A file takes its name when it is whole, and what a killed writer left is removed by a later one."""

import os
import time
from pathlib import Path

import pytest

from engine.staged_file import staged_file


def test_a_file_takes_its_name_at_the_end_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    with staged_file(tmp_path / "sub" / "file") as staging:
        staging.write_text("whole")
        assert not (tmp_path / "sub" / "file").exists()
    assert [path.read_text() for path in (tmp_path / "sub").iterdir()] == ["whole"]
    assert (tmp_path / "sub" / "file").stat().st_mode & 0o777 == 0o644
    with pytest.raises(ValueError, match="half"), staged_file(tmp_path / "other"):
        raise ValueError("half")
    assert [path.name for path in tmp_path.iterdir()] == ["sub"]


def test_what_a_killed_writer_left_goes_after_a_day_and_nobody_elses(tmp_path: Path) -> None:
    abandoned = staged_file(tmp_path / "file")
    left = abandoned.__enter__()
    (others := tmp_path / "download.partial").touch()
    long_ago = time.time() - 90_000
    os.utime(others, (long_ago, long_ago))
    for is_old in (False, True):
        if is_old:
            os.utime(left, (long_ago, long_ago))
        with staged_file(tmp_path / "file") as staging:
            staging.touch()
        assert left.exists() is not is_old
    assert others.exists()
