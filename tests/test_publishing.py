"""A folder has its old content or its new one, whenever the process that writes it dies."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baichuan.util import files, publishing
from baichuan.util.files import atomic_path
from baichuan.util.publishing import publish_folder, staged_folder, synced_meanwhile
from baichuan.util.signals import Terminated, termination_raises

KILLS = 24
FILES = 20
# Publishes one content after another, each of files that all say its number, until it is killed.
WRITER = f"""
import sys
from itertools import count
from pathlib import Path
from baichuan.util.publishing import publish_folder, staged_folder
from baichuan.util.signals import Terminated, termination_raises
folder = Path(sys.argv[1])
try:
    with termination_raises():
        for number in count(int(sys.argv[2])):
            with staged_folder(folder) as staged:
                for name in [*map(str, range({FILES})), "last", f"of_{{number}}"]:
                    (staged / name).write_text(str(number))
                print(number, flush=True)
                publish_folder(staged, folder, {{f"of_{{number - 1}}"}}, "last")
except (KeyboardInterrupt, Terminated):
    pass
"""


def content(folder: Path) -> int:
    """The number that every file says."""
    names = {path.name for path in folder.iterdir()} - {"notes.txt"}
    (number,) = {int((folder / name).read_text()) for name in names}
    assert names == {*map(str, range(FILES)), "last", f"of_{number}"}
    assert (folder / "notes.txt").read_text() == "somebody else's"
    return number


def killed(process: subprocess.Popen, by: signal.Signals) -> list[str]:
    """What it said last."""
    while True:
        process.send_signal(by)
        try:
            return process.communicate(timeout=1)[0].split()
        except subprocess.TimeoutExpired:  # the signal came while it is ignored
            continue


def left_beside(folder: Path) -> list[Path]:
    return [path for path in folder.parent.iterdir() if path != folder]


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("somebody else's")
    return folder


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_kills_at_random_instants(folder, by):
    chance, number = random.Random(by), 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", WRITER, str(folder), str(number)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        process.stdout.readline()  # one content is published
        time.sleep(chance.uniform(0, 0.02))
        said = killed(process, by)
        assert process.returncode == (-by if by == signal.SIGKILL else 0)
        found = content(folder)
        assert found >= number and not (said and found < int(said[-1]) - 1)
        number = found + 1
        assert by == signal.SIGKILL or not left_beside(folder)
    with staged_folder(folder):
        pass
    assert not left_beside(folder)


@pytest.mark.parametrize("begin", [staged_folder, atomic_path])
def test_a_signal_just_before_what_is_temporary_is_removed(begin, tmp_path, monkeypatch):
    calls, remove = [], files.remove_temporary

    def interrupted(path):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(files, "remove_temporary", interrupted)
    target = tmp_path / "target"
    if begin is staged_folder:
        target.mkdir()
    with pytest.raises(KeyboardInterrupt), begin(target):
        pass
    assert len(calls) == 2 and not calls[0].exists()


def test_kills_notice_files_that_are_moved_one_by_one(folder):
    """The negative control."""
    slow = "os.replace = lambda old, new, rename=os.replace: (time.sleep(0.002), rename(old, new))"
    by_files = f"import os, time; from baichuan.util import publishing; publishing._exchange = lambda *_: False; {slow}"
    chance, mixed = random.Random(0), 0
    for _ in range(8):
        command = [sys.executable, "-c", f"{by_files}\n{WRITER}", str(folder), "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        killed(process, signal.SIGKILL)
        try:
            content(folder)
        except (AssertionError, ValueError):
            mixed += 1
    assert mixed


def test_without_exchange_the_last_file_is_last(folder, monkeypatch):
    monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    rename, renamed = os.replace, []
    monkeypatch.setattr(os, "replace", lambda old, new: (renamed.append(new.name), rename(old, new)))
    (folder / "old").write_text("")
    with staged_folder(folder) as staged:
        for name in ("a", "last", "z"):
            (staged / name).write_text("new")
        publish_folder(staged, folder, {"old"}, "last")
    assert renamed == ["a", "z", "last"]
    assert {path.name for path in folder.iterdir()} == {"a", "last", "notes.txt", "z"}


def test_somebody_elses_folder_and_the_mode_stay(folder):
    folder.chmod(0o750)
    for inner in (False, True):  # with a folder inside, files are moved one by one
        if inner:
            (folder / "inner").mkdir()
            (folder / "inner/file").write_text("theirs")
        with staged_folder(folder) as staged:
            (staged / "last").write_text(str(inner))
            publish_folder(staged, folder, {"last"}, "last")
        assert (folder / "last").read_text() == str(inner) and folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "inner/file").read_text() == "theirs"


def test_the_current_folder_stays_the_current_one(folder, monkeypatch):
    """A shell that stands in --output_dir sees the new content, not a deleted folder."""
    monkeypatch.chdir(folder)
    with staged_folder(Path(".")) as staged:
        (staged / "last").write_text("new")
        publish_folder(staged, Path("."), set(), "last")
    assert sorted(os.listdir()) == ["last", "notes.txt"] and not left_beside(folder)


def test_a_folder_that_is_being_filled_is_not_abandoned(folder):
    with staged_folder(folder) as first, staged_folder(folder):
        assert first.is_dir()


def test_a_device_or_a_pipe_is_not_replaced(folder):
    """Through a link too: root's run would replace the system's device by a file."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(FileExistsError, match="no file can replace"), atomic_path(folder / name) as path:
            path.write_text("new")
    assert (folder / "pipe").is_fifo() and (folder / "link").is_symlink()


