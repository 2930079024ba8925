"""What the documents say is so: commands parse; files, links, sections, flags and names exist.

    python -m pytest -m docs      # plain pytest leaves them out: see pytest.ini
"""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import imagesets

pytestmark = pytest.mark.docs

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")),
         *(ROOT / folder / "README.md" for folder in ("imagesets", "kernels", "tests"))]
EXAMPLES = sorted(ROOT.glob("docs/examples/*.py"))
SCRIPTS = ["fgssl", "train_simclr", "train_jigsaw", "train_srgan", "linear_eval", "reproduce",
           "course.make", "course.grade", "bench_views", "bench_step", "bench_explore", "faults",
           "kernels.bench", "kernels.watch", *(file.stem for file in EXAMPLES)]
FOLDERS = (".", "methods", "evaluation", "imagesets", "kernels", "kernels/lessons", "course",
           "tests")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*"))
         if file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp")] + EXAMPLES
SOURCE = "\n".join(file.read_text() for file in FILES)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Parsed(Exception):
    """Raised in place of running a script whose arguments were understood."""


@pytest.fixture
def parse(monkeypatch):
    """parse(module, argv): run a script's main() until it has parsed argv; returns its parser."""
    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, argv=None, namespace=None):
        real(self, argv, namespace)
        raise Parsed(self)

    def parse(module, argv):
        monkeypatch.setattr(sys, "argv", ["script", *argv])  # which some read
        main = importlib.import_module(module).main
        with pytest.raises(Parsed) as parsed:
            main(argv) if main.__code__.co_argcount else main()
        return parsed.value.args[0]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    return parse


def text_of(page):
    """A page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def code(page):
    """What a page's text has between backticks, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text_of(page))]


def commands(page):
    """The shell commands of a page, in bash blocks and in text, as lists of words."""
    lines = [line for block in re.findall(r"(?ms)^```bash\n(.*?)^```$", page.read_text())
             for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in code(page) if span.startswith(("python ", "torchrun "))]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1:]


@each_page
def test_every_command_is_one_that_runs(page, parse, capsys):
    for words in commands(page):
        line = shlex.join(words)
        if words[0] == "torchrun":
            words = ["python", *words[3:]]                   # after --nproc-per-node 2
        if words[0] in ("pip", "git"):
            assert (ROOT / words[-1]).is_file(), line
            continue
        if words[0] == "cd" or (ROOT / words[0]).is_file():
            continue
        if words[0] == "cp":
            assert (ROOT / words[1]).is_file(), line
            continue
        assert words[0] == "python", f"{page.name}: is `{line}` a command of this project?"
        if words[1] == "-m":
            module, argv = words[2], words[3:]
            if module == "pytest":
                files = [word for word in argv if word.startswith("tests/")]
                assert all(list(ROOT.glob(file)) for file in files), line
                continue
        else:
            copied = [file.name for file in EXAMPLES]
            assert words[1] in copied or (ROOT / words[1]).is_file(), f"{page.name}: no {words[1]}"
            module, argv = Path(words[1]).stem, words[2:]
        if module in SCRIPTS:
            try:
                parse(module, argv)
            except SystemExit:
                pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")


