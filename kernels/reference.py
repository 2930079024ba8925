"""Both ops in PyTorch: what a CPU runs, and what the kernels are measured against.

Each is a forward and a backward function with the arguments of the compiled op, so that one
autograd formula serves them both.
"""
import torch
import torch.nn.functional as F


# ------------------------------------------------ NT-Xent: Chen et al. 2020, equation 1

def nt_xent_dense(z, temperature):
    """The specification of nt_xent, in the fewest words: the mean loss of the rows of z (2N, D),
    taken as they are; rows i and i + N are a pair. Keeps several (2N, 2N) matrices."""
    sim = z @ z.T / temperature
    sim = sim.fill_diagonal_(-torch.inf)                     # a row is not its own negative
    positive = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(sim, positive)


def _blocks(rows, columns, first, temperature):
    """Yield (slice, sim, spare): sim (b, M) = rows[slice] @ columns.T / temperature, diagonal -inf.

    Blocks of 24 MiB are so few that threads seldom wait for each other. Both buffers are used again
    for the next block, so they may be changed but not kept.
    """
    block = max(1, 6 * 2**20 // len(columns))
    buffers = rows.new_empty(2, min(block, len(rows)), len(columns))
    for start in range(0, len(rows), block):
        here = slice(start, min(start + block, len(rows)))
        sim, spare = buffers[:, :here.stop - start]
        torch.addmm(sim, rows[here], columns.T, beta=0, alpha=1 / temperature, out=sim)
        sim.diagonal(first + start).fill_(-torch.inf)
        yield here, sim, spare


def _positive(rows, here, first):
    """Column of each row's positive, (b, 1): the other half of this rank's rows."""
    i = torch.arange(here.start, here.stop, device=rows.device)
    return (first + (i + len(rows) // 2) % len(rows))[:, None]


def chunked_forward(rows, columns, first, temperature, decoupled=False, group=""):
    """loss = 1/R sum_i (lse_i - s_i,pos(i)), lse_i = log sum_{j != i} exp(s_ij), and two terms of
    each lse_i. decoupled: without pos(i) in that sum.

    rows (R, D) are rows first .. first+R of columns (M, D); the results are () and (R, 2). The
    terms are s_i,pos(i) and the row's loss, in the kernel the row's maximum and the rest. `group`
    is the backward's.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows, columns = rows.to(wide), columns.to(wide)
    loss, positive = rows.new_empty(2, len(rows))
    for here, sim, spare in _blocks(rows, columns, first, temperature):
        at = _positive(rows, here, first)
        positive[here] = sim.gather(1, at)[:, 0]
        if decoupled:
            loss[here] = sim.scatter_(1, at, -torch.inf).logsumexp(1) - positive[here]
        else:
            loss[here] = -torch.log_softmax(sim, 1, out=spare).gather(1, at)[:, 0]
    return loss.mean(), torch.stack((positive, loss), 1)


def chunked_backward(rows, columns, first, temperature, decoupled, lse, grad):
    """d rows_i = 1/t sum_j (g_i P_ij + g_j P_ji - (g_i + g_j) [j = pos(i)]) columns_j.

    P_ij = exp(s_ij - lse_i), the softmax of row i; decoupled: 0 where j = pos(i). S is symmetric,
    so its row i gives P_ij and P_ji both. lse (M, 2) are the two terms, of all columns. grad (G,),
    M a multiple of G: the cotangents of the means of G equal shards of the rows, so g_j =
    grad[j // (M/G)] / (M/G).
    """
    kind, wide = rows.dtype, torch.promote_types(rows.dtype, torch.float32)
    rows, columns, lse = rows.to(wide), columns.to(wide), lse.sum(1)
    each = len(columns) // len(grad)
    g = (grad / each).repeat_interleave(each)
    d_rows = torch.empty_like(rows)
    for here, sim, spare in _blocks(rows, columns, first, temperature):
        i, at = slice(first + here.start, first + here.stop), _positive(rows, here, first)
        if decoupled:
            sim.scatter_(1, at, -torch.inf)
        weight = torch.softmax(sim, 1, out=spare).mul_(g[i, None])
        weight.addcmul_(sim.sub_(lse).exp_(), g)
        weight.scatter_add_(1, at, -(g[i, None] + g[at]))
        torch.addmm(d_rows[here], weight, columns, beta=0, alpha=1 / temperature, out=d_rows[here])
    return d_rows.to(kind)


# ------------------------------------------------ tile shuffle: Noroozi & Favaro 2016

def _corners(cell, offset, grid, height, width):
    """Row and column, each (B, K), of the first pixel of the tile in each of these cells."""
    dy, dx = offset.gather(1, cell[:, :, None].expand(-1, -1, 2)).unbind(2)
    return cell // grid * (height // grid) + dy, cell % grid * (width // grid) + dx


def gather_forward(x, perm, offset, color, grid, tile, image):
    """out[b, k] = tile perm[b, k] of x[b], recoloured; (B, K, C, tile, tile) or the image.

    x (B, C, H, W), uint8 or float; perm (B, K), K = grid * grid; offset (B, K, 2), the place of
    each source tile in its cell. color None: uint8 is divided by 255 and becomes float32. color
    (B, K, C, 2C + 3): in its type, pixel v becomes clamp(A v + G mean + o, low, high), mean the
    tile's mean pixel, where color = [A | G | o | low | high]; G may be left out. The image, if
    `image`, is (B, C, grid * tile, grid * tile), the output tiles row by row.
    """
    top, left = _corners(perm, offset, grid, *x.shape[2:])
    windows = x.unfold(2, tile, 1).unfold(3, tile, 1)        # a view: every place a tile could be
    tiles = windows[torch.arange(len(x), device=x.device)[:, None], :, top, left]
    kind = torch.float32 if x.dtype == torch.uint8 else x.dtype
    if color is not None:
        pixels, c = tiles.to(color.dtype).flatten(0, 1).flatten(2), x.shape[1]  # (B K, C, t t)
        matrix, gray, constant, low, high = color.flatten(0, 1).tensor_split((c, -3, -2, -1), 2)
        if gray.shape[2]:
            constant = torch.baddbmm(constant, gray, pixels.mean(2, keepdim=True))
        pixels = torch.baddbmm(constant, matrix, pixels)
        tiles = torch.clamp(pixels, low, high, out=pixels).view(tiles.shape)
    elif x.dtype == torch.uint8:
        tiles = tiles * torch.tensor(1 / 255, dtype=kind)
    tiles = tiles.to(kind)
    if not image:
        return tiles
    return tiles.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def gather_backward(grad, inverse, offset, color, grid, tile, image, height, width):
    """d x: the gradient of output tile k = inverse[b, s] goes back to cell s; else 0.

    grad has the shape and type of gather_forward's result; d x, (B, C, height, width), that type.
    With color it is multiplied by its A, transposed; there G must be 0, and nothing clamped.
    """
    if image:
        grad = grad.unflatten(3, (grid, tile)).unflatten(2, (grid, tile)).permute(0, 2, 4, 1, 3, 5)
        grad = grad.flatten(1, 2)
    batch = torch.arange(len(grad), device=grad.device)[:, None]
    cells = torch.arange(grid * grid, device=grad.device).expand_as(inverse)
    top, left = _corners(cells, offset, grid, height, width)
    steps, channels = (torch.arange(n, device=grad.device) for n in (tile, grad.shape[2]))
    y, x = (corner[:, :, None] + steps for corner in (top, left))                  # (B, K, tile)
    d_tiles = grad
    if color is not None:
        matrix = color[..., :len(channels)]                                       # (B, K, C, C)
        d_tiles = (matrix.mT @ grad.flatten(3).to(color.dtype)).view(grad.shape).to(grad.dtype)
    d_x = grad.new_zeros(len(grad), len(channels), height, width)
    d_x[batch[..., None, None, None], channels[:, None, None], y[:, :, None, :, None],
        x[:, :, None, None, :]] = d_tiles[batch, inverse]
    return d_x
