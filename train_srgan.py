"""SRGAN: enlarge a small image so that a second network cannot tell it from the large original.

A generator gets a crop at a fraction of its size and must rebuild it. First it learns to come close
to every pixel (the pixel phase, "SRResNet"); its images are blurred, because the mean of all
plausible details is nearest. Then a discriminator learns to tell generated images from real ones,
and the generator to fool it. The discriminator's encoder is what `linear_eval.py` measures; for its
features' sake it has a second task, to find the photograph of which a generated image shows a part.

Ledig et al., Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network,
CVPR 2017.

    python train_srgan.py                     # toy birds, on a laptop's CPU
    python train_srgan.py --data my_photos    # any folder of images
    python train_srgan.py --resume            # after Ctrl-C, in either phase
    python train_srgan.py --upscale IMAGE --from out/srgan/checkpoint.pt

Writes out/srgan/: checkpoint.pt, log.jsonl, curves.png, and samples.png (after the pixel phase also
samples_pixel.png): the small image, bicubic interpolation, the generator's and the true one.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F

import fgssl
import kernels
from methods.optimizers import Muon
from methods.srgan import (
    PAPER, Generator, build_discriminator, freeze, load_content_encoder, update_ema)
from methods.super_resolution import (
    draw_samples, enlarge, luma_bt601, psnr, shrink, val_psnr_ssim)
from methods.upscale import upscale

# Images: real, high and fake (B, 3, size, size), low (B, 3, size / scale, size / scale), in [0, 1]


def random_crops(x, size, rng):
    """A random part of each photograph, mirrored or not: uint8 (B, 3, C, C) -> (B, 3, size, size)
    in [0, 1]."""
    return fgssl.hflip(fgssl.random_resized_crop(x, size, rng, scale=(0.15, 1.0)), rng)


def pixel_loss(fake, high):
    """Mean absolute difference; the paper's is the mean square, which blurs more (EDSR)."""
    return F.l1_loss(fake, high)


def feature_loss(network, fake, high):
    """Mean squared difference of feature maps, averaged over stages: the paper's equation 5."""
    with torch.no_grad():
        wanted = network.stages(fgssl.normalize(high))
    maps = network.stages(fgssl.normalize(fake))
    return sum(F.mse_loss(a.float(), b.float()) for a, b in zip(maps, wanted)) / len(maps)


def discriminator_loss(truth_real, truth_fake):
    """Mean -log D(real) plus mean -log(1 - D(fake)), of logits (B,): 2 ln 2 at chance."""
    return F.softplus(-truth_real).mean() + F.softplus(truth_fake).mean()


def adversarial_loss(truth_fake):
    """Mean -log D(fake), the paper's equation 6."""
    return F.softplus(-truth_fake).mean()


