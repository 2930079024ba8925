"""Files are whole: drafts have names of their own, reach the disk first, and go when nobody is
left to finish them."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

import atomic


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_old_content_stays_until_the_new_is_whole(tmp_path):
    file = tmp_path / ("a" * 240 + "é" * 5 + ".json")         # the longest name that a disk allows
    with atomic.replacing(file) as draft:
        draft.write_text("one")
        assert not file.exists()
    with pytest.raises(ZeroDivisionError), atomic.replacing(file) as draft:
        draft.write_text("tw")
        1 / 0
    assert file.read_text() == "one" and listing(tmp_path) == [file.name]


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


def start(code, *arguments):
    """A program that has printed "ready" and goes on."""
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import atomic, pathlib\n" + code
    program = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)],
                               stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "ready\n"
    return program


def kill(program):
    program.send_signal(signal.SIGKILL)
    program.wait()


@pytest.mark.skipif(atomic.fcntl is None, reason="this system has no flock")
@pytest.mark.parametrize("is_folder", [False, True])
def test_drafts_of_the_dead_are_removed_and_of_the_living_kept(tmp_path, is_folder):
    def draft():
        with atomic.drafting(tmp_path / "a[1]", is_folder):
            return len(listing(tmp_path))

    program = start("with atomic.drafting(sys.argv[1], sys.argv[2] == 'True') as draft:\n"
                    "    (draft / 'b' if draft.is_dir() else draft).write_text('half')\n"
                    "    print('ready', flush=True); time.sleep(60)",
                    tmp_path / "a[1]", is_folder)
    assert draft() == 2 and len(listing(tmp_path)) == 1, "the other's draft is in use"
    kill(program)
    assert draft() == 1 and listing(tmp_path) == []


def test_ctrl_c_keeps_a_draft_that_somebody_can_go_on_with(tmp_path):
    for keep, left in ((False, 0), (True, 1)):
        with pytest.raises(KeyboardInterrupt), atomic.drafting(tmp_path / "a", keep=keep) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt
        assert len(listing(tmp_path)) == left
    with pytest.raises(OSError), atomic.drafting(tmp_path / "a", keep=True):
        raise OSError
    assert len(listing(tmp_path)) == 1, "a draft of an error stays, or that of Ctrl-C went"


def test_a_folder_is_on_the_disk_with_all_its_files_before_it_gets_its_name(tmp_path, monkeypatch):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("this system does not name the files that are flushed")
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(
        os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("rename") or replace(*names))
    with atomic.drafting(tmp_path / "set", is_folder=True) as draft:
        (draft / "images").mkdir()
        for name in ("a.txt", "images/b.jpg"):
            (draft / name).write_text("x")
        (draft / "link").symlink_to("nowhere")
        atomic.publish(draft, tmp_path / "set")
    assert sorted(calls[:3]) == ["a.txt", "b.jpg", "images"]
    assert calls[3:] == [draft.name, "rename", tmp_path.name]
    assert listing(tmp_path / "set") == ["a.txt", "images", "link"]


def test_a_lock_is_one_process_s_and_dies_with_it(tmp_path, capsys):
    program = start("with atomic.lock(sys.argv[1], ''):\n"
                    "    print('ready', flush=True); time.sleep(60)", tmp_path / "lock")
    assert atomic.try_lock(tmp_path / "lock") is None
    threading.Timer(0.3, kill, [program]).start()
    with atomic.lock(tmp_path / "lock", "waiting for the other"):
        assert program.poll() is not None
    assert capsys.readouterr().err == "waiting for the other\n"
    with atomic.lock(tmp_path / "lock", "it is free"):
        pass
    assert capsys.readouterr().err == ""
