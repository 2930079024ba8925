"""python -m kernels check FILE.cu: races, unwritten reads and hangs of a CUDA file, found on a CPU.
python -m kernels profile FILE.cu: which lines of it waste global and shared memory.

FILE.cu is an ordinary CUDA program with a main(), see host.cuh, or one of this folder's kernels. It
runs against cuda_on_cpu.h in three orders of threads; watch.h looks at every load and store.
"""
import argparse
import contextlib
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import build

HERE = Path(__file__).parent
ORDERS = "forward", "reverse", "random:1"
NAMES = {order: order.split(":")[0] for order in ORDERS}    # of files
COMMON = "-std=c++17", "-g", "-w", "-DCUDA_ON_CPU_WATCH", f"-I{HERE}"
WATCHED = "-O1", "-fsanitize=thread", "-fsanitize=bounds"
HEADERS = "cuda_on_cpu.h", "cuda_words.h", "profile.h", "watch.h", "watch_calls.h"
EMULATOR = {*HEADERS, "common.cuh", "host.cuh"}  # a fault there is shown where it was called
MAINS = {"nt_xent.cu": "main_nt_xent.cu", "nt_xent_mma.cu": "main_nt_xent.cu",
         "tile_shuffle.cu": "main_tile_shuffle.cu"}
CUDA_HEADERS = ("cuda_runtime.h", "cuda.h", "device_launch_parameters.h", "cuda_fp16.h",
                "cuda_bf16.h", "cooperative_groups.h")
SECONDS, MEMORY, OUTPUT = 120, 8 << 30, 32 << 20    # what one run may take

WHY = {
    "race": "No barrier lies between the two, so chance decides which comes first. Threads of a "
            "block need __syncthreads() there, lanes of a warp __syncwarp(); sums of many threads "
            "need atomicAdd or one owner.",
    "race of blocks": "Blocks run in any order, and no barrier joins them. Let one thread own the "
                      "word, use an atomic operation, or launch a second kernel.",
    "race with cp.async": "cp.async writes at any time up to its cp_async_wait; the barrier that "
                          "shows it to others comes after that.",
    "unwritten": "Nobody has written it, so the GPU gives what happens to be there.",
    "outside": "A GPU stops the kernel there, or changes what belongs to something else. Is the "
               "tail of the array guarded, and is the index in the right unit?",
    "hang": "On a GPU it would run until the driver kills it.",
    "refused": "CUDA forbids it: the result is undefined, or the launch fails.",
    "misaligned": "A GPU stops the kernel there: float4 and the like need addresses that are "
                  "multiples of their size.",
    "crash": "It does not survive on the CPU, nor would it on a GPU.",
    "wrong": "The watch saw no reason for it: this is arithmetic, or an index that is wrong but "
             "inside the array.",
}
HINTS = [    # of what C++ cannot parse
    ("<<<", "a launch is written LAUNCH(kernel, grid, block, shared bytes, stream, arguments ...)"),
    (r"extern\s+__shared__", "shared memory of the launch's size is written DYN_SMEM(type, name);"),
]


class Refused(Exception):
    """Why a file cannot be watched, for the reader."""


@dataclass
class Place:
    """An access in the program: by whom, and in which line."""
    verb: str
    who: str
    file: str
    line: int
    source: str

    def __str__(self):
        line = f"  {Path(self.file).name}:{self.line}: {self.source}" if self.line else ""
        return "\n".join(filter(None, (line, self.who and f"      {self.verb}{self.who}")))


@dataclass
class Fault:
    kind: str                                    # a key of WHY
    kernel: str
    text: str                                    # of what: an element, or a sentence
    places: list = field(default_factory=list)   # one, or the two of a race
    orders: list = field(default_factory=list)   # in which it was seen

    @property
    def file(self):
        return self.places[0].file if self.places else ""

    @property
    def line(self):
        return self.places[0].line if self.places else 0

    def __str__(self):
        seen = "every order" if len(self.orders) == len(ORDERS) else f"order {self.orders[0]}"
        where = f"kernel {self.kernel}" if self.kernel else "main()"
        head = f"{self.kind}, in {where}: {self.text}"
        return "\n".join([head, *map(str, self.places), f"  Seen in {seen} of the threads. "
                          f"{WHY[self.kind]}"])


