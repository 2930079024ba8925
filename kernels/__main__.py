"""The kernels on the command line.

    python -m kernels                    # which implementation runs here and why, tools, builds
    python -m kernels gpu-check          # all that a GPU can say (gpu_check.py)
    python -m kernels check FILE.cu      # the faults of a CUDA program, found on the CPU (watch.py)
    python -m kernels profile FILE.cu    # which of its lines waste memory traffic
    python -m kernels.bench              # the times of both operations (bench.py)

The last four take --help.
"""
import sys

from . import build, gpu_check, status

command = sys.argv[1] if sys.argv[1:] else ""
if command in ("-h", "--help"):
    print(__doc__.strip())
    sys.exit()
if command == "gpu-check":
    sys.exit(gpu_check.main(sys.argv[2:]) > 0)
if command in ("check", "profile"):
    from . import watch                          # not on Windows
    sys.exit(watch.main(sys.argv[1:]))
if command:
    sys.exit(f"there is no command {command!r}.\n\n{__doc__.strip()}")

here = status()
found = build.toolkit()
print(f"CPU tensors    {here['cpu']}")
print(f"CUDA tensors   {here['cuda']}: {here['why']}")
print(f"emulated       {build.obstacle('emulated') or 'can run: the CUDA source on the CPU'}")
print(f"toolkit        {'CUDA {1} in {0}'.format(*found) if found else 'none'}")
print(f"architectures  {build.architectures()}")
print(f"builds         {build.cache()}")
for library in sorted(build.cache().glob("*/kernels.so")):
    kind = library.parent.name.split("-")[0]
    now = build.obstacle(kind) is None and library == build.library(kind)
    print(f"               {library.parent.name}{', the one in use' if now else ''}")
