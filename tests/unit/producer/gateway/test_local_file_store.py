"""Files' bytes in a folder: whole or not there, never again after they were deleted."""

import os
import pwd
from pathlib import Path

import pytest

from producer.errors import FileStoreError, SettingsError
from producer.gateway.files.local import IDENTITY_NAME, LocalFileStore
from producer.gateway.files.select import select_file_store


@pytest.fixture
def store(tmp_path: Path) -> LocalFileStore:
    store = LocalFileStore(tmp_path / "files")
    store.check()
    return store


def names(store: LocalFileStore) -> set[str]:
    return {path.name for path in Path(store.where).iterdir() if not path.name.startswith(".")}


def test_a_folder_in_the_home_of_a_user_who_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's user that the image does not know."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(SettingsError, match=r"--files .* this user has none: set HOME"):
        select_file_store("~/files")


def test_a_part_is_there_once_it_is_committed_and_can_be_read_from_anywhere(store: LocalFileStore) -> None:
    data = bytes(range(256)) * 4000
    with store.writer("part") as writer:
        writer.write(data[:7])
        writer.write(data[7:])
        assert "part" not in names(store)
    assert writer.num_bytes == len(data) and names(store) == {"part"}
    assert b"".join(store.read("part")) == data
    assert b"".join(store.read("part", offset=len(data) - 5)) == data[-5:]


def test_a_writer_that_fails_leaves_nothing(store: LocalFileStore) -> None:
    with pytest.raises(KeyError), store.writer("part") as writer:
        writer.write(b"x")
        raise KeyError
    assert names(store) == set()
    with pytest.raises(FileStoreError, match="part part cannot be read"):
        next(store.read("part"))


def test_what_was_deleted_under_a_living_writer_is_not_committed(store: LocalFileStore) -> None:
    with pytest.raises(FileStoreError, match="cannot be written"), store.writer("part") as writer:
        writer.write(b"x")
        store.delete("part")
    assert names(store) == set()


def test_deleting_takes_what_there_is_and_may_be_repeated(store: LocalFileStore) -> None:
    (Path(store.where) / "begun.unfinished").write_bytes(b"x")  # as a writer leaves it that was killed
    with store.writer("whole"):
        pass
    for part in ("begun", "whole", "whole", "never"):
        store.delete(part)
    assert names(store) == set()


def test_a_folder_has_one_identity_wherever_it_is_mounted(store: LocalFileStore, tmp_path: Path) -> None:
    again, other = LocalFileStore(Path(store.where)), LocalFileStore(tmp_path / "other")
    again.check(), other.check()
    assert store.identity == again.identity != other.identity
    (tmp_path / "moved").mkdir()
    Path(store.where).rename(tmp_path / "moved" / "files")
    moved = LocalFileStore(tmp_path / "moved" / "files")
    moved.check()
    assert moved.identity == store.identity


def test_a_check_leaves_a_folders_identity_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind one that was killed over making it, and beside one that makes it at the same time."""
    folder, link, late = tmp_path / "files", os.link, LocalFileStore(tmp_path / "files")
    folder.mkdir()
    (folder / f"{IDENTITY_NAME}-of-one-that-was-killed").write_text("x")

    def link_late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        LocalFileStore(folder).check()
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    late.check()
    assert [path.name for path in folder.iterdir()] == [IDENTITY_NAME]
    assert late.identity == LocalFileStore(folder).identity


def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"--files \(PROMPTMILL_FILES\): the folder .* cannot be written"):
        LocalFileStore(tmp_path / "file" / "folder").check()