@dataclass
class Line:
    """What one line of a kernel asks of memory; sectors if global, wavefronts if shared."""
    kernel: str
    file: str
    line: int
    source: str
    space: str
    op: str
    requests: int
    lanes: float                                 # that take part in a request, of 32
    per_request: float
    ideal: float


@dataclass
class Report:
    faults: list
    lines: list
    kernels: dict                                # name: (launches, bytes read, bytes written)
    formulas: dict                               # name: (bytes read, bytes written)
    output: str                                  # of main()


def plain_name(kernel):
    """forward_mma of "(forward_mma<D, T>)"."""
    return re.match(r"\(?([\w:]*)", kernel)[1]


def compiler():
    """The g++ to use. Raises Refused."""
    cxx = os.environ.get("CXX", "g++")
    if not shutil.which(cxx):
        raise Refused(f"there is no {cxx}. Install g++, or name it in $CXX.")
    macros = call([cxx, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    if "__clang__" in macros or "__GNUC__" not in macros:
        raise Refused(f"{cxx} is not g++. The watch needs GCC's -fsanitize=thread: set $CXX.")
    return cxx


def call(command, **options):
    try:
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300,
                              errors="replace", stdin=subprocess.DEVNULL, **options)
    except subprocess.TimeoutExpired:
        raise Refused(f"{command[0]} did not end within 300 s") from None


def runtime(cxx, folder):
    """watch.h, compiled: from the cache, or else in `folder`."""
    text = repr([cxx, call([cxx, "--version"]).stdout, COMMON,
                 [(HERE / name).read_text() for name in HEADERS]])
    kept = build.cache() / f"watch-{hashlib.sha256(text.encode()).hexdigest()[:16]}" / "watch.o"
    if kept.exists():
        return kept
    built = folder / "watch.o"
    done = call([cxx, *COMMON, "-O2", "-c", "-x", "c++", HERE / "watch_calls.h", "-o", built])
    if done.returncode:
        raise Refused(f"watch_calls.h does not compile:\n{done.stderr}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, kept.with_suffix(f".{os.getpid()}"))
        os.replace(kept.with_suffix(f".{os.getpid()}"), kept)
    except OSError:                              # then it is compiled again the next time
        return built
    return kept


def explain(errors, file):
    """g++'s errors, each with its line in the student's file, and what to do about it."""
    told, parts = [], re.split(r"^(\S+?):(\d+):(?:\d+:)? (?:fatal )?error: ", errors, flags=re.M)
    for before, where, line, after in zip(parts[::3], parts[1::3], parts[2::3], parts[3::3]):
        if Path(where).name in EMULATOR:         # which macro or template of the file led there?
            near = re.findall(r"^(\S+?):(\d+):\S*\s+(?:required from here|note: in expansion of)",
                              before + after, re.M)
            near = [at for at in near if Path(at[0]).name not in EMULATOR]
            where, line = near[0] if near else (where, line)
        what, source = after.splitlines()[0], source_line(where, int(line))
        hint = next((hint for pattern, hint in HINTS if re.search(pattern, source)), None)
        word = re.search(r"[‘'](\w+)[’'] (?:was not declared|has not been declared|is not a member"
                         r"|does not name a type)|^(\S+): No such file", what)
        if word and not hint:
            hint = (f"{word[1] or word[2]} is misspelt, or not among the words of CUDA that the "
                    "emulator has: kernels/cuda_words.h")
        told.append(f"{where}:{line}: {source}\n    {hint or what}")
    if "undefined reference to `main'" in errors:
        told.append(f"{file} has no main() that launches its kernels; see kernels/host.cuh")
    return "it does not compile:\n" + ("\n".join(dict.fromkeys(told[:8])) or errors[-2000:])


def compile_program(file, folder):
    """The program that runs FILE.cu under the watch. Raises Refused."""
    cxx = compiler()
    for name in CUDA_HEADERS:
        (folder / name).write_text('#include "common.cuh"\n')
    source = Path(folder, "program.cpp")
    main = MAINS.get(file.name)
    if main:                                     # it includes the file, from where that lies
        main = next(at / main for at in (file.parent, HERE) if (at / main).exists())
        source.write_text(f'#line 1 "{main}"\n{main.read_text()}')
    else:
        source.write_text(f'#include "host.cuh"\n#include "{file}"\n')  # as nvcc includes CUDA's
    command = [cxx, "-iquote", file.parent, *COMMON, f"-I{folder}", *WATCHED, "-c", source, "-o",
               folder / "program.o"]
    done = call(command)
    if "-fsanitize" in done.stderr and done.returncode:
        raise Refused(f"this {cxx} has no -fsanitize=thread, by which the watch sees loads and "
                      f"stores:\n{done.stderr.strip()}")
    if not done.returncode:
        done = call([cxx, "-no-pie", "-pthread", runtime(cxx, folder), folder / "program.o", "-o",
                     folder / "program"])
    if done.returncode:
        raise Refused(explain(done.stderr, file))
    return folder / "program"


def write_variables(program, file):
    """The addresses of __shared__ arrays and __device__ variables, for watch_calls.h."""
    other = re.compile(r"std::|cuda_on_cpu::|__|_IO|DW\.|guard variable|typeinfo|vtable")
    found = []
    for row in call(["nm", "-SC", "-f", "sysv", program]).stdout.splitlines():
        name, address, _, kind, size, *_ = [*map(str.strip, row.split("|")), *[""] * 5]
        if name == "cuda_on_cpu::self":          # by which the others of its kind are found
            found.insert(0, f"self {address} {size} self\n")
        elif kind in ("TLS", "OBJECT") and size and not other.match(name):
            space = "shared" if kind == "TLS" else "global"
            found.append(f"{space} {address} {size} {name.split('::')[-1]}\n")
    file.write_text("".join(found))


def limit():
    """In the child: no run takes the machine with it."""
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY),
                       (resource.RLIMIT_FSIZE, OUTPUT), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]       # a grader's sandbox may allow less
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def source_line(file, line):
    try:
        return Path(file).read_text(errors="replace").splitlines()[line - 1].strip()
    except (OSError, IndexError):
        return ""


