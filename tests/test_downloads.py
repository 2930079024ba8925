"""Downloads from a misbehaving local server, and hostile archives."""

import contextlib
import hashlib
import http.server
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_sets
from conftest import ROOT

import imagesets
from imagesets import downloads, unpack


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes} and records requests; `behave` changes how it answers one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.behave = {}, [], lambda handler, number: None

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    ranges = True

    def do_GET(self):
        content = self.server.files.get(self.path.lstrip("/"))
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.behave(self, len(self.server.asked)) == "done":
            return
        if content is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.send_body(content[start:])

    def send_body(self, content):
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "RETRY_WAIT", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Handler, "ranges", True)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


CONTENT = np.random.default_rng(0).bytes(3_000_000)


def offered(server, file="birds.tgz", content=CONTENT, **changes):
    """An Archive that the server offers."""
    server.files[file] = content
    archive = downloads.Archive(file, server.url(file), len(content),
                                hashlib.md5(content).hexdigest())
    return archive._replace(**changes)


def cut_after(count, times=1):
    """Behaviour: the first `times` answers break off after `count` bytes."""
    def behave(handler, number):
        handler.send_body = lambda content: handler.wfile.write(
            content[:count] if number <= times else content)
    return behave


def tar(entries, mode="w:gz"):
    """A tar of {name: bytes or TarInfo}."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in entries.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def zipped(entries, kind=zipfile.ZIP_DEFLATED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return packed.getvalue()


# ------------------------------------------------------------------------------------------------
# One file
# ------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_checked_and_announced(server, tmp_path, capsys):
    archive, file = offered(server), tmp_path / "birds.tgz"
    assert downloads.download(archive, file) and file.read_bytes() == CONTENT
    printed = capsys.readouterr().err
    assert printed.startswith(f"downloading 3 MB from {archive.url} to {file}\n")
    assert re.search(r"downloading birds.tgz  3 MB/3 MB  \S+ [kMG]?B/s  eta 0:00", printed)
    assert not downloads.download(archive, file), "it is there and correct"
    assert server.asked == [None] and list(tmp_path.iterdir()) == [file]


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.behave = cut_after(1_000_000, times=2)
    downloads.download(offered(server), tmp_path / "birds.tgz")
    assert (tmp_path / "birds.tgz").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_later_process_resumes_where_the_first_one_died(server, tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(CONTENT[:2_500_000])
    downloads.download(offered(server), tmp_path / "birds.tgz")
    assert (tmp_path / "birds.tgz").read_bytes() == CONTENT and server.asked == ["bytes=2500000-"]


def test_a_complete_part_is_only_checked(server, tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(CONTENT)
    downloads.download(offered(server), tmp_path / "birds.tgz")
    assert (tmp_path / "birds.tgz").read_bytes() == CONTENT and server.asked == []


def test_a_part_longer_than_the_file_is_downloaded_again(server, tmp_path):
    """The server answers 416 to a start beyond the end. Without md5, only it knows the end."""
    (tmp_path / "birds.tgz.part").write_bytes(CONTENT + b"more")
    downloads.download(offered(server, md5=None), tmp_path / "birds.tgz")
    assert (tmp_path / "birds.tgz").read_bytes() == CONTENT
    assert server.asked == ["bytes=3000004-", None]


def test_a_server_without_ranges_sends_the_whole_file_again(server, tmp_path, monkeypatch):
    """Appending the whole file to its first half would double that half."""
    monkeypatch.setattr(Handler, "ranges", False)
    server.behave = cut_after(1_000_000)
    downloads.download(offered(server), tmp_path / "birds.tgz")
    assert (tmp_path / "birds.tgz").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-"]


def test_an_answer_that_starts_at_another_byte_is_refused(server, tmp_path):
    def behave(handler, number):
        if handler.headers.get("Range"):
            handler.send_response(206)
            handler.send_header("Content-Range", "bytes 7-9/10")
            handler.send_header("Content-Length", "3")
            handler.end_headers()
            handler.wfile.write(b"abc")
            return "done"

    server.behave = behave
    (tmp_path / "birds.tgz.part").write_bytes(CONTENT[:99])
    downloads.download(offered(server), tmp_path / "birds.tgz")
    assert (tmp_path / "birds.tgz").read_bytes() == CONTENT


def test_a_slow_server_is_kept_and_a_silent_one_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)

    def slowly(handler, number):
        def send(content):
            for i in range(0, len(content), 500_000):
                time.sleep(0.1)
                handler.wfile.write(content[i:i + 500_000])
                if number == 1 and i > 1_000_000:
                    time.sleep(1)                     # silence: longer than the timeout
                    return
        handler.send_body = send

    server.behave = slowly
    downloads.download(offered(server), tmp_path / "birds.tgz")
    assert (tmp_path / "birds.tgz").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=2000000-"], "bytes before the silence are kept"


def test_temporary_errors_are_retried_and_others_are_not(server, tmp_path):
    def busy(handler, number):
        if number < 3:
            handler.send_error(503)
            return "done"

    archive, server.behave = offered(server), busy
    downloads.download(archive, tmp_path / "birds.tgz")
    assert len(server.asked) == 3
    with pytest.raises(ConnectionError, match="404"):
        downloads.download(archive._replace(url=server.url("gone")), tmp_path / "gone.tgz")
    assert len(server.asked) == 4 and [path.name for path in tmp_path.iterdir()] == ["birds.tgz"]


def test_no_network_says_what_to_fetch_and_where_to_put_it(server, tmp_path):
    archive = offered(server, url="http://127.0.0.1:9/birds.tgz")
    with pytest.raises(ConnectionError) as error:
        downloads.download(archive, tmp_path / "birds.tgz")
    for part in (archive.url, archive.md5, str(tmp_path / "birds.tgz"), "refused"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_always_breaks_is_given_up_and_its_part_kept(server, tmp_path):
    def broken(handler, number):
        handler.send_body = lambda content: handler.wfile.write(content[:1000 * (number == 1)])

    server.behave = broken
    with pytest.raises(ConnectionError, match="ended 3 MB early"):
        downloads.download(offered(server), tmp_path / "birds.tgz")
    assert len(server.asked) == 1 + downloads.MAX_TRIES
    assert [path.name for path in tmp_path.iterdir()] == ["birds.tgz.part"]


def test_a_server_without_ranges_that_always_breaks_is_given_up(server, tmp_path, monkeypatch):
    """Every connection starts at byte 0: sending less, then more, is not progress."""
    monkeypatch.setattr(Handler, "ranges", False)

    def broken(handler, number):
        handler.send_body = lambda content: handler.wfile.write(content[:1000 + 500 * (number % 2)])

    server.behave = broken
    with pytest.raises(ConnectionError, match="early"):
        downloads.download(offered(server), tmp_path / "birds.tgz")
    assert len(server.asked) <= 1 + downloads.MAX_TRIES


def test_a_wrong_md5_prints_both_and_keeps_nothing(server, tmp_path):
    archive = offered(server, md5="0" * 32)
    with pytest.raises(ValueError) as error:
        downloads.download(archive, tmp_path / "birds.tgz")
    for part in ("0" * 32, hashlib.md5(CONTENT).hexdigest(), "3000000 bytes"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_sha256_is_checked_where_one_is_published(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    downloads.download(offered(server, md5=None, sha256=digest), tmp_path / "birds.tgz")
    with pytest.raises(ValueError, match=f"sha256 {digest}, 3000000 bytes; expected sha256 00"):
        downloads.download(offered(server, md5=None, sha256="0" * 64), tmp_path / "birds.tgz")
    assert imagesets.SETS["cassava"].archives[0].checksum[0] == "sha256"


def test_a_wrong_file_put_there_by_hand_is_named_and_left_alone(server, tmp_path):
    (tmp_path / "birds.tgz").write_bytes(b"a web page that asks for a login")
    with pytest.raises(ValueError, match="birds.tgz is not the expected file.*Remove it"):
        downloads.download(offered(server), tmp_path / "birds.tgz")
    assert (tmp_path / "birds.tgz").exists() and server.asked == []


def test_a_file_longer_than_stated_is_cut_off(server, tmp_path):
    """An endless answer would fill the disk."""
    for archive in (offered(server, size=1_000_000), offered(server, size=1_000_000, md5=None)):
        with pytest.raises(ValueError, match="longer than expected: .* instead of 1000000"):
            downloads.download(archive, tmp_path / "birds.tgz")
        assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------
# A set
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def cub_server(server, tmp_path, monkeypatch):
    """A server that offers a tiny CUB and is its only source."""
    made = tmp_path / "made"
    wanted = tiny_sets.cub(made)
    packed = tar({path.relative_to(made).as_posix(): path.read_bytes()
                  for path in made.rglob("*") if path.is_file()} | {"attributes.txt": b"1 blue"})
    archive = offered(server, "CUB_200_2011.tgz", packed)
    monkeypatch.setitem(imagesets.SETS, "cub", imagesets.SETS["cub"]._replace(archives=(archive,)))
    server.wanted = wanted
    return server


def test_a_named_set_is_downloaded_and_unpacked_and_nothing_else_is_left(cub_server, tmp_path):
    root = tmp_path / "new" / "root"
    for _ in range(2):
        records = imagesets.read("cub", root)
        assert {path.relative_to(root).as_posix() for path in records.paths} == \
            cub_server.wanted.keys()
    assert [path.name for path in root.iterdir()] == ["CUB_200_2011"], "nothing else is left"
    assert len(cub_server.asked) == 1, "an existing set is not downloaded again"


def test_an_archive_put_there_by_hand_is_used_and_kept(cub_server, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "CUB_200_2011.tgz").write_bytes(cub_server.files["CUB_200_2011.tgz"])
    imagesets.read("cub", tmp_path / "root")
    assert cub_server.asked == []
    assert {path.name for path in (tmp_path / "root").iterdir()} == {"CUB_200_2011",
                                                                      "CUB_200_2011.tgz"}


def test_a_failed_check_leaves_no_set(cub_server, tmp_path):
    cub_server.files["CUB_200_2011.tgz"] = cub_server.files["CUB_200_2011.tgz"][:-1] + b"x"
    with pytest.raises(ValueError, match="md5"):
        imagesets.read("cub", tmp_path / "root")
    assert {path.name for path in (tmp_path / "root").iterdir()} <= {".cub.lock"}


@pytest.mark.parametrize("name, files", [
    ("flowers", {"102flowers.tgz": "jpg", "imagelabels.mat": None, "setid.mat": None}),
    ("pets", {"images.tar.gz": "images", "annotations.tar.gz": "annotations"}),
    ("dogs", {"images.tar": "Images", "annotation.tar": "Annotation", "lists.tar": "."}),
    ("aircraft", {"a.tar.gz": "fgvc-aircraft-2013b"}), ("cassava", {"c.zip": "cassavaleafdata"}),
    ("grocery", {"g.zip": "GroceryStoreDataset-master"})])
def test_each_public_set_is_complete_after_its_archives_are_unpacked(name, files, server, tmp_path,
                                                                  monkeypatch):
    """Some archives contain the set's folder, some its content; some sets have several archives."""
    made = tmp_path / "made"
    wanted = tiny_sets.SETS[name](made)
    top, = made.iterdir()
    archives = []
    for archive, (file, inside) in zip(imagesets.SETS[name].archives, files.items(), strict=True):
        assert archive.url.endswith(("master.zip", "cassavaleafdata.zip", "2013b.tar.gz", file))
        if inside is None:
            content = (top / file).read_bytes()
        else:
            base = made if inside == top.name else top
            paths = (base / inside).glob("*.mat" if inside == "." else "**/*")
            content = {path.relative_to(base).as_posix(): path.read_bytes()
                       for path in paths if path.is_file()}
            content = zipped(content) if file.endswith("zip") else tar(content)
        archives.append(offered(server, archive.file, content))
    monkeypatch.setitem(imagesets.SETS, name,
                        imagesets.SETS[name]._replace(archives=tuple(archives)))
    records = imagesets.read(name, tmp_path / "root")
    assert {path.relative_to(tmp_path / "root").as_posix() for path in records.paths} == \
        wanted.keys()


