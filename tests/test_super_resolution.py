"""Super-resolution: how images are shrunk, PSNR and SSIM, and --upscale."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageCms
from test_srgan import noise, run, srgan, trained_like  # noqa: F401

import fgssl
import pictures
from methods.super_resolution import enlarge, luma_bt601, psnr, shrink, ssim, to_8_bits
from methods.srgan import Generator
from methods import upscale
from methods.upscale import enlarge_in_tiles


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_low_is_what_pillow_makes_of_high(scale):
    """Without antialiasing it aliases, and the generator learns to undo what no camera does."""
    high = (noise(1, 3, 48, 48) * 255).round() / 255
    low = shrink(high, scale)
    side = 48 // scale
    pillow = pictures.to_image(high[0]).resize((side, side), Image.BICUBIC)
    difference = np.abs(np.asarray(pillow, int) - np.asarray(pictures.to_image(low[0]), int))
    assert difference.max() <= 1, "Pillow rounds between its two passes"
    assert torch.equal(low, to_8_bits(low)), "a file holds 256 levels"
    big = pictures.to_image(low[0]).resize((48, 48), Image.BICUBIC)
    ours = pictures.to_image(to_8_bits(enlarge(low, scale))[0])
    assert np.abs(np.asarray(big, int) - np.asarray(ours, int)).max() <= 1


def test_tiles_leave_no_seam():
    """A margin smaller than the reach shows as lines across the enlarged image."""
    generator = trained_like(scale=2, blocks=3)
    low = noise(1, 3, 37, 50)
    with torch.no_grad():
        whole = generator(low)
    torch.testing.assert_close(enlarge_in_tiles(generator, low, tile=16), whole,
                               atol=1e-5, rtol=0)  # values near 1: sums in another order


def test_luma_is_that_of_bt601():
    colours = torch.tensor([(0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1.0)])
    y = luma_bt601(colours.view(5, 3, 1, 1).expand(5, 3, 6, 6), 2)
    assert y.shape == (5, 1, 2, 2)
    assert y[:, 0, 0, 0].tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966])


def test_psnr_is_of_y_without_the_border_and_with_the_peak_of_255():
    """On RGB, with the border or the image's own maximum it is another number."""
    x = (77 * noise(2, 3, 20, 17)).round() / 255  # dark: its own maximum would show
    rows = torch.tensor([0, 2]).repeat(10).view(20, 1)  # uneven: absolute differences would show
    y = x + rows * torch.tensor([1, 2]).view(2, 1, 1, 1) / 255
    y[:, :, :4], y[:, :, -4:], y[:, :, :, :4], y[:, :, :, -4:] = 1, 0, 1, 0
    step = (65.481 + 128.553 + 24.966) / 255
    found = psnr(luma_bt601(x, 4), luma_bt601(y, 4))
    wanted = [10 * math.log10(255 ** 2 / (square * step ** 2)) for square in (2, 8)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-3), (               # dB, to three places
        f"{found.tolist()} dB, wanted {wanted}: 10 log10 of 255 squared over the mean square, for "
        "each image alone. Which mean do you take?")
    found = psnr(x, x).tolist()
    assert found == pytest.approx([100, 100]), f"{found} dB for equal images, wanted 100"


def test_ssim_is_the_papers_formula_written_out():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (13, 12))
    y = np.clip(0.6 * x + rng.normal(20, 25, (13, 12)), 0, 255)
    g = [math.exp(-(i - 5) ** 2 / (2 * 1.5 ** 2)) for i in range(11)]
    total, values = sum(g) ** 2, []
    for top in range(3):
        for left in range(2):
            mx = my = xx = yy = xy = 0.0
            for i in range(11):
                for j in range(11):
                    w, a, b = g[i] * g[j] / total, x[top + i, left + j], y[top + i, left + j]
                    mx, my = mx + w * a, my + w * b
                    xx, yy, xy = xx + w * a * a, yy + w * b * b, xy + w * a * b
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
                          / ((mx ** 2 + my ** 2 + c1) * (xx - mx ** 2 + yy - my ** 2 + c2)))
    a, b = (torch.from_numpy(v).view(1, 1, 13, 12) for v in (x, y))
    assert ssim(a, b).item() == pytest.approx(np.mean(values), abs=1e-9), (
        f"{ssim(a, b).item():.6g} for images of 13 x 12, wanted {np.mean(values):.6g}. Do the "
        "window's weights sum to 1, is it only where it fits, are the constants those of values to "
        "255, squared?")
    assert ssim(torch.cat([a, b]), torch.cat([a, a])).tolist() == pytest.approx(
        [1, np.mean(values)]), "each pair on its own"


