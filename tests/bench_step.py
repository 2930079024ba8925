"""Where the time of a SimCLR step goes: views per second of each stage, and its share of the step.

    python tests/bench_step.py                       # toy birds, 64 pixels
    python tests/bench_step.py --size 224 --arch resnet18 --data FOLDER

Takes the flags of train_simclr.py. Every stage is timed alone, in the order of the loop, and the
median of the steps is printed. Decoding is paid once in the life of a cache, not at each step.
"""

import contextlib
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import fgssl  # noqa: E402
import kernels  # noqa: E402
import runfiles  # noqa: E402
import train_simclr  # noqa: E402
from methods.optimizers import OPTIMIZERS  # noqa: E402

STEPS, DECODED = 20, 128


def main():
    args = train_simclr.arguments([*sys.argv[1:], "--out", "nowhere"])
    device, autocast = fgssl.device_and_precision(args.precision)
    data = fgssl.load_data_for(args)
    side, seconds = fgssl.cache_side(args.size), defaultdict(list)
    images = data.cached("train", side).images

    @contextlib.contextmanager
    def stage(name):
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - start)

    with ThreadPoolExecutor(args.workers) as pool, stage("decode"):
        list(pool.map(lambda path: fgssl.decode(path, side), data.records.paths[:DECODED]))

    encoder = fgssl.resnet(args.arch).to(device, memory_format=torch.channels_last)
    head = train_simclr.ProjectionHead(encoder.dim, args.hidden, 128).to(device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = OPTIMIZERS[args.optimizer](parameters, args.lr, weight_decay=args.weight_decay)
    rng, order = torch.Generator(), fgssl.batches(len(images), args.batch, args.seed)
    for _ in range(2 + STEPS):
        with stage("cache read"):
            x = fgssl.fetch(images, next(order), device)
        with stage("augment"):
            x = fgssl.normalize(train_simclr.two_views(x, args, rng))
            x = x.contiguous(memory_format=torch.channels_last)
        with stage("forward"), autocast:
            h = head(encoder(x))
        with stage("loss"):                                  # and its gradient with respect to h
            leaf = h.detach().float().requires_grad_()
            kernels.nt_xent(F.normalize(leaf, dim=1), args.temperature, args.impl).backward()
        with stage("backward"):
            h.backward(leaf.grad.to(h.dtype))
        with stage("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    decode = seconds.pop("decode")[0]
    median = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    step, views = sum(median.values()), 2 * args.batch
    print(f"{data.name}, {args.size} px, {args.arch}, {views} views a step, "
          f"{runfiles.describe_device(device)}, {STEPS} steps")
    print(f"{'decode':10}  {DECODED / decode:8.0f} images/s, once")
    for name, time_of in median.items():
        print(f"{name:10}  {views / time_of:8.0f} views/s  {100 * time_of / step:5.1f} %")
    network = 100 * (median["forward"] + median["backward"]) / step
    print(f"{'step':10}  {views / step:8.0f} views/s; forward and backward are {network:.1f} %")


if __name__ == "__main__":
    main()
