"""What the Markdown pages say is so: commands parse, files, flags and names exist, the tour's lines
are right.

    python tests/test_readme.py      # mends the line numbers of the README's tour
"""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PAGES = [*(ROOT / part / "README.md" for part in (".", "imagesets", "kernels", "tests")),
         *sorted((ROOT / "docs").glob("*.md"))]
FILES = [file for folder in (".", "imagesets", "kernels")
         for suffix in ("py", "cu", "cuh", "h", "cpp")
         for file in sorted((ROOT / folder).glob(f"*.{suffix}"))]
SOURCE = "\n".join(file.read_text() for file in [*FILES, *sorted(ROOT.glob("tests/*.py"))])
SCRIPTS = ("fgssl", "train_simclr", "train_jigsaw", "train_srgan", "linear_eval", "reproduce",
           "make_assignment", "bench_views", "bench_step", "kernels.bench")
STOP = re.compile(r"^\| `([\w.]+)` \| \[([\w/.]+):(\d+)\]\(\2#L\3\) \|", re.M)  # of the tour


class Parsed(Exception):
    """Raised in place of running a script whose arguments were understood."""


@pytest.fixture
def parse(monkeypatch):
    """parse(module, argv): a script's main(), up to where its arguments are parsed."""
    real = argparse.ArgumentParser.parse_args

    def and_stop(self, argv=None, namespace=None):
        real(self, argv, namespace)
        raise Parsed(self)

    def parse(module, argv):
        monkeypatch.setattr(sys, "argv", ["script", *argv])  # which some read
        main = importlib.import_module(module).main
        with pytest.raises(Parsed) as parsed:
            main(argv) if main.__code__.co_argcount else main()
        return parsed.value.args[0]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", and_stop)
    return parse


def code(page):
    """The code between backticks in a page's text, each on one line."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_runs(page, parse, capsys):
    for words in commands(page):
        line = shlex.join(words)
        if words[0] == "torchrun":
            words = ["python", *words[3:]]                   # after --nproc-per-node 2
        if words[0] in ("cd", "pip", "git"):
            assert words[0] == "cd" or (ROOT / words[-1]).is_file(), line
            continue
        assert words[0] == "python", f"{page.name}: is `{line}` a command of this project?"
        if words[1] == "-m":
            module, argv = words[2], words[3:]
            if module == "pytest":
                files = [word for word in argv if word.startswith("tests/")]
                assert all(list(ROOT.glob(file)) for file in files), line
                continue
        else:
            assert (ROOT / words[1]).is_file(), f"{page.name}: no script {words[1]}"
            module, argv = Path(words[1]).stem, words[2:]
        if module in SCRIPTS:
            try:
                parse(module, argv)
            except SystemExit:
                pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_is_an_option(page, parse):
    known = {"--nproc-per-node", "--help"}
    for script in SCRIPTS:
        argv = ["data", "toy"] if script == "fgssl" else []
        known |= set(parse(script, argv)._option_string_actions)
    given = {flag for span in code(page) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert given <= known, f"{page.name} names what no script takes: {sorted(given - known)}"


def sections(page):
    """The anchors of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_link_and_name_exists(page):
    names = {file.name for file in ROOT.rglob("*") if "__pycache__" not in file.parts}
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            linked = page.parent / path if path else page
            assert linked.exists(), f"{page.name} links to {path}"
            if anchor and linked.suffix == ".md":
                assert anchor in sections(linked), f"{path or page.name} has no section #{anchor}"
    for span in code(page):
        for file in re.findall(r"^[\w/.]+\.(?:py|cu|cuh|h|cpp|patch)$", span):
            assert Path(file).name in names, f"{page.name} names {file}, which is not there"
        for file in re.findall(r"^[\w-]+\.(?:png|csv|json|jsonl|pt)$", span):
            written = re.search(rf"\b{re.escape(Path(file).stem)}\b", SOURCE)
            assert file in names or written, f"{page.name} names {file}, which no script writes"
        for name in re.findall(r"^([a-z]\w*_\w+|[a-z]\w*(?=\())(?:\(.*\))?$", span):
            assert re.search(rf"\b{name}\b", SOURCE), f"{page.name} names {name}, which is nowhere"


def test_errors_send_to_sections_that_are_there():
    named = {section for file in FILES
             for section in re.findall(r'README, "([^"]+)"', file.read_text())}
    text = (ROOT / "README.md").read_text()
    assert named and all(f"\n## {section}\n" in text for section in named), named


def test_the_file_table_is_complete():
    table = (ROOT / "README.md").read_text().partition("\n## Files\n")[2].partition("\n## ")[0]
    for file in FILES:
        assert f"`{file.relative_to(ROOT)}`" in table, f"README, Files, lacks {file.name}"


def line_of(file, name):
    """Where a file defines a function, class, method (by its dotted name) or CUDA kernel."""
    text = (ROOT / file).read_text()
    if not file.endswith(".py"):
        return text.count("\n", 0, re.search(rf"\b{name}\(", text).start()) + 1
    node = ast.parse(text)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        assert node, f"the tour stops at {name}, which {file} does not define"
    return node.lineno


def tour(text):
    """The README with the line numbers of its tour made right."""
    return STOP.sub(lambda stop: "| `{0}` | [{1}:{2}]({1}#L{2}) |".format(
        stop[1], stop[2], line_of(stop[2], stop[1])), text)


def test_the_tour_leads_where_it_says():
    text = (ROOT / "README.md").read_text()
    assert len(STOP.findall(text)) >= 10, "the tour is gone, or its rows have another form"
    assert tour(text) == text, "lines have moved: run `python tests/test_readme.py`"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(tour(readme.read_text()))
