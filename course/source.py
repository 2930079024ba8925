"""The functions of a source file: find them, blank them, put another body in, or a call.

A function is found by `ast` in a .py file and by its braces in a .cu file; only the text between
signature and end is ever exchanged.
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ".", "methods", "evaluation", "imagesets", "kernels"
BLANK = "exercise {}: write it"          # how the error of a blank body begins


class Function(NamedTuple):
    """A function or kernel: its body, less the docstring, is text[start:end]."""
    name: str
    file: Path
    line: int
    start: int
    end: int
    node: ast.FunctionDef = None

    @property
    def is_cuda(self):
        return self.node is None


def read(path):
    """A source file's text: by its coding line, else UTF-8, else Latin-1 (which never fails)."""
    data = Path(path).read_bytes()
    return decode(data)


def decode(data):
    """Bytes of a source as text, with \\n at the ends of lines and no byte-order mark."""
    coding = re.search(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)",
                       b"\n".join(data.splitlines()[:2]), re.M)
    for kind in (coding[1].decode() if coding else "utf-8-sig", "utf-8-sig", "latin-1"):
        try:
            return data.decode(kind).replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
        except (UnicodeError, LookupError):
            continue


def python_functions(text, file):
    """The functions of a Python text; methods and inner functions by their dotted names."""
    ends = [m.end() for m in re.finditer("\n|$", text)]     # of each line, its newline included

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                body = child.body[ast.get_docstring(child) is not None:]
                if body and body[0].lineno > child.lineno:   # not on the line of the signature
                    first = min([body[0].lineno, *(d.lineno for d in
                                                   getattr(body[0], "decorator_list", ()))])
                    yield Function(prefix + child.name, file, child.lineno,
                                   ends[first - 2] + body[0].col_offset,
                                   ends[child.end_lineno - 1] - 1, child)
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield from visit(child, f"{prefix}{child.name}.")

    yield from visit(ast.parse(text), "")


def cuda_kernels(text, file):
    """The __global__ functions of a .cu text; a body ends where its braces do."""
    for found in re.finditer(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text):
        end = start = text.find("{", found.end()) + 1
        depth = 1
        while depth and 0 < end < len(text):
            skip = re.match(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'[{}]'""",
                            text[end:end + 5000], re.S)
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += len(skip[0]) if skip else 1
        if not depth:
            yield Function(found[1], file, text.count("\n", 0, found.start(1)) + 1, start, end - 1)


def functions(file, text=None):
    """All functions of a file. Raises SyntaxError for a .py file that is not Python."""
    text = read(file) if text is None else text
    return list((cuda_kernels if Path(file).suffix == ".cu" else python_functions)(text, file))


def find(name, root=ROOT):
    """The one function called NAME, or FILE:NAME. Raises ValueError for none or several."""
    of_file, _, short = name.rpartition(":")
    files = (file for folder in FOLDERS for kind in ("*.py", "*.cu")
             for file in sorted((Path(root) / folder).glob(kind)))
    found = [f for file in files if ("/" + str(file)).endswith("/" + of_file if of_file else "")
             for f in functions(file) if f.name == short]
    if not found:
        raise ValueError(f"no function, kernel or mutant is named {name}; --list shows exercises")
    if len(found) > 1:
        names = " or ".join(f"{f.file.relative_to(root)}:{f.name}" for f in found)
        raise ValueError(f"{name} is in several files: say {names}")
    return found[0]


def put(text, function, body):
    """The text with another body: lines of Python without indentation, or the inside of braces."""
    if function.is_cuda:
        return text[:function.start] + body + text[function.end:]
    margin = " " * (function.start - text.rindex("\n", 0, function.start) - 1)
    body = "\n".join(margin + line if line.strip() and i else line
                     for i, line in enumerate(body.splitlines()))
    return text[:function.start] + body + text[function.end:]


def blank(text, function, says):
    """The text with the function's body replaced by an error that says what to do."""
    says = f"{BLANK.format(function.name)}; {says}".replace('"', "'")
    margin = 4 if function.is_cuda else function.start - text.rindex("\n", 0, function.start) - 1
    lines = textwrap.wrap(says, 90 - margin, break_on_hyphens=False)
    if function.is_cuda:
        lines = "\n".join(f'        "{line} "' for line in lines)
        return put(text, function, f"\n    EXERCISE(\n{lines});\n")
    body = "raise NotImplementedError(" + "".join(f'\n    "{line} "' for line in lines) + ")"
    return put(text, function, body)


CUDA_ERROR = """
#ifdef __CUDACC__
#define EXERCISE(why) __trap()
#else
#define EXERCISE(why) cuda_on_cpu::refuse(why)
#endif
"""


def define_exercise(text):
    """A .cu text in which EXERCISE, the error of a blank kernel, is defined."""
    last = [m.end() for m in re.finditer(r"#include[^\n]*\n", text)][-1]
    return text[:last] + CUDA_ERROR + text[last:]


def body_of(text, function):
    """The body as `put` takes it: Python without comments and layout, CUDA as it is written."""
    if function.is_cuda:
        line = text.count("\n", 0, function.start) + 1
        return f'\n#line {line} "{Path(function.file).name}"\n' + text[function.start:function.end]
    return python_body(function.node)


def python_body(node):
    """The statements of a function's node, without its docstring."""
    body = node.body[ast.get_docstring(node) is not None:]
    return "\n".join(map(ast.unparse, body)) or "pass"


def definition(text, name):
    """The node of the function of this dotted name in a Python text, or None. Of several the last
    holds, as in Python."""
    at = ast.parse(text)
    for part in name.split("."):
        found = [node for node in ast.iter_child_nodes(at) if getattr(node, "name", None) == part]
        if not found:
            return None
        at = found[-1]
    return at if isinstance(at, ast.FunctionDef) else None


def imports(text):
    """{import statement: names that it binds} of the top level of a Python text, but those of
    __future__."""
    return {ast.unparse(node): {a.asname or a.name.partition(".")[0] for a in node.names}
            for node in ast.parse(text).body
            if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom)
            and node.module != "__future__"}


def delegate(text, function, key):
    """The text with a body that first asks seam.py whether a submission computes the result.

    An inner function passes on the arguments of the function around it, which made it.
    """
    def names(node):
        a = node.args
        star = [f"*{a.vararg.arg}"] if a.vararg else []
        return [p.arg for p in (*a.posonlyargs, *a.args)] + star

    outer = names(enclosing(text, function)) if enclosing(text, function) else []
    wanted = ", ".join(names(function.node)
                       + [f"{a.arg}={a.arg}" for a in function.node.args.kwonlyargs])
    margin = " " * (function.start - text.rindex("\n", 0, function.start) - 1)
    call = (f"import course.seam\n{margin}if course.seam.active({key!r}):\n{margin}    return "
            f"course.seam.call({key!r}, ({''.join(o + ', ' for o in outer)}), {wanted})\n{margin}")
    return text[:function.start] + call + text[function.start:]


def own_nodes(node):
    """The nodes in a function, those of functions inside it left out."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield child
            yield from own_nodes(child)


def enclosing(text, function):
    """The node of the function in which this one is defined, or None."""
    around, _, _ = function.name.rpartition(".")
    return next((f.node for f in python_functions(text, function.file) if f.name == around), None)
