"""python -m kernels check FILE.cu: run a stand-alone CUDA file on the CPU, in three orders of threads.

The file is an ordinary CUDA program with kernels and a main(); see host.cuh.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ORDERS = "forward", "reverse", "random:1"


def check(file, kernel=None, args=()):
    """Run FILE.cu in three orders; returns the number of faults."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g", "-w", f"-I{HERE}",
                   "-x", "c++", str(file), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            print(built.stderr)
            return 1
        faults = 0
        for order in ORDERS:
            run = subprocess.run([program, *args], env={**os.environ, "CUDA_ON_CPU_ORDER": order},
                                 capture_output=True, text=True, timeout=60)
            print(f"order {order}: status {run.returncode} {run.stdout}{run.stderr}")
            faults += run.returncode != 0
    return faults


def main(argv):
    import argparse
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    parser.add_argument("command", choices=("check", "profile"))
    parser.add_argument("file", type=Path)
    parser.add_argument("args", nargs="*", help="arguments for the program's main()")
    parser.add_argument("--kernel", help="watch this kernel alone")
    a = parser.parse_args(argv)
    return check(a.file, a.kernel, a.args) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
