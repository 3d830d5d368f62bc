"""A lock on a file."""

import subprocess
import sys
from pathlib import Path

import pytest

from producer.file_lock import FileLockedError, locked

_HOLD = "import sys, pathlib; from producer.file_lock import locked\nwith locked(pathlib.Path(sys.argv[1])):\n  print(1, flush=True); sys.stdin.read()"  # noqa: E501


def test_one_at_a_time_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with locked(path), pytest.raises(FileLockedError), locked(path):
        pass
    with locked(path):
        pass


def test_it_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, path], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdin is not None
    holder.stdout.readline()
    with pytest.raises(FileLockedError), locked(path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    holder.stdin.close()
    with locked(path):
        pass


def test_a_file_that_its_holder_removed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with locked(path):
        path.unlink()
        with locked(path):
            assert path.exists()


def test_what_the_file_holds_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with locked(path):
        assert path.read_text() == "kept"