def is_own(file):
    """Whether a student may have written it: it is not the emulator's or the compiler's."""
    return bool(file) and Path(file).name not in EMULATOR and not file.startswith("/usr")


def locate(program, addresses):
    """{address: (file, line)} of return addresses, in the file that a student wrote."""
    addresses = sorted(addresses)
    text = "".join(f"{max(address - 1, 0):x}\n" for address in addresses)
    out = subprocess.run(["addr2line", "-e", str(program), "-i", "-a"], input=text,
                         capture_output=True, text=True).stdout
    found = {}
    for address, part in zip(addresses, re.split(r"^0x\w+\n", out, flags=re.M)[1:]):
        frames = re.findall(r"^(.*):(\d+)", part, re.M)
        frames = [(file, int(line)) for file, line in frames if not file.startswith("?")]
        own = [frame for frame in frames if is_own(frame[0])]
        found[address] = (own or frames or [("", 0)])[0]
    return found


def read_fault(cells, located, order):
    """One line of watch.h's as a Fault."""
    kind, kernel, pc, other_pc, who, other_who, text = cells
    kernel, pc, other_pc = plain_name(kernel), int(pc), int(other_pc)

    def place(verb, who, pc):
        file, line = located[pc]
        return Place(verb, who, file, line, source_line(file, line))

    if " and " in kind:
        first, second = kind.split(" and ")
        places = [place(f"{first} by ", other_who, other_pc), place(f"{second} by ", who, pc)]
        block = re.compile(r"block (\(.*?\))")
        kind = ("race with cp.async" if "cp.async" in first else "race of blocks" if
                block.search(who)[1] != block.search(other_who)[1] else "race")
        return Fault(kind, kernel, f"at {text}", places, [order])
    if kind == "refused":                        # the sentence names the lines
        return Fault(kind, kernel, *sites(text, who), [order])
    if kind in ("hang", "crash") and not is_own(located[pc][0]):
        if not is_own(located[other_pc][0]):
            return Fault(kind, kernel, *sites(text, who), [order])
        pc = other_pc
    verb = (kind.split()[0] + " by " if "outside" in kind else "read by " if kind == "unwritten"
            else "at ")
    return Fault(kind.split()[-1], kernel, text, [place(verb, who, pc)], [order])


