"""Super-resolution: how images are shrunk, and how close an enlarged one is to the true one.

Images: high, fake and true (B, 3, scale h, scale w), low (B, 3, h, w), in [0, 1].
"""

import torch
import torch.nn.functional as F

import fgssl
import pictures


def shrink(high, scale):
    """(B, 3, H, W) -> (B, 3, H / scale, W / scale): antialiased bicubic, as in Pillow and MATLAB,
    rounded to the 256 levels of an image file."""
    return to_8_bits(F.interpolate(high, scale_factor=1 / scale, mode="bicubic", antialias=True))


def enlarge(low, scale):
    """Bicubic interpolation, the baseline: (B, 3, h, w) -> (B, 3, scale h, scale w)."""
    return F.interpolate(low, scale_factor=scale, mode="bicubic", antialias=True)


def to_8_bits(x):
    """Rounded to the 256 levels of an image file. Never in a loss: it has no gradient."""
    return x.clamp(0, 1).mul(255).round().div(255)


def luma_bt601(x, border):
    """Y of the image rounded to 8 bits, 16 to 235, as MATLAB's rgb2ycbcr computes it, not rounded.

    (B, 3, H, W) in [0, 1] -> float64 (B, 1, H - 2 border, W - 2 border). ITU-R BT.601.
    """
    weight = torch.tensor((65.481, 128.553, 24.966), dtype=torch.float64, device=x.device)
    y = 16 + (to_8_bits(x).double() * weight.view(1, 3, 1, 1)).sum(1, keepdim=True)
    return y[:, :, border:-border, border:-border]


def psnr(x, y):
    """Peak signal-to-noise ratio of each pair in dB, for a peak of 255: (B, 1, H, W) -> (B,).

    Equal images get 100 dB, so that one blank photograph cannot make a mean infinite.
    """
    return 10 * torch.log10(255 ** 2 / (x - y).square().mean((1, 2, 3)).clamp(min=255 ** 2 / 1e10))


def ssim(x, y):
    """Structural similarity of each pair: (B, 1, H, W), values to 255 -> (B,), 1 for equal images.

    Wang, Bovik, Sheikh & Simoncelli 2004: means, variances and covariance under an 11 x 11 Gaussian
    of std 1.5, wherever that fits; K1 = 0.01, K2 = 0.03.
    """
    at = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    window = torch.exp(-at.square() / (2 * 1.5 ** 2))
    window = (torch.outer(window, window) / window.sum() ** 2).view(1, 1, 11, 11)
    mx, my, xx, yy, xy = (F.conv2d(v, window) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (luminance * structure).mean((1, 2, 3))


@torch.no_grad()
def super_resolve(generator, images, device):
    """Whole images uint8 (n, 3, C, C), cut to a multiple of the scale, shrunk and enlarged again.

    Returns low, bicubic, generated and true images, and scores (2, 2, n): bicubic and generated,
    each by PSNR and SSIM.
    """
    scale = generator.scale
    side = images.shape[-1] // scale * scale
    true = fgssl.to_float(torch.from_numpy(images[:, :, :side, :side]).to(device))
    low = shrink(true, scale)
    guesses = enlarge(low, scale), generator(low)
    y = luma_bt601(true, scale)
    scores = [[measure(luma_bt601(x, scale), y) for measure in (psnr, ssim)] for x in guesses]
    return (low, *guesses, true), torch.stack([torch.stack(pair) for pair in scores])


def val_psnr_ssim(generator, images, device):
    """Mean PSNR and SSIM over at most 64 of the images, beside bicubic's; {} without images."""
    images = images[:: max(1, len(images) // 64)][:64]
    parts = range(0, len(images), 8)
    scores = [super_resolve(generator, images[i:i + 8], device)[1] for i in parts]
    if not scores:
        return {}
    bicubic, generated = torch.cat(scores, 2).mean(2).tolist()
    return dict(val_psnr=generated[0], bicubic_psnr=bicubic[0],
                val_ssim=generated[1], bicubic_ssim=bicubic[1])


def draw_samples(generator, images, device, file):
    """Six images in four rows, with PSNR and SSIM under the two guesses."""
    rows, scores = super_resolve(generator, images[:: max(1, len(images) // 6)][:6], device)
    pixels = F.interpolate(rows[0], scale_factor=generator.scale, mode="nearest")
    captions = [[f"{p:.2f} dB  {s:.3f}" for p, s in zip(*pair)] for pair in scores.tolist()]
    pictures.grid(file, [pixels, *rows[1:]], ("low", "bicubic", "generated", "true"),
                  captions=[[], *captions])
