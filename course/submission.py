"""What somebody handed in, a folder, a zip or a single file, and the bodies in it.

Only .py and .cu files are read, at most 1 MB each, and of them only the bodies that the assignment
asks for. Nothing is unpacked or run here.
"""

import ast
import io
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from course import source

MOST = 2**20                             # bytes of a source file
KINDS = ".py", ".cu", ".cuh", ".h", ".cpp"
SKIPPED = {"tests", "__pycache__", "__MACOSX", "out", "data", "build", "node_modules",
           "site-packages"}


class Body(NamedTuple):
    """A body as source.put takes it, or None and why: what is told about it instead."""
    text: str
    state: str = ""
    says: str = ""


def wanted(path):
    """Whether a file of a submission, by its path in it, can hold a solution."""
    path = PurePosixPath(path)
    return path.suffix in KINDS and not any(
        part in SKIPPED or part.startswith((".", "venv")) for part in path.parts)


def read(path):
    """{path in the submission: bytes}. Raises ValueError for what is no submission."""
    path = Path(path)
    if path.is_symlink():
        raise ValueError(f"{path.name} is a link, which could lead anywhere: hand in the files")
    if path.is_dir():
        files, inside = {}, sorted(path.rglob("*"))
        for file in inside:
            name = file.relative_to(path).as_posix()
            if file.is_symlink() or not file.is_file():      # a link could lead out of the folder
                continue
            if file.suffix == ".zip":
                files |= {f"{name}/{k}": v for k, v in read_zip(file).items()}
            elif wanted(name) and file.stat().st_size <= MOST:
                files[name] = file.read_bytes()
    elif path.suffix == ".zip":
        files = read_zip(path)
    elif not path.exists():
        raise ValueError(f"{path} is not there")
    elif path.suffix in KINDS and path.stat().st_size <= MOST:
        files = {path.name: path.read_bytes()}
    else:
        raise ValueError(f"{path.name} is no folder, zip, .py or .cu file")
    return files


def read_zip(file):
    """The sources in a zip file. Raises ValueError for a damaged one."""
    try:
        with zipfile.ZipFile(io.BytesIO(Path(file).read_bytes())) as archive:
            inside = [i for i in archive.infolist() if wanted(i.filename) and i.file_size <= MOST]
            return {i.filename: archive.read(i) for i in inside[:1000]}
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError,
            ValueError) as error:
        raise ValueError(f"{Path(file).name} cannot be unpacked: {error}") from None


def candidates(files, place, name):
    """The paths, among those of a submission, that may hold function `name` of the file `place`.

    The file in its folder, however deeply nested, before one of that name elsewhere, before any
    that names the function: people rename what they hand in.
    """
    def rank(path):
        if f"/{path}".endswith(f"/{place}"):
            return 0
        if PurePosixPath(path).name == PurePosixPath(place).name:
            return 1
        return 2

    short, kind = name.rpartition(".")[2], PurePosixPath(place).suffix
    found = sorted((path for path in files if path.endswith(kind)),
                   key=lambda path: (rank(path), path.count("/"), path))
    return [path for path in found if rank(path) < 2 or short.encode() in files[path]]


def one_body(files, place, name, blank_text):
    """The Body of function `name` of file `place`; blank_text: the file as it was handed out. Where
    several files may hold it, a blank beside the solution for one, the first with a body counts."""
    old, = (f for f in source.functions(place, blank_text) if f.name == name)
    found = []
    for path in candidates(files, place, name):
        text = source.decode(files[path])
        try:
            found.append((cuda_body if old.is_cuda else python_body)(path, text, old, blank_text))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            found.append(Body(None, "not yet", syntax(path, error)))
    if not found:
        there = ", ".join(sorted(files)[:4]) or "no source file"
        return Body(None, "missing", f"wanted {place}; found {there}")
    return next((body for body in found if body.text is not None), found[0])


def cuda_body(path, text, old, blank_text):
    found = [f for f in source.functions("x.cu", text) if f.name == old.name]
    if not found:
        return Body(None, "missing", f"{path} defines no {old.name}, or its braces do not match")
    body = source.body_of(text, found[-1]._replace(file=old.file))
    return Body(None, "to write") if bare(body) == bare(source.body_of(blank_text, old)) else \
        Body(body)


def python_body(path, text, old, blank_text):
    node = source.definition(text, old.name)
    if node is None:
        return Body(None, "missing", f"{path} defines no {old.name}")
    body = source.python_body(node)
    if body in ("pass", "...", source.python_body(old.node)):
        return Body(None, "to write")
    ours, wanted = ([a.arg for a in ast.walk(n.args) if isinstance(a, ast.arg)]
                    for n in (node, old.node))
    if ours != wanted:
        return Body(None, "not yet", f"{path} line {node.lineno}: {old.name}({', '.join(ours)}); "
                                     f"handed out was {old.name}({', '.join(wanted)}). Keep it")
    words, had = set(re.findall(r"\w+", body)), source.imports(blank_text)
    new = [line for line, names in source.imports(text).items()          # that the body needs
           if line not in had and names & (words | {"*"})]
    return Body("\n".join([*new, body]))


def bare(body):
    """A body without what does not count when it is compared: blanks, and CUDA's #line."""
    return "".join(line for line in body.splitlines() if not line.startswith("#line")).split()


def whole_files(files, old):
    """Of a bug hunt, in which any line may change: (Body, {place: text}); old has what was handed
    out. Files that are not handed in stay as they were."""
    new = {}
    for place in old:
        texts = [source.decode(files[path]) for path in candidates(files, place, place)
                 if PurePosixPath(path).name == PurePosixPath(place).name]
        changed = [text for text in texts if text.split() != old[place].split()]
        new |= {place: text for text in (changed or texts)[:1]}
    if not new:
        return Body(None, "missing", f"wanted {', '.join(old)}; found "
                                     f"{', '.join(sorted(files)[:4])}"), new
    same = all(text.split() == old[place].split() for place, text in new.items())
    return Body(None, "to write") if same else Body("the files as handed in"), new


def syntax(path, error):
    """A syntax error as `FILE line N: what; the line`."""
    if not isinstance(error, SyntaxError):
        return f"{path}: Python cannot read it: {error or type(error).__name__}"
    line = f": `{error.text.strip()}`" if error.text else ""
    return f"{path} line {error.lineno}: {error.msg}{line}"