def sites(text, who):
    """A sentence with file:line in it, with the names of files alone; and these lines."""
    found = dict.fromkeys(re.findall(r"(\S+?):(\d+)", text))
    places = [Place("by ", "" if k else who, file, int(line), source_line(file, int(line)))
              for k, (file, line) in enumerate(found)]
    return re.sub(r"\S*/(\S+?:\d+)", r"\1", text), places


@contextlib.contextmanager
def compiled(file):
    """FILE.cu as a program to give to `watch`, while the context lasts. Raises Refused."""
    file = Path(file).resolve()
    if not file.is_file():
        raise Refused(f"there is no file {file}")
    with tempfile.TemporaryDirectory(prefix="watch-") as folder:
        program = compile_program(file, Path(folder))
        write_variables(program, program.parent / "variables")
        yield program


def run(file, args=(), kernel=None):
    """Compile FILE.cu, run it in three orders of threads and report. Raises Refused."""
    with compiled(file) as program:
        return watch(program, args, kernel)


def watch(program, args=(), kernel=None):
    """Run a compiled program in three orders of threads. Raises Refused if no such kernel runs."""
    started, told = {}, {}
    with tempfile.TemporaryDirectory(prefix="watch-") as folder:
        folder = Path(folder)
        for order, name in NAMES.items():
            environment = {**os.environ, "CUDA_ON_CPU_ORDER": order, "CUDA_WATCH": folder / name,
                           "CUDA_WATCH_VARIABLES": program.parent / "variables"}
            if order == "forward":               # the counts are the same in each
                environment["CUDA_WATCH_COUNT"] = "1"
            with open(folder / f"{name}.out", "w") as out:
                started[order] = subprocess.Popen(
                    [program, *map(str, args)], env=environment, stdout=out, stderr=out,
                    stdin=subprocess.DEVNULL, preexec_fn=limit)
        try:
            wait_for(started.values(), folder)
        finally:
            for process in started.values():
                process.kill()
        for order, name in NAMES.items():
            rows = (folder / name).read_text(errors="replace").splitlines() \
                if (folder / name).exists() else []
            told[order] = ([row.split("\t") for row in rows], started[order].wait(),
                           (folder / f"{name}.out").read_text(errors="replace")[-20000:])
    return read_report(program, told, kernel)


def wait_for(processes, folder):
    """Until all have ended, or one hangs: then the others do so too."""
    end, reports = time.monotonic() + 4 * SECONDS, [folder / name for name in NAMES.values()]
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(b"fault\thang" in path.read_bytes() for path in reports if path.exists()):
            return
        time.sleep(0.02)


def read_report(program, told, kernel):
    """What the files of each order say, put together."""
    rows = [(order, *row) for order, (rows, _, _) in told.items() for row in rows]
    if any(row[1:3] == ("fault", "not instrumented") for row in rows):
        raise Refused("this g++ takes -fsanitize=thread, but inserts no calls: the watch is blind")
    addresses = {int(row[2]) for row in rows if row[1] == "line"}
    addresses |= {int(pc) for row in rows if row[1] == "fault" for pc in row[4:6]}
    located = locate(program, addresses)
    report = Report([], [], {}, {}, told["forward"][2])
    faults, lines = {}, {}

    def add(to, key, counts):
        to[key] = tuple(map(sum, zip(to.get(key, [0] * len(counts)), map(int, counts))))

    for order, what, *cells in rows:
        if what == "fault":
            add_fault(faults, read_fault(cells, located, order))
        elif what == "line":                     # of the order forward alone
            pc, space, op, name, *counts = cells
            add(lines, (plain_name(name), *located[int(pc)], space, op), counts)
        elif order == "forward":
            add(report.kernels if what == "kernel" else report.formulas, plain_name(cells[0]),
                cells[1:])
    hangs = any(fault.kind == "hang" for fault in faults.values())    # then the others are killed
    for order, (rows, status, output) in told.items():
        if status and not hangs and not any(row[0] == "fault" for row in rows):
            add_fault(faults, ended(status, output, order))
    for (name, path, line, space, op), (requests, lanes, _, units, ideal) in sorted(lines.items()):
        report.lines.append(Line(name, path, line, source_line(path, line), space, op, requests,
                                 lanes / requests, units / requests, ideal / requests))
    report.faults = list(faults.values())
    if kernel:
        known = {row[2] for row in rows if row[1] == "kernel"} | {f.kernel for f in report.faults}
        if kernel not in map(plain_name, known):
            raise Refused(f"it launches no kernel {kernel}, but "
                          f"{', '.join(sorted(filter(None, map(plain_name, known)))) or 'none'}")
        report.faults = [f for f in report.faults if f.kernel in (kernel, "")]
        report.lines = [line for line in report.lines if line.kernel == kernel]
    return report