def test_two_processes_download_a_set_once(cub_server, tmp_path):
    """The one that waits takes over if the other is killed."""
    cub_server.behave = lambda handler, number: time.sleep(0.5)
    archive, = imagesets.SETS["cub"].archives
    code = ("import sys; from pathlib import Path; from imagesets import downloads\n"
            f"archive = downloads.Archive{tuple(archive)}\n"
            "downloads.download_set('cub', [archive], Path(sys.argv[1]), 'CUB_200_2011')\n"
            "print(len(list(Path(sys.argv[1], 'CUB_200_2011').iterdir())))")

    def start(root):
        return subprocess.Popen([sys.executable, "-c", code, root], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    both = [start(tmp_path / "a") for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in results] == ["6\n", "6\n"], results
    assert len(cub_server.asked) == 1
    assert sum("waiting for another process" in error for _, error in results) == 1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["CUB_200_2011"]

    killed = threading.Event()
    cub_server.behave = lambda handler, number: number == 2 and killed.wait(60) and None
    first = start(tmp_path / "b")
    while len(cub_server.asked) < 2:
        time.sleep(0.01)
    second = start(tmp_path / "b")
    assert "waiting" in second.stderr.readline()
    first.kill()
    first.communicate()
    killed.set()
    assert second.communicate(timeout=60)[0] == "6\n"


def test_a_full_disk_is_an_error_before_the_download(cub_server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="cannot store cub in .*needs .* kB.*1 kB are free.*--root"):
        imagesets.read("cub", tmp_path / "root")
    assert cub_server.asked == []


@pytest.mark.parametrize("limit", [5_000, 25_000])  # while the archive, or an image, is written
def test_a_disk_that_fills_up_leaves_no_set_and_the_download(cub_server, tmp_path, limit):
    resource = pytest.importorskip("resource", reason="Windows has no limit on a file's size")
    big = tar({"CUB_200_2011/images.txt": bytes(range(256)) * 200})
    archive = offered(cub_server, "CUB_200_2011.tgz",
                      big if limit > len(big) else CONTENT[:20_000])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="cannot store cub in .*too large.*Free some space"):
            downloads.download_set("cub", [archive], tmp_path / "root", "CUB_200_2011")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = {path.name for path in (tmp_path / "root").iterdir()}
    assert left in ({".cub.lock", "CUB_200_2011.tgz.part"}, {".cub.lock", "CUB_200_2011.tgz"})


