"""Time both ops beside plain PyTorch: one table, and nothing is timed that is not right.

    python -m kernels.bench                   # on a GPU: the kernels; on a CPU: the PyTorch forms
    python -m kernels.bench --pairs 4096      # one size

On a GPU: CUDA events around ten runs, queued while the GPU is kept busy, so that it waits for no
launch; the inputs stay in the L2 cache, as in training, where they were just written. The roofline
is that of the card: a product and a copy are timed first. On a CPU: wall clock, what the roofline
of --gpu allows, and what the kernel's counted instructions take on an H100. Candidates take turns
and the median is shown, since a machine's speed drifts. MiB is the most memory in use above the
inputs.
"""
import argparse
import ctypes
import math
import statistics
import time

import torch
import torch.nn.functional as F

from . import build, nt_xent, nt_xent_dense, tile_shuffle

# NVIDIA's data sheets: bf16 tensor cores and fp32 in operations/s, memory in bytes/s.
GPUS = {"H100": (989e12, 67e12, 3.35e12), "A100": (312e12, 19.5e12, 2.04e12),
        "T4": (0., 8.1e12, 0.32e12)}
RUNS = 10                                                    # between two events
BUSY = 40_000_000                                            # cycles, about 20 ms: to queue them
# Counted on sm_90, see README.md: instructions of a warp for 16 rows x 64 columns at D = 128,
# (tensor core, all); an H100's tensor cores, cycles/s, and cycles that one of them takes.
FORWARD, BACKWARD, CORES, CYCLES, HMMA = (192, 1018), (384, 1707), 528, 1.755e9, 6.4


def counted(m):
    """(least, most) seconds of NT-Xent forward and backward on an H100, for m views, fp32, D = 128:
    with the tensor cores' time and the others' overlapped entirely, and not at all. All cores are
    taken to be busy: below about 2,000 views they are not, and latency decides."""
    tiles = math.ceil(m / 16) * math.ceil(m / 64)
    matrix, every = (sum(pair) for pair in zip(FORWARD, BACKWARD, strict=True))
    return tuple(tiles * cycles / CORES / CYCLES
                 for cycles in (matrix * HMMA, matrix * HMMA + every))


class Clock:
    """Times one call in seconds, and its memory in bytes."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def time(self, run):
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        torch.cuda._sleep(BUSY)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(RUNS):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / RUNS

    def roofs(self):
        """What this GPU reaches: operations/s in bf16 and in fp32, and bytes/s of a copy."""
        found = []
        for kind, side in ((torch.bfloat16, 8192), (torch.float32, 4096)):
            x = torch.randn(side, side, device="cuda", dtype=kind)
            found.append(2 * side**3 / self.best(lambda x=x: x @ x))
        x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        return (*found, 2 * x.numel() / self.best(x.clone))

    def best(self, run):
        run()
        return min(self.time(run) for _ in range(3))

    def memory(self, run):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before
        ctypes.CDLL(None).malloc_trim(0)                     # memory kept for reuse would hide
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")                                  # the peak starts again from here
        before = resident("VmRSS")
        run()
        return resident("VmHWM") - before


def resident(field):
    """A line of this process's memory account, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def nt_xent_candidates(device):
    """name -> (function of z and temperature, type of z, allowed error against float64)."""
    found = {"PyTorch dense fp32": (nt_xent_dense, torch.float32, 1e-5),
             "PyTorch chunked fp32": (lambda z, t: nt_xent(z, t, "torch"), torch.float32, 1e-5)}
    if device == "cuda":
        found["PyTorch dense bf16"] = (nt_xent_dense, torch.bfloat16, 5e-2)
        compiled = torch.compile(nt_xent_dense)
        found["PyTorch dense TF32"] = (in_tf32(nt_xent_dense), torch.float32, 5e-3)
        found["torch.compile fp32"] = (compiled, torch.float32, 1e-5)
        found["torch.compile TF32"] = (in_tf32(compiled), torch.float32, 5e-3)
        found["torch.compile bf16"] = (compiled, torch.bfloat16, 5e-2)
        if build.obstacle("cuda") is None:
            found["kernel mma fp32"] = (lambda z, t: nt_xent(z, t, "cuda"), torch.float32, 1e-5)
            found["kernel mma bf16"] = (lambda z, t: nt_xent(z, t, "cuda"), torch.bfloat16, 3e-3)
    return found


def in_tf32(run):
    """run, with its fp32 products, and its gradient's, in TF32."""
    def in_it(z, temperature):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            loss = run(z, temperature)
            return torch.autograd.grad(loss, z)[0]
        finally:
            torch.set_float32_matmul_precision(before)
    in_it.gives_gradient = True
    return in_it


def one_by_one(x, perm, grid, tile):
    """Tiles cut and normalised one at a time: what a loop over a batch costs."""
    height, width = x.shape[2] // grid, x.shape[3] // grid
    out = torch.empty(*perm.shape, x.shape[1], tile, tile, device=x.device)
    for b, row in enumerate(perm.tolist()):
        for k, source in enumerate(row):
            top = source // grid * height + (height - tile) // 2
            left = source % grid * width + (width - tile) // 2
            out[b, k] = x[b, :, top:top + tile, left:left + tile] / 255
    return out


