"""python -m kernels: which implementation runs here and why, the tools found, the builds kept.
gpu-check: all that a GPU can say (gpu_check.py). check, profile FILE.cu: a sanitizer and a
profiler for any CUDA file, on the CPU (watch.py)."""
import sys

import torch

from . import build, gpu_check, status

if sys.argv[1:2] == ["gpu-check"]:               # all that a machine with a GPU can say
    sys.exit(gpu_check.main(sys.argv[2:]) > 0)
if sys.argv[1:2] in (["check"], ["profile"]):    # a .cu file on the CPU, watched
    from . import watch                          # not on Windows
    sys.exit(watch.main(sys.argv[1:]))
if sys.argv[1:]:
    sys.exit(f"python -m kernels takes nothing, gpu-check, check FILE.cu or profile FILE.cu; not "
             f"{' '.join(sys.argv[1:])}")

here = status()
found = build.toolkit()
print(f"CPU tensors    {here['cpu']}")
print(f"CUDA tensors   {here['cuda']}: {here['why']}")
print(f"emulated       {build.obstacle('emulated') or 'can run: the CUDA source on the CPU'}")
print(f"toolkit        {'CUDA {1} in {0}'.format(*found) if found else 'none'}")
if not found and (torch.version.cuda or "") >= "13":
    print(f"               {build.pip_command()}")
print(f"architectures  {build.architectures()}")
print(f"builds         {build.cache()}")
for library in sorted(build.cache().glob("*/kernels.so")):
    kind = library.parent.name.split("-")[0]
    now = build.obstacle(kind) is None and library == build.library(kind)
    print(f"               {library.parent.name}{', the one in use' if now else ''}")
