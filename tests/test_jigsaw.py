"""train_jigsaw.py: permutations, puzzles, tiles, and what the network is asked and told."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from test_trainers import assert_same

import fgssl
import kernels
import train_jigsaw
from kernels import build
from train_jigsaw import permutation_set


def settings(**changed):
    args = dict(size=64, grid=3, tile=16, perms=100, puzzles=4, min_crop=0.6, color=0.5, gray=0.2,
                tile_norm=False, seed=0, impl="torch")
    return argparse.Namespace(**{**args, **changed})


def distances(perms):
    """Hamming distance of every pair."""
    return [int((a != b).sum()) for a, b in itertools.combinations(perms, 2)]


@pytest.mark.parametrize("grid, count, least", [
    (2, 2, 4), (2, 24, 2), (3, 9, 9), (3, 64, 7), (3, 100, 6), (4, 100, 13), (5, 100, 22)])
def test_permutations_are_far_apart(grid, count, least):
    """Chosen by the greatest mean, or in far-apart pairs, some differ in 2 places of 9."""
    perms = permutation_set(grid, count, seed=0)
    assert perms.shape == (count, grid ** 2), (
        f"shape {perms.shape}, wanted (permutations, tiles) = {(count, grid ** 2)}")
    assert perms.dtype == np.int64, f"type {perms.dtype}, wanted int64, which indexes tensors"
    assert (np.sort(perms, 1) == np.arange(grid ** 2)).all(), "each row is a permutation"
    assert min(distances(perms)) == least, (
        f"two of {count} permutations of {grid} x {grid} tiles differ in {min(distances(perms))} "
        f"places, wanted {least}. Which one is farthest from its nearest among those chosen?")


def test_the_choice_is_greedy_by_minimum_then_by_sum():
    perms = permutation_set(2, 24, seed=3)
    everything = np.array(list(itertools.permutations(range(4))))
    for n in range(1, 24):
        apart = (everything[:, None] != perms[:n]).sum(2)    # (24, n)
        best = max((row.min(), row.sum()) for row in apart)
        chosen = (perms[:n] != perms[n]).sum(1)
        assert (chosen.min(), chosen.sum()) == best, (
            f"number {n} has least distance {chosen.min()} and sum {chosen.sum()} to those before "
            f"it; there is one with {best[0]} and {best[1]}. How are ties broken?")


def test_permutations_repeat_with_the_seed_and_change_with_it():
    first, again, other = (permutation_set(3, 20, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again), "one seed, two answers: draw from default_rng(seed)"
    assert not np.array_equal(first, other), "the seed must decide the first and break ties"


def test_more_permutations_than_there_are_is_an_error():
    """They would come twice, or the choice would never end."""
    try:
        perms = permutation_set(2, 25, seed=0)
    except ValueError:
        return
    pytest.fail(f"{len(perms)} permutations of 2 x 2 tiles, wanted 25: there are 24. What should "
                "the caller be told?")


def test_too_many_permutations_name_the_flag():
    with pytest.raises(ValueError, match="25 permutations of 2 x 2 tiles.*there are 24.*--perms"):
        permutation_set(2, 25, seed=0)


def test_every_permutation_is_drawn_equally_often():
    """A shuffle made of swaps with the first tile leaves most permutations out."""
    perms = torch.from_numpy(permutation_set(2, 24, seed=0))
    rng = torch.Generator().manual_seed(0)
    target, perm, _ = train_jigsaw.draw_puzzles(3000, perms, settings(grid=2), rng)
    assert torch.equal(perms[target], perm)
    count = torch.bincount(target.flatten(), minlength=24)   # 12,000 draws: 500 each, sd 22
    chi2 = ((count - 500.0) ** 2 / 500).sum()
    assert chi2 < 49.7, f"chi-square {chi2:.0f} with 23 degrees of freedom: one in a thousand"


def test_tiles_are_placed_anywhere_in_their_cells_each_on_its_own():
    """Without a gap the edges of neighbours fit, and nothing else need be learned."""
    args = settings(size=66, tile=17)                        # cells of 22: room for 0 to 5
    perms = torch.from_numpy(permutation_set(3, 10, seed=0))
    _, _, offset = train_jigsaw.draw_puzzles(2000, perms, args, torch.Generator().manual_seed(0))
    for k in range(9):
        for axis in range(2):
            count = torch.bincount(offset[:, k, axis], minlength=6)
            assert len(count) == 6 and (count - 2000 / 6).abs().max() < 84, "within 5 sd of 333"
    flat = offset.flatten(1).float()
    off_diagonal = torch.corrcoef(flat.T) - torch.eye(18)
    assert off_diagonal.abs().max() < 0.11, "18 independent draws: correlations within 5 sd of 0"


def test_tiles_unshuffled_are_the_image():
    """12 / 5 taken for 2.4, or rows exchanged with columns, shows here (12, 15)."""
    x = torch.rand(5, 3, 63, 63)
    perms = torch.from_numpy(permutation_set(3, 100, seed=0))
    _, perm, offset = train_jigsaw.draw_puzzles(5, perms, settings(size=63, tile=21),
                                                torch.Generator().manual_seed(0))
    shuffled = kernels.tile_shuffle(x, perm[:, 0], 3, 21, offset, image=True)
    back = perm[:, 0].argsort(1)
    assert torch.equal(kernels.tile_shuffle(shuffled, back, 3, 21, image=True), x)
    assert not torch.equal(shuffled, x)
    identity = torch.arange(9).expand(5, 9)
    assert torch.equal(kernels.tile_shuffle(x, identity, 3, 21, image=True), x)


def test_features_reordered_are_the_features_of_tiles_reordered():
    """The other puzzles of an image reuse its encoded tiles; a wrong inverse teaches noise."""
    args = settings()
    perms = torch.from_numpy(permutation_set(3, 100, seed=0))
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 64, 64, generator=rng)
    _, perm, offset = train_jigsaw.draw_puzzles(3, perms, args, rng)

    def encode(tiles):  # any function of each tile alone
        return tiles.flatten(2)[:, :, ::97]

    h = encode(kernels.tile_shuffle(x, perm[:, 0], 3, 16, offset))
    ours = train_jigsaw.reorder(h, perm).view(3, 4, 9, -1)
    for q in range(4):
        cut_anew = kernels.tile_shuffle(x, perm[:, q], 3, 16, offset)
        assert torch.equal(ours[:, q], encode(cut_anew)), f"puzzle {q} shows tiles in another order"


def shown(tiles, args, rng=None):
    """What the encoder is shown of images whose tiles (B, 9, 3, 16, 16) lie in their own order."""
    rows = tiles.unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    perm = torch.arange(9).expand(len(tiles), 9)
    return train_jigsaw.cut_tiles(rows, perm, torch.zeros(2, dtype=torch.long), args, rng)


@pytest.mark.parametrize("tile_norm", [False, True])
def test_tiles_cut_and_coloured_at_once_are_those_coloured_afterwards(tile_norm):
    """The op's one pass is cut, fgssl.color_jitter and normalise, but for rounding."""
    args, rng = settings(tile_norm=tile_norm), torch.Generator().manual_seed(3)
    x, perm = torch.rand(3, 3, 64, 64, generator=rng), torch.arange(9).flip(0).expand(3, 9)
    ours = train_jigsaw.cut_tiles(x, perm, None, args, torch.Generator().manual_seed(0))
    tiles = kernels.tile_shuffle(x, perm, 3, 16)
    tiles = fgssl.color_jitter(tiles, torch.Generator().manual_seed(0), 0.4, 0.4, 0.4, 0.1)
    tiles = tiles.flatten(0, 1)
    if tile_norm:
        mean, std = (f((1, 2, 3), keepdim=True) for f in (tiles.mean, tiles.std))
        wanted = (tiles - mean) / (std + 0.02)
    else:
        wanted = fgssl.normalize(tiles)
    torch.testing.assert_close(ours, wanted, atol=3e-6, rtol=0)  # a few roundings, over 0.22


