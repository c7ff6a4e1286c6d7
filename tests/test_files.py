"""Files are written whole or not at all."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from smt_trainer import SMTError, files
from smt_trainer.files import new_folder, write_atomically, write_text
from smt_trainer.json_files import load_json
from smt_trainer.tensor_file import load_arrays


def fail_halfway(path):
    path.write_text("half")
    raise OSError("disk full")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail_halfway)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


LEFT = ".file.txt.0a_z9b8c.partial"


def test_the_next_write_removes_what_a_killed_process_left_and_nothing_else(tmp_path, warnings):
    others = [".file.txt.0a_z9b8c", ".file.txt.partial", ".other.txt.0a_z9b8c.partial", "file.txt.0a_z9b8c.partial"]
    for name in (LEFT, *others):
        (tmp_path / name).write_text("half")
    (tmp_path / ".file.txt.link_123.partial").symlink_to(others[0])
    (tmp_path / ".file.txt.folder_1.partial").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    write_text(tmp_path / "file.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == before - {LEFT} | {"file.txt"}
    assert warnings() == [f"Removed {tmp_path / LEFT}, which a killed process left."]


def test_without_locks_nothing_is_taken_for_left(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / LEFT).write_text("half")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    write_text(tmp_path / "file.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == {LEFT, "file.txt"}


@pytest.mark.parametrize("unlinks_in_time", [True, False])
def test_a_file_that_another_process_takes_for_left_before_it_is_locked_is_made_again(
    unlinks_in_time, tmp_path, monkeypatch
):
    lock, lost = files._lock, []

    def after_the_other(descriptor):
        if lost:
            return lock(descriptor)
        lost.extend(tmp_path.iterdir())
        if unlinks_in_time:
            lost[0].unlink()
            return lock(descriptor)
        return False

    monkeypatch.setattr(files, "_lock", after_the_other)
    write_text(tmp_path / "file.txt", "text")
    assert len(lost) == 1 and (tmp_path / "file.txt").read_text() == "text"
    assert {*tmp_path.iterdir()} - {*lost} == {tmp_path / "file.txt"}


def test_missing_parent_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "file.txt", "text")
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "text"


def test_files_and_folders_have_the_usual_mode(tmp_path):
    umask = os.umask(0o022)
    try:
        write_text(tmp_path / "file.txt", "text")
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(umask)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file.txt", "folder")]
    assert modes == [0o644, 0o755]


def test_a_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "out") as stage:
        (stage / "file.txt").write_text("text")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file.txt").read_text() == "text"


def test_the_files_of_a_folder_are_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor):
        assert not (tmp_path / "output").exists()
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(tmp_path / "output") as folder:
        (folder / "part").mkdir()
        paths = [folder / "a", folder / "part" / "b"]
        for path in paths:
            path.write_text("text")
    assert sorted(flushed) == sorted(path.stat().st_ino for path in (tmp_path / "output").rglob("*") if path.is_file())


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "new/..", str(tmp_path)):
        with pytest.raises(SMTError, match="is the working folder"), new_folder(Path(name)):
            pass


def test_a_folder_that_failed_does_not_appear(tmp_path):
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "out") as stage:
        fail_halfway(stage / "file.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_file_is_refused_saying_what_it_should_have_been(tmp_path):
    damaged = tmp_path / "damaged"
    damaged.write_text("{")
    for read, kind in ((load_json, "is not valid JSON"), (load_arrays, "is damaged or truncated")):
        for path, message in ((tmp_path / "missing", "no recipe at"), (damaged, kind)):
            with pytest.raises(SMTError, match=message):
                read(path, "recipe")