@each_page
def test_every_flag_is_an_option(page, parse):
    known = {"--nproc-per-node", "--help"}
    for script in SCRIPTS:
        argv = {"fgssl": ["data", "toy"], "kernels.watch": ["check", "FILE.cu"]}.get(script, [])
        known |= set(parse(script, argv)._option_string_actions)
    given = {flag for span in code(page) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert given <= known, f"{page.name} names what no script takes: {sorted(given - known)}"


def sections(page):
    """The anchors of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", text_of(page))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere_and_to_no_line(page):
    """A line number is wrong after the next edit: name the function instead."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            linked = page.parent / path if path else page
            assert linked.exists(), f"{page.name} links to {path}, which is not there"
            assert not re.fullmatch(r"L\d+", anchor), f"{page.name} links to a line: {target}"
            if anchor and linked.suffix == ".md":
                assert anchor in sections(linked), f"{path or page.name} has no section #{anchor}"


@each_page
def test_every_named_file_and_function_exists(page):
    names = {file.name for file in ROOT.rglob("*") if "__pycache__" not in file.parts}
    for span in code(page):
        for file in re.findall(r"^[\w/.]+\.(?:py|cu|cuh|h|cpp|patch)$", span):
            assert Path(file).name in names, f"{page.name} names {file}, which is not there"
        for file in re.findall(r"^[\w-]+\.(?:png|csv|json|jsonl|pt)$", span):
            written = re.search(rf"\b{re.escape(Path(file).stem)}\b", SOURCE)
            assert file in names or written, f"{page.name} names {file}, which no script writes"
        for name in re.findall(r"^([a-z]\w*_\w+|[a-z]\w*(?=\())(?:\(.*\))?$", span):
            assert re.search(rf"\b{name}\b", SOURCE), f"{page.name} names {name}, which is nowhere"


def defines(file, name):
    """Whether a file defines a function, class or CUDA kernel, or by its dotted name a method."""
    if not file.exists():
        return False
    if file.suffix != ".py":
        return re.search(rf"\b{name}\(", file.read_text())
    node = ast.parse(file.read_text())
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        if node is None:
            return False
    return True


@each_page
def test_functions_are_in_the_files_that_pages_link(page):
    found = re.findall(r"`([\w.]+)`\s+in\s+\[[^\]]*\]\(([^)]+)\)", page.read_text())
    for name, path in found:
        assert defines(page.parent / path, name), f"{page.name}: {path} does not define {name}"
    assert len(found) >= 10 or page.name != "one_step.md", "its rows have another form"


def test_errors_send_to_sections_that_are_there():
    named = set(re.findall(r'\b(README|docs/\w+\.md), "([^"]+)"', SOURCE))
    for page, section in named:
        text = (ROOT / page).with_suffix(".md").read_text()
        assert re.search(rf"(?m)^#+ {re.escape(section)}$", text), f'{page} has no "{section}"'
    assert ("README", "Your own images") in named, "errors have another form"


def test_the_readme_quotes_the_loss_as_it_is():
    """Comments and docstrings may differ."""
    def body(text):
        function = next(node for node in ast.parse(text).body
                        if getattr(node, "name", None) == "nt_xent_dense")
        return [ast.unparse(statement) for statement in function.body
                if not (isinstance(statement, ast.Expr)
                        and isinstance(statement.value, ast.Constant))]

    quoted = re.search(r"(?ms)^```python\n(.*?)^```$", (ROOT / "README.md").read_text())[1]
    assert body(quoted) == body((ROOT / "kernels" / "reference.py").read_text())


def test_the_readme_quotes_the_first_lines_of_an_evaluation(toy_root):
    *first, seen, _ = re.search(r"(?m)^toy: .*\n.*\n.*\n.*; folder out/simclr$",
                                (ROOT / "README.md").read_text())[0].splitlines()
    records = imagesets.read("toy", toy_root)
    assert first == imagesets.describe(records).splitlines()
    pattern = re.sub(r"\{.*?\}", r"\\d+", re.search(r'f"(pretraining saw .*)"', SOURCE)[1])
    assert re.fullmatch(pattern, seen) and f"{(records.splits == 'test').sum()} test" in seen


def test_the_diff_of_the_example_is_true():
    """A line shown as removed or added that neither script has: the page is out of date."""
    page = (ROOT / "docs" / "extending.md").read_text()
    shown = re.search(r"(?ms)^```diff\n(.*?)^```$", page)[1].splitlines()
    ours, theirs = ((ROOT / file).read_text().splitlines()
                    for file in ("train_simclr.py", "docs/examples/train_byol.py"))
    for line in shown:
        if not line.startswith("@@"):
            assert line[0] == "+" or line[1:] in ours, f"train_simclr.py lacks {line[1:]!r}"
            assert line[0] == "-" or line[1:] in theirs, f"train_byol.py lacks {line[1:]!r}"