def test_tile_norm_takes_brightness_and_contrast_from_every_tile():
    """Drifts of light across the image would tell where a tile was."""
    rng = torch.Generator().manual_seed(0)
    tiles = torch.rand(2, 9, 3, 16, 16, generator=rng)
    args = settings(tile_norm=True, color=0)
    plain, darker = (shown(images, args) for images in (tiles, 0.5 * tiles + 0.2))
    torch.testing.assert_close(plain.mean((1, 2, 3)), torch.zeros(18), atol=1e-5, rtol=0)
    assert (plain.std((1, 2, 3)) - 1).abs().max() < 0.1, "0.02 is added to a deviation near 0.29"
    torch.testing.assert_close(darker, plain, atol=0.3, rtol=0.1)  # but for those 0.02
    flat = shown(torch.full((1, 9, 3, 16, 16), 0.7), args)
    assert flat.abs().max() < 1e-3, "a flat tile is not divided by its std, 0"


def test_neighbours_are_jittered_apart():
    """One jitter for the whole image would leave its tiles matched by their colours."""
    tiles = torch.full((1, 9, 3, 16, 16), 0.5)
    colors, still = (shown(tiles, settings(color=color), torch.Generator().manual_seed(0))
                     for color in (1.0, 0.0))
    assert len(torch.unique(colors[:, 0, 0, 0])) > 4, "each tile is jittered with probability 0.8"
    torch.testing.assert_close(still, fgssl.normalize(tiles[0]), atol=1e-5, rtol=0)