# ------------------------------------------------------------------------------------------------
# Archives
# ------------------------------------------------------------------------------------------------


def entry(name, kind, target=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def link_in_zip(name, target):
    made = zipfile.ZipInfo(name)
    made.create_system, made.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(made, target)
        archive.writestr(f"{name}/evil.txt", "through the link")
    return packed.getvalue()


HOSTILE = {  # name: (archive, what the error says)
    "tar, parent": (tar({"a.jpg": b"1", "../evil.txt": b"2"}), "outside"),
    "tar, parent inside": (tar({"a/../../evil.txt": b"2"}), "outside"),
    "tar, absolute": (tar({"/tmp/fgssl_evil.txt": b"2"}), "outside"),
    "tar, backslash": (tar({"..\\evil.txt": b"2"}), "outside"),
    "tar, drive": (tar({"C:/evil.txt": b"2"}), "outside"),
    "tar, symlink": (tar({"s": entry("s", tarfile.SYMTYPE, ".."), "s/evil.txt": b"2"}), "link"),
    "tar, hard link": (tar({"h": entry("h", tarfile.LNKTYPE, "/etc/passwd")}), "link"),
    "tar, device": (tar({"d": entry("d", tarfile.CHRTYPE)}), "device"),
    "tar, pipe": (tar({"p": entry("p", tarfile.FIFOTYPE)}), "device"),
    "tar, bomb": (tar({"zeros": bytes(20_000_000)}), "times its size"),
    "tar, many files": (tar({f"{i}": b"" for i in range(4000)}), "times its size"),
    "tar, cut short": (tar({"a.jpg": CONTENT[:9999]})[:5000], "cannot be used"),
    "tar, no archive": (b"<html>404</html>", "cannot be used"),
    "tar, file and folder": (tar({"a": b"1", "a/b": b"2"}), "cannot be used"),
    "zip, folder and file": (zipped({"a/b": b"1", "a": b"2"}), "cannot be used"),
    "zip, long": (zipped({"a" * 300: b"1"}), "cannot be used"),
    "zip, dot": (zipped({".": b"1"}), "cannot be used"),
    "zip, parent": (zipped({"../evil.txt": b"2"}), "outside"),
    "zip, absolute": (zipped({"/tmp/fgssl_evil.txt": b"2"}), "outside"),
    "zip, symlink": (link_in_zip("s", ".."), "link"),
    "zip, bomb": (zipped({"zeros": bytes(20_000_000)}), "times its size"),
    "zip, cut short": (zipped({"a.jpg": CONTENT[:9999]})[:5000], "cannot be used"),
    "zip, damaged": (zipped({"a.jpg": CONTENT[:9999]}, zipfile.ZIP_STORED).replace(
        CONTENT[100:120], bytes(20)), "cannot be used"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_writes_nothing_outside_its_folder(name, tmp_path, monkeypatch):
    content, message = HOSTILE[name]
    monkeypatch.setattr(unpack, "CHUNK", 1 << 16)
    file = tmp_path / "root" / f"birds.{name[:3]}"
    file.parent.mkdir()
    file.write_bytes(content)
    archive = downloads.Archive(file.name, "http://127.0.0.1:9", len(content))
    with pytest.raises(ValueError, match=f"birds.{name[:3]}.*{message}"):
        downloads.download_set("birds", [archive], tmp_path / "root", "birds")
    assert {path.name for path in tmp_path.rglob("*")} <= {"root", file.name, ".birds.lock"}
    assert not Path("/tmp/fgssl_evil.txt").exists()


def test_an_unusable_archive_is_kept_only_if_a_user_put_it_there(server, tmp_path):
    """Without an md5 only unpacking finds it; if kept, it would be used again."""
    archive = offered(server, "birds.zip", b"<html>login</html>", md5=None)
    for there in (False, True):
        if there:
            (tmp_path / "birds.zip").write_bytes(b"<html>login</html>")
        with pytest.raises(ValueError, match="birds.zip cannot be used"):
            downloads.download_set("birds", [archive], tmp_path, "birds")
        assert (tmp_path / "birds.zip").exists() == there


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_is_unpacked_unchanged(kind, tmp_path):
    entries = {"a/deep/é 鳥.jpg": CONTENT, "a/empty": b"", "./b.txt": b"text"}
    folders = {"c/": b""} if kind == "zip" else {"c": entry("c", tarfile.DIRTYPE)}
    (tmp_path / f"x.{kind}").write_bytes((tar if kind == "tar" else zipped)(entries | folders))
    unpack.unpack(tmp_path / f"x.{kind}", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
             for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {os.path.normpath(name): content for name, content in entries.items()}
    assert (tmp_path / "out" / "c").is_dir()


def test_whatever_is_wrong_with_an_archive_the_error_names_it(tmp_path):
    """Python's readers raise errors of many kinds: struct.error, OverflowError, ..."""
    rng, refused = np.random.default_rng(0), 0
    entries = {f"{i}.txt": bytes(rng.integers(0, 256, 50, np.uint8)) for i in range(4)}
    for kind, content in (("tar", tar(entries, "w")), ("tar", tar(entries)),
                          ("zip", zipped(entries))):
        for trial in range(120):
            mutated = bytearray(content)
            for place in rng.integers(0, len(content), 1 + trial % 6):
                mutated[place] = rng.integers(256)
            file = tmp_path / f"x.{kind}"
            file.write_bytes(mutated)
            try:
                unpack.unpack(file, tmp_path / "out")
            except ValueError as error:
                refused += 1
                assert str(file) in str(error)
            except OSError:  # a name that the disk refuses, such as a file used as a folder
                refused += 1
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > 100, "nothing was damaged"


def test_progress_yields_every_item_and_ends_with_the_whole_count(capsys):
    assert list(downloads.progress("abc", 3, "reading")) == ["a", "b", "c"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("reading  3/3  ")
    assert list(downloads.progress("abc", 3, "reading", patience=60)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", ""), "short work prints nothing"
    assert list(downloads.progress([b"1234"], None, "unpacking", len)) == [b"1234"]
    assert capsys.readouterr().err.startswith("unpacking  4 bytes  ")
    sizes = (0, 999, 15_000, 999_600, 123_456_789, 2_753_340_328)
    assert [downloads.format_bytes(n) for n in sizes] == [
        "0 bytes", "999 bytes", "15 kB", "1 MB", "123 MB", "2.75 GB"]