def tile_candidates(device):
    found = {"PyTorch loop": one_by_one,
             "PyTorch gather": lambda *args: tile_shuffle(*args, impl="torch")}
    if device == "cuda" and build.obstacle("cuda") is None:
        found["kernel"] = lambda *args: tile_shuffle(*args, impl="cuda")
    return found


def gradient(run, z, temperature):
    if hasattr(run, "gives_gradient"):
        return run(z, temperature)
    return torch.autograd.grad(run(z, temperature), z)[0]


def check(name, ours, exact, allowed):
    error = ((ours.double() - exact).norm() / exact.norm()).item()
    if not error <= allowed:
        raise SystemExit(f"{name} is off by {error:.1e}, allowed {allowed:.1e}: nothing was timed.")


def compare(clock, runs, repeat, operations, moved, peak, bandwidth):
    """Time the runs in turn; print a row for each. Returns {name: (seconds, bytes)}."""
    for run in runs.values():
        run()                                                # compile, warm up
    times = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            times[name].append(clock.time(run))
    floor = max(operations / peak if peak else 0, moved / bandwidth)
    found = {}
    for name, run in runs.items():
        seconds, memory = statistics.median(times[name]), clock.memory(run)
        found[name] = seconds, memory
        share = f"{floor / seconds:6.1%}" if clock.cuda else f"{floor * 1e6:8.1f} us"
        rate, flow = operations / seconds / 1e12, moved / seconds / 1e9
        print(f"  {name:21}{seconds * 1e3:10.2f} ms{memory / 2**20:9.1f} MiB"
              f"{rate:8.3f} TFLOP/s{flow:8.1f} GB/s  {share}")
    return found


def main(argv=None):
    """Print the table. Returns {title: {candidate: (seconds, bytes)}}."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[128, 256, 512, 4096, 16384],
                        help="N")
    parser.add_argument("--dim", type=int, default=128, help="D of NT-Xent")
    parser.add_argument("--batch", type=int, default=64, help="images of the tile shuffle")
    parser.add_argument("--side", type=int, default=225, help="their side in pixels, 3 x 3 tiles")
    parser.add_argument("--repeat", type=int, default=5, help="runs to take the median of")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="whose roofline, without a GPU")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor, plain, bandwidth = GPUS[args.gpu]
    clock = Clock(device)
    where, last = f"CPU, {torch.get_num_threads()} threads", f"least time on an {args.gpu}"
    if clock.cuda:
        tensor, plain, bandwidth = clock.roofs()
        where, last = torch.cuda.get_device_name(), "share of its roofline"
        print(f"it reaches {tensor / 1e12:.0f} TFLOP/s in bf16, {plain / 1e12:.1f} in fp32, and "
              f"{bandwidth / 1e9:.0f} GB/s")
    print(f"{where}, torch {torch.__version__}. Last column: {last}")

    table, candidates = {}, nt_xent_candidates(device)
    z = F.normalize(torch.randn(514, args.dim, device=device, dtype=torch.float64)).requires_grad_()
    for name, (run, kind, allowed) in candidates.items():
        low = z.detach().to(kind).requires_grad_()
        exact = low.detach().double().requires_grad_()
        check(name, gradient(run, low, 0.2), gradient(nt_xent_dense, exact, 0.2), allowed)
    for n in args.pairs:
        found = table[f"NT-Xent, {2 * n} views"] = {}
        if not clock.cuda and args.dim == 128:
            least, most = (f"{seconds * 1e3:.3g}" for seconds in counted(2 * n))
            print(f"counted instructions of the kernel, {2 * n} views, fp32, all cores of an H100: "
                  f"{least} to {most} ms")
        for wide, peak in ((torch.float32, plain), (torch.bfloat16, tensor)):
            runs = {}
            z = F.normalize(torch.randn(2 * n, args.dim, device=device)).to(wide).requires_grad_()
            for name, (run, kind, _) in candidates.items():
                if kind == wide:
                    runs[name] = lambda run=run, z=z: gradient(run, z, 0.2)
            if runs:
                print(f"NT-Xent, forward and backward, N = {n}, D = {args.dim}, {str(wide)[6:]}")
                found |= compare(clock, runs, args.repeat, 6 * (2 * n)**2 * args.dim,
                                 3 * z.numel() * z.element_size(), peak, bandwidth)

    shape = args.batch, 3, args.side, args.side
    x = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    perm = torch.rand(args.batch, 9, device=device).argsort(1)
    tile = args.side // 3
    exact = one_by_one(x, perm, 3, tile).double()
    runs = {}
    for name, run in tile_candidates(device).items():
        runs[name] = lambda run=run: run(x, perm, 3, tile)
        check(name, runs[name](), exact, 1e-6)
    print(f"tile shuffle, uint8 to float32, {' x '.join(map(str, shape))}, 3 x 3 tiles")
    table["tile shuffle"] = compare(clock, runs, args.repeat, exact.numel() * 2, exact.numel() * 5,
                                    plain, bandwidth)
    return table


if __name__ == "__main__":
    main()
