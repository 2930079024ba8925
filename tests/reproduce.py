"""Reruns a table of the README from scratch and writes it there.

    python tests/reproduce.py                      # names the tables, and the hours each took
    python tests/reproduce.py grocery              # runs everything it needs, then writes it
    python tests/reproduce.py grocery --dry-run    # prints the commands

Runs lie in out/reproduce/. Ctrl-C loses nothing: the same command goes on, and what is finished is
not run again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import linear_eval  # noqa: E402

README, OUT = ROOT / "README.md", ROOT / "out" / "reproduce"


class Run(NamedTuple):
    """A row. train: a trainer and its flags, or "" for random weights; evaluate: flags of each call
    of linear_eval.py; seeds: 0, 1, ..., whose mean and deviation stand in the row."""
    label: str
    train: str
    evaluate: tuple = ("",)
    seeds: int = 3


class Table(NamedTuple):
    """columns: {title: where it is in eval.json}, of an encoder's figures or "tuned SHOTS"."""
    data: str
    hours: float
    columns: dict
    runs: tuple


FROZEN = {"linear": "linear", "k-NN": "knn", "rank-1": "rank1", "mAP": "map"}
TUNED = {"1 label": "tuned 1", "5": "tuned 5", "10": "tuned 10", "all": "tuned all"}

TABLES = {}


def commands(name):
    """[(folder of the run, command)] of a table, in the order in which they must run."""
    table, todo = TABLES[name], []
    for run in table.runs:
        for seed in range(run.seeds):
            folder = folder_of(name, run, seed)
            same, source = ["--data", table.data, "--seed", str(seed)], ["--init", "random"]
            if run.train:
                todo.append((folder, [*shlex.split(run.train), *same, "--out", str(folder)]))
                source = [str(folder / "checkpoint.pt")]
            for i, flags in enumerate(run.evaluate):
                todo.append((folder, ["linear_eval.py", *source, *same, *shlex.split(flags),
                                      "--out", str(folder / f"eval{i}")]))
    return todo


def folder_of(name, run, seed):
    slug = "".join(c if c.isalnum() else "_" for c in run.label)
    return OUT / name / f"{slug}_{seed}"


def execute(folder, command):
    """Run a command of ours, unless it has been; a training that was stopped goes on."""
    done = folder / "done.txt"
    if done.exists() and shlex.join(command) in done.read_text().splitlines():
        return
    stopped = command[0].startswith("train") and (folder / "checkpoint.pt").exists()
    print(f"\n$ python {shlex.join(command)}", flush=True)
    python(*command, *["--resume"] * stopped)
    folder.mkdir(parents=True, exist_ok=True)
    with open(done, "a") as file:
        file.write(shlex.join(command) + "\n")


def python(*command):
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def figures(name, run):
    """{column: [its values over seeds and, for few labels, draws]} of a row."""
    found = {title: [] for title in TABLES[name].columns}
    for seed in range(run.seeds):
        for i in range(len(run.evaluate)):
            file = folder_of(name, run, seed) / f"eval{i}" / "eval.json"
            result = json.loads(file.read_text())
            measured = result.get("encoder", result["random_init"])
            for title, where in TABLES[name].columns.items():
                method, _, shots = where.partition(" ")
                if shots:
                    found[title] += [cell["test"] for cell in result["few_labels"]
                                     if (cell["method"], str(cell["shots"]))
                                     == ({"tuned": "fine-tuned"}.get(method, method), shots)]
                elif i == 0:
                    found[title].append(measured[where])
    return found


def render(name):
    """The table as Markdown; a figure of several runs is their mean ± standard deviation."""
    rows = [[f"{TABLES[name].data}, test, %", *TABLES[name].columns]]
    for run in TABLES[name].runs:
        rows.append([run.label, *map(linear_eval.text, figures(name, run).values())])
    return linear_eval.table(rows)


def write(name, table):
    """Put the table into the README, between its markers."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = README.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{README} has no {start.strip()} ... {end} to write between")
    README.write_text(before + start + table + "\n" + end + after)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", nargs="?", choices=TABLES, help="which; without one, they are listed")
    p.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    args = p.parse_args(argv)
    if not args.table:
        for name, table in TABLES.items():
            print(f"{name:<12}about {table.hours:g} hours, {len(commands(name))} commands")
        return
    for folder, command in commands(args.table):
        if args.dry_run:
            print(f"python {shlex.join(command)}")
        else:
            execute(folder, command)
    if not args.dry_run:
        table = render(args.table)
        write(args.table, table)
        print(f"\n{table}\n\nwritten into {README.name}")


if __name__ == "__main__":
    try:
        main()
    except (subprocess.CalledProcessError, KeyboardInterrupt) as error:
        sys.exit(f"stopped: {error or 'Ctrl-C'}. The same command goes on from here.")