def learning_rates(step, pixel_steps, total, args):
    """The generator's and the discriminator's at step 1..total; each phase has its own cosine."""
    if step <= pixel_steps:
        return fgssl.cosine_lr(step, pixel_steps, pixel_steps // 20, args.lr), 0.0
    step, total = step - pixel_steps, total - pixel_steps
    return tuple(fgssl.cosine_lr(step, total, total // 20, peak)
                 for peak in (args.lr_generator, args.lr_discriminator))


def main(argv=None):
    args = arguments(argv)
    if args.upscale:
        return upscale(args.upscale, args.source, args.out)
    run = fgssl.Run(args)
    discriminator = build_discriminator(args).to(run.device, memory_format=torch.channels_last)
    encoder, head = discriminator.encoder, discriminator.head
    generator = Generator(args.blocks, args.width, args.scale)
    generator.to(run.device, memory_format=torch.channels_last)
    ema = freeze(copy.deepcopy(generator))                   # moving average of its weights
    content = encoder
    if args.content_from:
        content = freeze(load_content_encoder(args.content_from, args.arch)).to(run.device)
    g_optimizer = torch.optim.AdamW(generator.parameters(), args.lr, weight_decay=0,
                                    fused=run.device.type == "cuda")
    d_optimizer = Muon(discriminator.parameters(), args.lr_discriminator, weight_decay=1e-4)
    head.match.requires_grad_(args.match > 0)                # or DDP would wait for its gradient
    generate, ddp_discriminator = run.wrap(generator, discriminator)
    run.start(encoder=encoder, head=head, generator=generator, ema=ema,
              g_optimizer=g_optimizer, d_optimizer=d_optimizer)
    shown = run.val.images if len(run.val.images) else run.train.images
    pixel_steps = args.pixel_epochs * run.per_epoch
    if run.begins():
        draw_samples(ema, shown, run.device, run.out / "samples.png")
        print(f"look at {run.out}/samples.png: low, bicubic, generated, true")
        run.note(**val_psnr_ssim(ema, run.val.images, run.device))

    for step, x in run:                                      # x: uint8 (B, 3, C, C)
        lr, d_lr = learning_rates(step, pixel_steps, run.total, args)
        fgssl.set_lr(g_optimizer, lr)
        fgssl.set_lr(d_optimizer, d_lr)
        high = random_crops(x, args.size, run.rng)
        low = shrink(high, args.scale)
        with run.autocast:
            fake = generate(low)                             # once a step, for both networks
        g_terms, d_terms = {"pixel": pixel_loss(fake, high)}, {}

        if step > pixel_steps:
            # The discriminator's step. The real images are other parts of the same photographs. All
            # go in one batch: in separate batches, batch-norm would remove the difference between
            # real and generated images.
            discriminator.train().requires_grad_(True)
            images = torch.cat([random_crops(x, args.size, run.rng), fake.detach()])
            with run.autocast:
                truth, z = ddp_discriminator(fgssl.recolor(images, args, run.rng))
            truth_real, truth_fake = truth.chunk(2)
            truth_loss = discriminator_loss(truth_real, truth_fake)
            d_loss = args.truth * truth_loss
            d_terms = dict(discriminator=truth_loss.detach(), chance=2 * math.log(2),
                           D_real=truth_real.detach().sigmoid().mean(),
                           D_fake=truth_fake.detach().sigmoid().mean())
            if args.match:
                match = kernels.nt_xent(z, 0.1, args.impl, run.group, decoupled=True)
                d_loss = d_loss + args.match * match
                d_terms |= dict(match=match.detach(), chance_match=math.log(2 * args.batch - 2))
            d_optimizer.zero_grad(set_to_none=True)
            d_loss.backward()
            d_optimizer.step()

            # The generator's step, with the discriminator frozen.
            freeze(discriminator)
            with run.autocast:
                truth, _ = discriminator(fgssl.recolor(fake, args, run.rng))
                if args.content == "features":
                    g_terms = {"features": feature_loss(content, fake, high)}
            g_terms["adversarial"] = adversarial_loss(truth)

        weights = {"adversarial": args.adversarial}
        loss = sum(weights.get(name, 1) * value for name, value in g_terms.items())
        g_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        g_optimizer.step()
        update_ema(ema, generator, step)

        if run.due():
            y, bicubic = luma_bt601(high, args.scale), enlarge(low, args.scale)
            close = {name: psnr(luma_bt601(guess.detach(), args.scale), y).mean()
                     for name, guess in (("psnr", fake), ("bicubic", bicubic))}
            run.log(**g_terms, **d_terms, **close, lr=lr)
        if run.evaluates(also=step == pixel_steps):
            run.note(**val_psnr_ssim(ema, run.val.images, run.device),
                     **(run.knn() if step > pixel_steps else {}))  # untrained until then
        if step == pixel_steps and run.rank == 0:
            draw_samples(ema, shown, run.device, run.out / "samples_pixel.png")
    if run.rank == 0:
        draw_samples(ema, shown, run.device, run.out / "samples.png")
    run.finish("--layer best", val_psnr="bicubic_psnr", val_ssim="bicubic_ssim",
               discriminator="chance", knn="random_init")


def arguments(argv):
    p = fgssl.parser(__doc__, data="toy", out="out/srgan", size=64, arch="resnet10",
                     epochs=50, batch=64, lr=1e-3, seed=0)
    p.add_argument("--scale", type=int, choices=(2, 4, 8), default=4, help="enlargement")
    p.add_argument("--blocks", type=fgssl.number(int, 1), default=6,
                   help="residual blocks of the generator; 16 in the paper, for GPUs")
    p.add_argument("--width", type=fgssl.number(int, 1), default=48,
                   help="channels of the generator; 64 in the paper")
    p.add_argument("--pixel-epochs", type=fgssl.number(int, 0),
                   help="length of the pixel phase, at --lr (default: two fifths of --epochs)")
    fgssl.accept_old_flag(p, "--warmup", "--pixel-epochs")
    fgssl.accept_old_flag(p, "--discriminator", "--arch", {"vgg": PAPER, "resnet": None})
    second = p.add_argument_group("adversarial phase, after the pixel phase")
    second.add_argument("--lr-generator", type=fgssl.number(float, above=0), default=4e-4,
                        help="the generator's peak learning rate")
    second.add_argument("--lr-discriminator", type=fgssl.number(float, above=0), default=0.04,
                        help="the discriminator's")
    second.add_argument("--adversarial", type=fgssl.number(float, 0), default=2e-3,
                        help="weight of the adversarial loss beside the content loss; more is "
                             "sharper and further from the truth")
    second.add_argument("--truth", type=fgssl.number(float, 0), default=1.0,
                        help="weight of the discriminator's first task, to tell generated images "
                             "from real ones; 0, with --adversarial 0: the second task alone")
    second.add_argument("--content", choices=("pixel", "features"), default="pixel",
                        help="what the content loss compares generated and true images by")
    second.add_argument("--content-from", metavar="FILE", type=fgssl.path,
                        help="whose features: a checkpoint of an encoder, or torchvision's VGG19 "
                             "weights (default: the discriminator's own)")
    second.add_argument("--match", type=fgssl.number(float, 0), default=1.0,
                        help="weight of the discriminator's second task, to find the photograph of "
                             "each generated image; 0: the paper's method")
    second.add_argument("--color", type=fgssl.number(float, 0, 1.25),
                        help="strength of the colour jitter of what the discriminator is shown; "
                             "weaken it where colour tells classes apart (default: 0.5)")
    second.add_argument("--gray", type=fgssl.number(float, 0, 1),
                        help="probability of a grey image; lower it with --color (default: 0.2)")
    use = p.add_argument_group("in place of training")
    use.add_argument("--upscale", nargs="+", metavar="IMAGE", type=fgssl.path,
                     help="enlarge these, into --out or beside them")
    use.add_argument("--from", dest="source", metavar="CHECKPOINT", type=fgssl.path,
                     help="of the run whose generator does it")
    args = p.parse_args(argv, argparse.Namespace(out=None))  # --upscale needs no folder
    if bool(args.upscale) != bool(args.source):
        p.error("--upscale IMAGE and --from CHECKPOINT go together")
    if args.upscale:
        return args
    args = fgssl.parse(p, argv)
    for name, usual in ("color", 0.5), ("gray", 0.2):        # an older run changed no colours
        if getattr(args, name) is None:
            setattr(args, name, 0.0 if args.resume else usual)
    if args.pixel_epochs is None:
        args.pixel_epochs = round(0.4 * args.epochs)
    if args.pixel_epochs > args.epochs:
        p.error(f"--pixel-epochs {args.pixel_epochs} is more than all --epochs {args.epochs}")
    if args.size % args.scale or args.size < 4 * args.scale:
        p.error(f"--size {args.size} is not a multiple of --scale {args.scale}, 4 times or more")
    if args.content_from and args.content != "features":
        p.error("--content-from is used by --content features only")
    return args


if __name__ == "__main__":
    fgssl.launch(main)