def test_upscale_takes_images_of_any_size_and_mode(run, tmp_path, capsys):
    images = {"grey.png": Image.new("L", (7, 5), 90), "clear.png": Image.new("RGBA", (33, 9)),
              "one.bmp": Image.new("RGB", (1, 1), "red")}
    for name, image in images.items():
        image.save(tmp_path / name)
    turned = Image.new("RGB", (20, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    files = [str(tmp_path / name) for name in (*images, "turned.jpg")]
    model = ["--from", str(run[0] / "checkpoint.pt")]
    srgan.main(["--upscale", *files, *model])
    for name, size in {"grey": (28, 20), "clear": (132, 36), "one": (4, 4),
                       "turned": (120, 80)}.items():
        assert Image.open(tmp_path / f"{name}_x4.png").size == size
    assert re.search(r"grey\.png 7 x 5 -> .*grey_x4\.png 28 x 20", capsys.readouterr().out)
    srgan.main(["--upscale", files[0], *model, "--out", str(tmp_path / "large")])
    assert (tmp_path / "large" / "grey_x4.png").exists()


def test_upscale_says_what_is_wrong(run, tmp_path):
    model = str(run[0] / "checkpoint.pt")
    (tmp_path / "text.png").write_text("no image")
    torch.save({"encoder": {}}, tmp_path / "other.pt")
    torch.save(run[1] | {"ema": {}}, tmp_path / "empty.pt")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    for image, checkpoint, error in (
            ("absent.png", model, ValueError), ("text.png", model, ValueError),
            ("good.png", tmp_path / "absent.pt", FileNotFoundError),
            ("good.png", tmp_path / "other.pt", ValueError),
            ("good.png", tmp_path / "empty.pt", ValueError)):
        with pytest.raises(error, match=re.escape(image if "good" not in image
                                                  else str(checkpoint))):
            srgan.main(["--upscale", str(tmp_path / image), "--from", str(checkpoint)])


def test_the_enlarged_image_is_that_of_the_average(run, tmp_path):
    """A generator loaded in part, or the noisy one in place of its average, looks nearly right."""
    low = (noise(1, 3, 6, 9) * 255).round() / 255
    pictures.to_image(low[0]).save(tmp_path / "small.png")
    srgan.main(["--upscale", str(tmp_path / "small.png"), "--from", str(run[0] / "checkpoint.pt")])
    ema = Generator(1, 8, 4)
    ema.load_state_dict(run[1]["ema"])
    with torch.no_grad():
        wanted = pictures.to_image(ema(low)[0])
    found = Image.open(tmp_path / "small_x4.png")
    assert np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max() <= 1, "float rounding"


def test_alpha_and_profile_are_kept(run, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGBA", (8, 6), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 4, 6))
    image.save(tmp_path / "a.png", icc_profile=profile)
    srgan.main(["--upscale", str(tmp_path / "a.png"), "--from", str(run[0] / "checkpoint.pt")])
    high = Image.open(tmp_path / "a_x4.png")
    assert high.mode == "RGBA" and high.size == (32, 24) and high.info["icc_profile"] == profile
    alpha = np.asarray(high)[..., 3]
    assert alpha[12, 2] == 0 and alpha[12, 29] == 255


def test_no_two_images_share_an_output_and_a_bad_one_ends_nothing(run, tmp_path, capsys):
    for name in ("a.png", "a.jpg", "b/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), "red").save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = [str(tmp_path / name) for name in ("bad.png", "a.png", "a.jpg", "b/a.png", "a.png")]
    with pytest.raises(fgssl.UserError, match="1 of 4 images are not enlarged.*bad.png"):
        srgan.main(["--upscale", *files, "--from", str(run[0] / "checkpoint.pt"), "--out",
                    str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_x4.png", "a_x4_2.png",
                                                                    "a_x4_3.png"]
    assert "replaces" not in capsys.readouterr().out
    srgan.main(["--upscale", files[1], "--from", str(run[0] / "checkpoint.pt"), "--out",
                str(tmp_path / "out")])
    assert "a_x4.png 20 x 16, which it replaces" in capsys.readouterr().out


def test_an_output_is_neither_an_input_nor_anothers_in_whatever_spelling():
    """Windows and macOS hold one file for A.png and a.png; ../here/a.png is a.png; and a_x4.png,
    given too, was replaced by the enlarged a.png, then enlarged once more."""
    here = Path.cwd().name
    files = ["A.png", "a.jpg", f"../{here}/a.jpg", f"../{here}/a.bmp", "b.png", "b_x4.png"]
    found = {str(file): str(target) for file, target in upscale.targets(files, None, 4).items()}
    assert found == {"A.png": "A_x4.png", "a.jpg": "a_x4_2.png", "b.png": "b_x4_2.png",
                     f"../{here}/a.bmp": f"../{here}/a_x4_3.png", "b_x4.png": "b_x4_x4.png"}
    assert [*map(str, upscale.targets(["x/a.png", "y/A.png"], "out", 4).values())] == [
        "out/a_x4.png", "out/A_x4_2.png"]


def test_an_animation_is_said_to_be_one(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert upscale.read(tmp_path / "a.gif")[0].getpixel((0, 0)) == (255, 0, 0)
    assert "a.gif holds 2 pictures: the first is enlarged" in capsys.readouterr().err


def test_16_bits_with_a_transparent_value_are_not_white(tmp_path):
    grey = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=0)
    image, _, _ = upscale.read(tmp_path / "a.png")
    assert (np.asarray(image) == np.round(grey / 257)[..., None]).all()


def test_strips_are_the_image_and_its_alpha(tmp_path):
    """At 3 x 2 tiles: each strip begins where the last one ended, and alpha has no seams."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (150, 260, 4), dtype=np.uint8)
    image = Image.fromarray(x, "RGBA")
    image.save(tmp_path / "a.png")
    upscale.enlarge_file(Nearest(), tmp_path / "a.png", tmp_path / "high.png", torch.device("cpu"))
    high = np.asarray(Image.open(tmp_path / "high.png"))
    assert (high[..., :3] == x[..., :3].repeat(4, 0).repeat(4, 1)).all()
    alpha = np.asarray(image.getchannel("A").resize((1040, 600), Image.BICUBIC), int)
    assert np.abs(high[..., 3] - alpha).max() <= 1, "one rounding"


def test_a_result_that_nothing_here_reads_is_said(run, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    for most, said in ((4 * 80 * 120, True), (7 * 80 * 120, False)):  # 4 bytes a pixel, and a file
        monkeypatch.setattr(upscale, "MOST_BYTES", most)
        srgan.main(["--upscale", str(tmp_path / "a.png"), "--from", str(run[0] / "checkpoint.pt")])
        assert ("no script here reads it" in capsys.readouterr().err) == said


class Nearest(torch.nn.Module):
    """Each pixel four times in a row and in a column."""
    scale, reach = 4, 2

    def forward(self, x):
        return torch.nn.functional.interpolate(x, scale_factor=4.0)


def test_an_enlarged_image_does_not_live_in_memory(tmp_path):
    """A photograph of 12 MP took 7.2 GB: here 3 MP, beyond what was there before."""
    code = ("import resource, sys; sys.path.insert(0, sys.argv[1])\n"
            "import numpy as np, torch\n"
            "from PIL import Image\n"
            "from methods import upscale\n"
            "class Fast(torch.nn.Module):\n"
            "    scale, reach = 4, 2\n"
            "    def forward(self, x): return torch.nn.functional.interpolate(x, scale_factor=4.)\n"
            "Image.new('RGB', (2000, 1500)).save(sys.argv[2])\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "from pathlib import Path\n"
            "upscale.enlarge_file(Fast(), sys.argv[2], Path(sys.argv[2] + '_x4.png'),"
            " torch.device('cpu'))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    found = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "a.png"], text=True,
                           capture_output=True, check=True).stdout.split()[-1]
    assert int(found) < 100_000, "3 MP at 7 bytes, in kB, a strip and a tile; whole it is 192 MB"
