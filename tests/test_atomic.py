"""Files are whole: drafts have names of their own, reach the disk first, and go when nobody is
left to finish them."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

import atomic


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_old_content_stays_until_the_new_is_whole(tmp_path):
    file = tmp_path / "a.txt"
    with atomic.replacing(file) as draft:
        draft.write_text("one")
        assert not file.exists()
    with pytest.raises(ZeroDivisionError), atomic.replacing(file) as draft:
        draft.write_text("tw")
        1 / 0
    assert file.read_text() == "one" and listing(tmp_path) == ["a.txt"]


def test_a_draft_is_on_the_disk_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    """Renamed first, the file is empty after a power cut."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(
        "folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("rename") or replace(*names))
    with atomic.replacing(tmp_path / "a") as draft:
        draft.write_text("x")
    if os.path.exists("/proc/self/fd"):
        assert calls == ["file", "rename", "folder"]
    assert "rename" in calls


def test_writers_of_one_file_do_not_share_a_draft(tmp_path):
    """Named by the process's number, two containers wrote into one file."""
    file, together = tmp_path / "a", threading.Barrier(8)

    def write(text):
        with atomic.replacing(file) as draft:
            together.wait()
            draft.write_text(text * 100_000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = file.read_text()
    assert len(content) == 100_000 and len(set(content)) == 1
    assert listing(tmp_path) == ["a"]


@pytest.mark.skipif(atomic.fcntl is None, reason="this system has no flock")
def test_drafts_of_the_dead_are_removed_and_of_the_living_kept(tmp_path):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import atomic\n"
            "with atomic.replacing(sys.argv[2]) as draft:\n"
            "    draft.write_text('half'); print('ready', flush=True); time.sleep(60)")
    program = subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path / "a"],
                               stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "ready\n"
    with atomic.replacing(tmp_path / "a") as draft:
        draft.write_text("ours")
        assert len(listing(tmp_path)) == 2, "the other's draft is in use"
    assert len(listing(tmp_path)) == 2
    program.send_signal(signal.SIGKILL)
    program.wait()
    for _ in range(50):                                      # the system releases its lock
        with atomic.replacing(tmp_path / "a") as draft:
            draft.write_text("again")
        if listing(tmp_path) == ["a"]:
            break
        time.sleep(0.1)
    assert listing(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "again"