def ended(status, output, order):
    """The fault of a program that ended badly, and of which the watch said nothing."""
    last = (output.strip().splitlines() or [""])[-1]
    if status > 0:
        return Fault("wrong", "", f"main() returned {status}{last and ': ' + last}", [], [order])
    if -status in (signal.SIGXCPU, signal.SIGKILL):
        return Fault("hang", "", f"it did not end within {SECONDS} s", [], [order])
    if -status == signal.SIGXFSZ:
        return Fault("hang", "", f"it printed more than {OUTPUT >> 20} MiB", [], [order])
    return Fault("crash", "", f"{signal.Signals(-status).name}{last and ': ' + last}", [], [order])


def add_fault(faults, fault):
    """Keep one of each pair of lines, with the orders in which it was seen."""
    key = (fault.kind, fault.kernel, tuple(sorted((p.file, p.line) for p in fault.places)),
           "" if fault.places else fault.text)
    same = faults.setdefault(key, fault)
    same.orders += [order for order in fault.orders if order not in same.orders]


def report(file):
    """What run() found in a file of this project, as plain values, which course.grade can send:
    {"faults": [{kind, text}], "lines": [Line as a dict], "kernels": {name: (launches, bytes read,
    bytes written)}}. A file that cannot be watched has one fault, of kind "refused".
    """
    try:
        found = run(HERE.parent / file)
    except Refused as why:
        return {"faults": [{"kind": "refused", "text": str(why)}], "lines": [], "kernels": {}}
    faults = [{"kind": fault.kind, "text": str(fault)} for fault in found.faults]
    return {"faults": faults, "lines": [vars(line) for line in found.lines],
            "kernels": found.kernels}


def print_faults(report, file):
    if report.output.strip():
        print(f"main() prints: {report.output.strip()}\n")
    for fault in report.faults[:10]:
        print(fault, end="\n\n")
    if len(report.faults) > 10:
        print(f"... and {len(report.faults) - 10} more.")
    count = len(report.faults)
    print(f"{file}: {count or 'no'} fault{'s' * (count != 1)} in {len(ORDERS)} orders of threads.")


def print_profile(report, file):
    for name, (launches, read, written) in report.kernels.items():
        lines = [line for line in report.lines if line.kernel == name]
        if not lines:
            continue
        print(f"{name}: {launches} launch{'es' * (launches != 1)}")
        for verb, bytes_, k in (("reads", read, 0), ("writes", written, 1)):
            formula = report.formulas.get(name)
            beside = f"; by the formula {formula[k]:,}" if formula else ""
            print(f"  {verb} {bytes_:,} bytes of global memory{beside}")
        print("  memory         requests   lanes   a request   ideal   ratio")
        for line in lines:
            unit = "sectors   " if line.space == "global" else "wavefronts"
            print(f"  {line.space} {line.op:6} {line.requests:10,} {line.lanes:7.1f} "
                  f"{line.per_request:11.2f} {line.ideal:7.2f} "
                  f"{line.per_request / line.ideal:7.2f} {unit}  "
                  f"{Path(line.file).name}:{line.line}: {line.source[:60]}")
        print()
    if report.faults:
        print(f"{file} has faults: python -m kernels check {file}")


def main(argv):
    """check or profile; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "profile"))
    parser.add_argument("file", type=Path, help="a CUDA program with a main()")
    parser.add_argument("args", nargs="*", help="arguments of its main()")
    parser.add_argument("--kernel", help="report on this kernel alone")
    a = parser.parse_args(argv)
    try:
        report = run(a.file, a.args, a.kernel)
    except Refused as why:
        print(f"{a.file}: {why}" if not str(why).startswith(str(a.file)) else why)
        return 1
    (print_profile if a.command == "profile" else print_faults)(report, a.file)
    return int(bool(report.faults)) if a.command == "check" else 0