def test_a_loop_of_links_is_an_error_of_the_system(folder):
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError), atomic_path(folder / "loop/x") as path:
        path.write_text("new")


def test_files_that_dead_writers_left_are_removed_and_those_of_living_ones_stay(folder):
    left = folder / ".x.unfinished-1"
    left.write_text("")
    os.utime(left, (0, 0))
    with atomic_path(folder / "x") as first:
        assert not left.exists()
        os.utime(first, (0, 0))
        with atomic_path(folder / "x") as second:
            assert first.exists()
            second.write_text("second")
        first.write_text("first")
    assert (folder / "x").read_text() == "first"
    assert {path.name for path in folder.iterdir()} == {"x", "notes.txt"}


def test_sigterm_is_an_exception_once():
    with pytest.raises(Terminated), termination_raises():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


@pytest.mark.parametrize("by, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_while_leftovers_are_deleted_comes_afterwards(folder, monkeypatch, by, raised):
    delete = files.shutil.rmtree

    def interrupted(path, **flags):
        signal.raise_signal(by)
        delete(path, **flags)

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(raised), termination_raises(), staged_folder(folder) as staged:
        (staged / "file").write_text("new")
    assert not left_beside(folder)


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The names of the files that reach the disk, as often as they do."""
    names, sync = [], publishing._sync
    monkeypatch.setattr(publishing, "_sync", lambda path, *errors: (sync(path, *errors), names.append(path.name)))
    return names


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_files_reach_the_disk_while_they_are_written(folder, synced):
    (folder / "scratch").write_text("x")
    with synced_meanwhile(folder, "*.txt"):
        wait_for(lambda: synced == ["notes.txt"])
        (folder / "later.txt").write_text("x")
        wait_for(lambda: synced == ["notes.txt", "later.txt"])
        (folder / "notes.txt").write_text("longer than before")
        wait_for(lambda: synced[2:] == ["notes.txt"])
        time.sleep(3 * publishing.SYNC_PAUSE_S)
        assert len(synced) == 3, "what has not changed is left alone"
    (folder / "after.txt").write_text("x")
    time.sleep(3 * publishing.SYNC_PAUSE_S)
    assert len(synced) == 3, "it ends with the block"


def test_many_files_do_not_keep_the_block_from_ending(folder, monkeypatch):
    begun = []
    monkeypatch.setattr(publishing, "_sync", lambda path, errors: (begun.append(path), time.sleep(0.05)))
    for number in range(200):
        (folder / f"{number}.bin").touch()
    with synced_meanwhile(folder, "*.bin"):
        wait_for(lambda: begun)
    assert len(begun) < 100


def test_what_cannot_be_stored_is_told_at_the_end(folder, monkeypatch):
    asked = []

    def fail(handle):
        asked.append(handle)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(publishing.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"), synced_meanwhile(folder, "*"):
        wait_for(lambda: asked)
    with pytest.raises(ZeroDivisionError), synced_meanwhile(folder, "*"):
        raise ZeroDivisionError  # not hidden by what the disk says


def test_what_cannot_be_opened_meanwhile_is_no_error(folder, monkeypatch):
    tried = []

    def fail(path, *flags):
        tried.append(path)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with synced_meanwhile(folder, "*.txt"):
        monkeypatch.setattr(publishing.os, "open", fail)
        wait_for(lambda: tried)
        monkeypatch.undo()