@pytest.fixture
def network():
    torch.manual_seed(0)
    encoder = fgssl.resnet("resnet10")
    head = train_jigsaw.PuzzleHead(encoder.dim, 16, torch.from_numpy(permutation_set(3, 100, 0)))
    images = torch.randint(256, (12, 3, 112, 112), dtype=torch.uint8).numpy()
    device, autocast = fgssl.device_and_precision("fp32")
    return encoder, head, images, settings(), argparse.Namespace(device=device, autocast=autocast)


def test_solving_is_deterministic_and_changes_nothing(network):
    """Dropout or batch-norm left in train mode: another score each time, and a leak (6, 17)."""
    encoder, head = network[:2]
    before = {k: v.clone() for part in (encoder, head) for k, v in part.state_dict().items()}
    first, again = (train_jigsaw.solve(*network) for _ in range(2))
    assert_same(first, again)
    for part in (encoder, head):
        assert part.training, "left as it was found"
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} learned from the puzzles it solved"


def test_an_image_in_a_batch_is_solved_as_it_is_alone(network):
    """Eval mode: the answer does not depend on the other images of the batch."""
    encoder, head, images, *how = network
    _, _, answers = train_jigsaw.solve(encoder, head, images, *how)
    _, _, alone = train_jigsaw.solve(encoder, head, images[:1], *how)
    assert answers[0] == alone[0]


def test_the_picture_shows_the_solution_and_the_truth(network, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(train_jigsaw.pictures, "grid",
                        lambda file, rows, titles: shown.extend(rows))
    encoder, head, images, args, *how = network
    shuffled, target, answer = train_jigsaw.solve(encoder, head, images, args, *how)
    shuffled, target, answer = shuffled[:8], target[:8], answer[:8]
    answer[:4] = target[:4]
    train_jigsaw.draw_solutions(shuffled, target, answer, head.perms, args, tmp_path)
    assert [len(row) for row in shown] == [8, 8, 8]
    assert torch.equal(shown[1][:4], shown[2][:4]) and not torch.equal(shown[1][4:], shown[2][4:])
    view = fgssl.evaluation_view(torch.from_numpy(images[:1]), 64)
    middle = shown[2][0][:, 16:32, 16:32]                    # the true place of the middle tile
    cell = view[0][:, 21:42, 21:42].unfold(1, 16, 1).unfold(2, 16, 1)
    assert any(torch.equal(middle, cell[:, y, x]) for y in range(6) for x in range(6))


@pytest.fixture
def loose(tmp_path):
    """Twelve photographs without labels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def train(folder, out, *more):
    train_jigsaw.main(["--data", str(folder), "--out", str(out), "--size", "24", "--batch", "4",
                       "--epochs", "1", "--precision", "fp32", *more])
    return fgssl.read_checkpoint(out / "checkpoint.pt")


@pytest.mark.skipif(build.obstacle("emulated") is not None, reason=str(build.obstacle("emulated")))
def test_the_kernel_trains_as_pytorch_does(loose, tmp_path):
    """Both get the same permutations, offsets and colours, drawn once, and round them alike."""
    logs = []
    for impl in ("torch", "emulated"):
        train(loose, tmp_path / impl, "--impl", impl)
        logs.append([r["loss"] for r in fgssl.read_log(tmp_path / impl / "log.jsonl")
                     if "loss" in r])
    # tiles differ by 1e-6; AdamW's first step divides a gradient by itself
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-3)
    assert logs[0] == pytest.approx(logs[1], rel=5e-2)


def test_a_tile_larger_than_its_cell_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_jigsaw.main(["--tile", "22", "--out", str(tmp_path)])
    assert "--tile 22 does not fit: a grid of 3 cuts 64 pixels" in capsys.readouterr().err


def test_without_val_puzzles_are_drawn_from_train_and_not_scored(loose, tmp_path):
    train(loose, tmp_path / "out")
    records = fgssl.read_log(tmp_path / "out" / "log.jsonl")
    assert not any("val_puzzles" in record for record in records)
    Image.open(tmp_path / "out" / "puzzles.png").verify()
