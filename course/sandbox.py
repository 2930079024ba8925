"""Starts a submission's process where it can read, reach and harm as little as the system allows.

    namespaces   Linux, as root or where users may make namespaces: its own file system (the
                 interpreter, the compiler and the submission, read-only; a small /tmp), its own
                 processes, no network, another user
    user         as root elsewhere: another user, limits
    limits       any other system: limits on memory, processes, files and time, and no more

`mode()` tries them in this order and says which it is. The file runs as a program, too: the
launcher, which isolates itself and then becomes worker.py.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USER = 2_000_000                         # and a number: users whom nobody else is, so that limits
                                         # on processes count those of one submission
SAYS = {"namespaces": "files, processes, network and user are apart",
        "user": "another user with limits, but this system allows no namespaces: a submission can "
                "read what everybody can (chmod go-rx this project), and reach the network",
        "limits": "limits only: this system allows neither namespaces nor another user. A "
                  "submission can read your files, solutions among them, and reach the network: "
                  "prefer Linux, or an account for grading alone"}
PROGRAMS = "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", \
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"
MEGABYTE = 2**20
# Bytes of address space: torch takes 0.6 GB, g++ 1 GB. A file; open files; threads and processes.
LIMITS = {"AS": 4096 * MEGABYTE, "FSIZE": 256 * MEGABYTE, "NOFILE": 256, "NPROC": 64, "CORE": 0}

NEWNS, NEWUTS, NEWIPC, NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
NEWPID, NEWNET = 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18


def user_number(job):
    """Another one for each job of each grader on this machine; fewer than 64 jobs."""
    return USER + 64 * os.getpid() + job


class Sandbox:
    """A running worker for the tree of one submission."""

    def __init__(self, tree, door, kind, user, seconds):
        self.work, self.user = Path(tree).parent, user if kind == "user" else None
        for name in ("root", "tmp"):
            (self.work / name).mkdir(exist_ok=True)
        (self.work / "tmp").chmod(0o777)
        argv = [sys.executable, "-m", "course.worker", str(door.fileno())]
        setup = dict(tree=str(tree), kind=kind, user=user, seconds=seconds, argv=argv)
        self.process = launch(setup, [door.fileno()])
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise RuntimeError(f"the sandbox did not start: {line}{self.process.stdout.read()}")
        self.pid = json.loads(line)["pid"]

    def kill(self):
        """End all its processes."""
        for end in (lambda: os.kill(self.pid, signal.SIGKILL),     # process 1 of its namespace
                    lambda: os.killpg(self.process.pid, signal.SIGKILL)):
            try:
                end()
            except (ProcessLookupError, PermissionError):
                pass
        if self.user:
            end_all_of(self.user)
        self.process.wait()
        self.process.stdout.close()


def end_all_of(user):
    """End all processes of a user, of whatever process group; as root."""
    subprocess.run(["sh", "-c", "kill -9 -1"], user=user, group=user, extra_groups=[])


def launch(setup, fds=()):
    return subprocess.Popen([sys.executable, "-I", __file__, json.dumps(setup)],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, pass_fds=fds, start_new_session=True)


def mode(work):
    """The first kind of isolation in which Python finds torch; work: a new folder."""
    (Path(work) / "tree").mkdir(parents=True)
    for folder in (work, work / "tree"):
        folder.chmod(0o755)
    for name in ("root", "tmp"):
        (Path(work) / name).mkdir()
    kinds = ["namespaces"] * (sys.platform == "linux") + ["user"] * (os.getuid() == 0)
    for kind in (*kinds, "limits"):
        argv = [sys.executable, "-c", "import torch"]
        process = launch(dict(tree=str(work / "tree"), kind=kind, user=user_number(63),
                              seconds=60, argv=argv))
        line = process.communicate()[0]
        if process.returncode == 0 and line.startswith("{"):
            return kind
    raise RuntimeError(f"no process can be started for submissions: {line}")


# ------------------------------------------------ in the launcher

def check(result, what):
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source, target, kind=None, flags=0, options=None):
    libc = ctypes.CDLL(None, use_errno=True)
    words = [word and str(word).encode() for word in (source, target, kind)]
    check(libc.mount(*words, ctypes.c_ulong(flags), options and options.encode()),
          f"mount {target}")


def bind(path, root):
    """Show a file or folder of the system under `root`, read-only."""
    target = Path(root + path)
    if os.path.islink(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.symlink_to(os.readlink(path))
    if os.path.isdir(path):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(path, target, flags=BIND | REC)
    kept = os.statvfs(target).f_flag & (NOSUID | NODEV | NOEXEC | 1024 | 2048)
    if not path.startswith("/dev/"):
        relatime = (1 << 21) * bool(os.statvfs(target).f_flag & 4096)
        mount(None, target, flags=BIND | REMOUNT | RDONLY | NOSUID | kept | relatime)


def own_root(tree, root):
    """A file system that holds the programs and the tree, and of this project nothing else."""
    mount("none", "/", flags=REC | PRIVATE)
    mount("none", root, "tmpfs", NOSUID, "size=64m,mode=755")
    for folder in ("proc", "tmp", "submission"):
        os.mkdir(f"{root}/{folder}")
    mount("none", f"{root}/tmp", "tmpfs", NOSUID | NODEV, "size=512m,mode=1777")
    python = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)),
              *sysconfig.get_paths().values()}
    paths = [path for path in (*PROGRAMS, *sorted(python)) if os.path.exists(path)]
    shown = []
    for path in sorted(paths, key=lambda path: path.startswith(f"{ROOT}/")):
        if path == str(ROOT) or any(path.startswith(f"{other}/") for other in shown):
            continue
        bind(path, root)
        shown.append(path)
        if str(ROOT).startswith(f"{path}/"):
            mount("none", root + str(ROOT), "tmpfs", 0, "size=1m,mode=755")
    for device in ("null", "zero", "urandom", "random"):
        bind(f"/dev/{device}", root)
    mount("proc", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    mount(tree, f"{root}/submission", flags=BIND)
    mount(None, f"{root}/submission", flags=BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    mount(None, root, flags=REMOUNT | RDONLY | NOSUID, options="size=64m,mode=755")
    os.chroot(root)
    os.chdir("/submission")


def set_limits(setup):
    if sys.platform == "linux":          # where the machine's memory ends, this process ends first
        Path("/proc/self/oom_score_adj").write_text("1000")
    limits = LIMITS | {"CPU": setup["seconds"]}
    if os.getuid():                      # the count is of all processes of this user
        threads = "-L" if sys.platform == "linux" else "-x"
        here = subprocess.run(["ps", threads, "-U", str(os.getuid()), "-o", "pid="],
                              capture_output=True, text=True).stdout.split()
        limits["NPROC"] += len(here)
    for name, most in limits.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is not None:
            hard = resource.getrlimit(which)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            try:
                resource.setrlimit(which, (most, most))
            except (ValueError, OSError):
                pass                     # macOS has no limit of address space


def drop(uid):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def enter(setup):
    """Isolate this process, and become argv. With namespaces a child does, as its process 1."""
    kind, uid, tree = setup["kind"], setup["user"], setup["tree"]
    work, root_user = os.path.dirname(tree), os.getuid() == 0
    libc = ctypes.CDLL(None, use_errno=True)
    home = f"{work}/tmp"
    set_limits(setup)
    if kind == "namespaces":
        home, ids = "/tmp", (os.getuid(), os.getgid())
        flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | (0 if root_user else NEWUSER)
        check(libc.unshare(flags), "unshare")
        if not root_user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {ids[0]} 1")
            Path("/proc/self/gid_map").write_text(f"{uid} {ids[1]} 1")
        pid = os.fork()
        if pid:
            libc.prctl(1, signal.SIGKILL)                   # if the judge dies, so do we
            print(json.dumps({"pid": pid}), flush=True)
            quiet()
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) and 1)
        own_root(tree, f"{work}/root")
        if root_user:
            drop(uid)
    else:
        os.chdir(tree)
        if kind == "user":
            drop(uid)
        print(json.dumps({"pid": os.getpid()}), flush=True)
    if sys.platform == "linux":
        libc.prctl(38, 1, 0, 0, 0)                          # no new privileges, by any program
        libc.prctl(1, signal.SIGKILL)                       # if the launcher dies, so do we
    quiet()
    env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "TMPDIR": home,
           "LANG": "C.UTF-8", "USER": "student", "LOGNAME": "student", "OMP_NUM_THREADS": "1",
           "FGSSL_CACHE": f"{home}/cache", "MAX_JOBS": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    os.execve(setup["argv"][0], setup["argv"], env)


def quiet():
    """What a submission prints goes nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


if __name__ == "__main__":
    enter(json.loads(sys.argv[1]))
