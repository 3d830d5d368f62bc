"""A lock on a file."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from producer import file_lock
from producer.file_lock import FileLock, FileLockedError

_HOLD = """
import sys, pathlib
from producer.file_lock import FileLock
lock = FileLock(pathlib.Path(sys.argv[1]))
print(1, flush=True)
sys.stdin.read()
"""


def test_one_at_a_time_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with closing(FileLock(path)), pytest.raises(FileLockedError):
        FileLock(path)
    FileLock(path).close()


def test_it_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, path], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdin is not None
    holder.stdout.readline()
    with pytest.raises(FileLockedError):
        FileLock(path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    holder.stdin.close()
    FileLock(path).close()


def test_a_file_that_its_holder_removed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with closing(FileLock(path)):
        path.unlink()
        with closing(FileLock(path)):
            assert path.exists()


def test_what_the_file_holds_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with closing(FileLock(path)):
        assert path.read_text() == "kept"


@pytest.mark.parametrize("renames_onto_open_files", [True, False])
def test_a_file_that_takes_its_place_is_locked_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames_onto_open_files: bool
) -> None:
    path, link, whole = tmp_path / "file", tmp_path / "link", tmp_path / "whole"
    link.symlink_to(path)
    whole.write_text("new")
    rename, seen = os.replace, list[bool]()

    def replace(source: Path, target: Path) -> None:
        seen.append(_is_open(source) or _is_open(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(file_lock, "RENAMES_ONTO_OPEN_FILES", renames_onto_open_files)
    with closing(FileLock(link)) as lock:
        lock.replace(whole)
        assert path.read_text() == "new" and link.is_symlink() and not whole.exists()
        with pytest.raises(FileLockedError):
            FileLock(path)
        assert seen == [renames_onto_open_files]  # a system that refuses to rename over open files had no cause to
    FileLock(path).close()


def _is_open(path: Path) -> bool:
    """By this process."""
    of_file = path.stat()
    for number in os.listdir("/dev/fd"):
        try:
            if os.path.samestat(os.fstat(int(number)), of_file):
                return True
        except OSError:
            continue  # the listing's own
    return False


def test_who_locks_what_took_the_files_place_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "file", tmp_path / "whole"
    whole.touch()
    rename, others = os.replace, list[FileLock]()

    def replace(source: Path, target: Path) -> None:
        with pytest.raises(FileLockedError):  # until it has the new one, the old one is locked
            FileLock(target)
        rename(source, target)
        others.append(FileLock(target))

    monkeypatch.setattr(os, "replace", replace)
    with closing(FileLock(path)) as lock:
        with pytest.raises(FileLockedError):
            lock.replace(whole)
        others[0].close()
