"""Right and wrong bodies of the exercises: what graders must accept, and what they must refuse.

RIGHT has whole bodies in other styles than the project's. WRONG has (what is wrong, text of the
project's body, what stands there instead): the mistakes that students make.
"""

RIGHT = {
    "cosine_lr": ["""
# two cases of one expression
if warmup > 0 and step <= warmup:
    return peak * (step / warmup)
fraction = (step - warmup) / max(total - warmup, 1)
return peak / 2 + peak / 2 * math.cos(fraction * math.pi)
""", """
angle = np.pi * (step - warmup) / (total - warmup)
return float(np.where(step < warmup, peak * step / max(warmup, 1),
                      peak * np.cos(angle / 2) ** 2))
""", """
if step < warmup:
    return torch.linspace(0, peak, warmup + 1, dtype=torch.float64)[step].item()
return peak * (1 - math.sin(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2)
"""],
    "hflip": ["""
out = x.clone()
for i in range(len(x)):
    if torch.rand(1, generator=rng).item() < p:
        out[i] = x[i].flip(-1)
return out
""", """
mask = torch.rand(len(x), generator=rng) < p
out = x.clone()
out[mask] = out[mask][..., torch.arange(x.shape[-1] - 1, -1, -1)]
return out
""", """
coins = torch.bernoulli(torch.full((x.shape[0],), float(p)), generator=rng).bool()
return torch.where(coins[:, None, None, None], torch.flip(x, dims=[3]), x)
"""],
    "crop_boxes": ["""
boxes = []
for _ in range(n):
    for _ in range(10):
        a, b, c, d = torch.rand(4, generator=rng).double().tolist()
        area = height * width * (scale[0] + a * (scale[1] - scale[0]))
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** b
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            boxes.append((min(int(c * (height - h + 1)), height - h),
                          min(int(d * (width - w + 1)), width - w), h, w))
            break
    else:
        w, h = width, height
        if width / height > ratio[1]:
            w = round(height * ratio[1])
        elif width / height < ratio[0]:
            h = round(width / ratio[0])
        boxes.append(((height - h) // 2, (width - w) // 2, h, w))
return torch.tensor(boxes).unbind(1)
""", """
low, high = scale
area = torch.empty(n, 10).uniform_(low, high, generator=rng) * (height * width)
logs = torch.empty(n, 10).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=rng)
h = torch.sqrt(area * torch.exp(-logs)).round().to(torch.int64)
w = torch.sqrt(area * torch.exp(logs)).round().to(torch.int64)
ok = (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
a = min(max(width / height, ratio[0]), ratio[1])
best_w, best_h = min(width, round(height * a)), min(height, round(width / a))
out = torch.empty(n, 2, dtype=torch.int64)
for i in range(n):
    tries = ok[i].nonzero().flatten()
    out[i] = (torch.stack([h[i, tries[0]], w[i, tries[0]]]) if len(tries)
              else torch.tensor([best_h, best_w]))
h, w = out.T
u, v = torch.rand(2, n, generator=rng)
top = torch.where(ok.any(1), (u * (height - h + 1)).floor().long(), (height - h) // 2)
left = torch.where(ok.any(1), (v * (width - w + 1)).floor().long(), (width - w) // 2)
return top, left, h, w
""", """
def draw(low, high):
    return low + (high - low) * torch.rand(10, n, generator=rng)
area, aspect = draw(*scale) * height * width, draw(*map(math.log, ratio)).exp()
w, h = torch.round((area * aspect) ** 0.5).long(), torch.round((area / aspect) ** 0.5).long()
bounded = min(max(width / height, ratio[0]), ratio[1])
out_w = torch.full((n,), min(width, round(height * bounded)))
out_h = torch.full((n,), min(height, round(width / bounded)))
found = torch.zeros(n, dtype=torch.bool)
for i in range(9, -1, -1):
    fits = (w[i] > 0) & (w[i] <= width) & (h[i] > 0) & (h[i] <= height)
    out_w[fits], out_h[fits], found = w[i][fits], h[i][fits], found | fits
places = []
for side, whole in ((out_h, height), (out_w, width)):
    free = (torch.rand(n, generator=rng) * (whole - side + 1)).long()
    places.append(torch.where(found, free, (whole - side) // 2))
return (*places, out_h, out_w)
"""],
    "crop_resize": ["""
x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
out = []
for image, t, l, height, width in zip(x, top, left, h, w):
    t, l, height, width = (int(v) if float(v) == int(v) else float(v)
                           for v in (t, l, height, width))
    if all(isinstance(v, int) for v in (t, l, height, width)):
        box = image[None, :, t:t + height, l:l + width]
        out.append(F.interpolate(box, (size, size), mode="bilinear", align_corners=False))
    else:
        ys = t + ((torch.arange(size) + 0.5) * height / size).clamp(0.5, height - 0.5) - 0.5
        xs = l + ((torch.arange(size) + 0.5) * width / size).clamp(0.5, width - 0.5) - 0.5
        y0, x0 = ys.floor().long(), xs.floor().long()
        y1, x1 = (y0 + 1).clamp(max=image.shape[1] - 1), (x0 + 1).clamp(max=image.shape[2] - 1)
        fy, fx = (ys - y0)[:, None], xs - x0
        top_ = image[:, y0][:, :, x0] * (1 - fx) + image[:, y0][:, :, x1] * fx
        low = image[:, y1][:, :, x0] * (1 - fx) + image[:, y1][:, :, x1] * fx
        out.append((top_ * (1 - fy) + low * fy)[None])
return torch.cat(out)
""", """
x = x.float() / 255 if not x.is_floating_point() else x.float()
def rows(start, length, side):
    at = (torch.arange(size) + 0.5) * (length[:, None] / size) - 0.5
    at = at.clamp(min=0).minimum(length[:, None] - 1.0) + start[:, None]
    places = torch.arange(side)
    return (1 - (at[:, :, None] - places).abs()).clamp(min=0).float()
vertical, horizontal = rows(top, h, x.shape[2]), rows(left, w, x.shape[3])
return torch.einsum("bsh,bchw,btw->bcst", vertical, x, horizontal)
""", """
x = to_float(x)
b, c, height, width = x.shape
i = torch.arange(size) + 0.5
def corners(start, length, side):
    at = start[:, None] + torch.minimum((i * (length[:, None] / size) - 0.5).clamp(min=0),
                                        length[:, None] - 1.0)
    first = at.floor().long().clamp(0, side - 1)
    return first, (first + 1).clamp(max=side - 1), (at - first).float()
y0, y1, fy = corners(top, h, height)
x0, x1, fx = corners(left, w, width)
n = torch.arange(b)[:, None, None]
def at(y, xx):
    return x[n, :, y[:, :, None], xx[:, None, :]].permute(0, 3, 1, 2)
fy, fx = fy[:, None, :, None], fx[:, None, None, :]
upper = at(y0, x0).lerp(at(y0, x1), fx.expand(b, c, size, size))
lower = at(y1, x0).lerp(at(y1, x1), fx.expand(b, c, size, size))
return upper.lerp(lower, fy.expand(b, c, size, size))
"""],
    "knn": ["""
out = []
for q in h:
    s = F.cosine_similarity(train_h, q[None])
    near = s.argsort(descending=True)[:k]
    votes = [0.0] * classes
    for j in near.tolist():
        votes[int(train_labels[j])] += math.exp(s[j].item() / 0.07)
    out.append(votes.index(max(votes)))
return torch.tensor(out)
""", """
a = train_h.double().numpy()
b = h.double().numpy()
a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
s = b @ a.T
near = np.argsort(-s, axis=1)[:, :k]
weight = np.exp(np.take_along_axis(s, near, 1) / 0.07)
votes = np.zeros((len(b), classes))
for c in range(classes):
    votes[:, c] = (weight * (train_labels.numpy()[near] == c)).sum(1)
return torch.from_numpy(votes.argmax(1))
""", """
s = F.normalize(h) @ F.normalize(train_h).T
k = min(k, s.shape[1])
least = s.topk(k).values[:, -1:]
weight = torch.where(s >= least, (s / 0.07).exp(), torch.zeros(()))
return (weight @ F.one_hot(train_labels, classes).float()).argmax(dim=1)
"""],
    "nt_xent_dense": ["""
n = len(z) // 2
sim = (z @ z.T) / temperature
loss = 0
for i in range(2 * n):
    others = [k for k in range(2 * n) if k != i]
    loss = loss + torch.logsumexp(sim[i, others], 0) - sim[i, (i + n) % (2 * n)]
return loss / (2 * n)
""", """
two_n = z.shape[0]
logits = torch.einsum("id,jd->ij", z, z) / temperature
mask = torch.eye(two_n, dtype=torch.bool, device=z.device)
logits = logits.masked_fill(mask, float("-inf"))
log_prob = logits - torch.logsumexp(logits, dim=1, keepdim=True)
i = torch.arange(two_n, device=z.device)
return -log_prob[i, (i + two_n // 2) % two_n].mean()
""", """
a, b = z.chunk(2)
n = len(a)
aa, bb, ab = a @ a.T / temperature, b @ b.T / temperature, a @ b.T / temperature
off = torch.zeros_like(aa).fill_diagonal_(-torch.inf)
one = torch.cat([ab, aa + off], 1)
two = torch.cat([ab.T, bb + off], 1)
label = torch.arange(n, device=z.device)
return (F.cross_entropy(one, label) + F.cross_entropy(two, label)) / 2
"""],
    "chunked_forward": ["""
wide = torch.promote_types(rows.dtype, torch.float32)
rows, columns = rows.to(wide), columns.to(wide)
n, losses, tops = len(rows), [], []
for start in range(0, n, 256):
    part = rows[start:start + 256]
    sim = part @ columns.T / temperature
    i = torch.arange(start, start + len(part))
    sim[i - start, first + i] = -torch.inf
    positive = sim[i - start, first + (i + n // 2) % n]
    if decoupled:
        sim[i - start, first + (i + n // 2) % n] = -torch.inf
    losses.append(torch.logsumexp(sim, 1) - positive)
    tops.append(positive)
loss, top = torch.cat(losses), torch.cat(tops)
return loss.mean(), torch.stack([top, loss], dim=1)
""", """
wide = torch.promote_types(rows.dtype, torch.float32)
rows, columns = rows.to(wide), columns.to(wide)
r = len(rows)
i = torch.arange(r)
positive = (rows * columns[first + (i + r // 2) % r]).sum(1) / temperature
top = torch.full((r,), -torch.inf, dtype=wide)
total = torch.zeros(r, dtype=wide)
for start in range(0, len(columns), 512):
    sim = rows @ columns[start:start + 512].T / temperature
    at = first + i - start
    inside = (at >= 0) & (at < sim.shape[1])
    sim[i[inside], at[inside]] = -torch.inf
    if decoupled:
        pair = first + (i + r // 2) % r - start
        here = (pair >= 0) & (pair < sim.shape[1])
        sim[i[here], pair[here]] = -torch.inf
    new = torch.maximum(top, sim.amax(1))
    safe = new.masked_fill(new == -torch.inf, 0)
    total = total * (top - safe).exp() + (sim - safe[:, None]).exp().sum(1)
    top = new
log_sum = total.log()
return (top - positive + log_sum).mean(), torch.stack([top, log_sum], 1)
""", """
kind = torch.promote_types(rows.dtype, torch.float32)
rows, columns = rows.to(kind), columns.to(kind)
out = rows.new_empty(2, len(rows))
for i, row in enumerate(rows) if len(rows) < 300 else ():
    sim = columns @ row / temperature
    sim[first + i] = -torch.inf
    pair = first + (i + len(rows) // 2) % len(rows)
    out[1, i] = sim[pair]
    sim[pair] = -torch.inf if decoupled else sim[pair]
    out[0, i] = sim.logsumexp(0) - out[1, i]
if len(rows) >= 300:
    for here, sim, spare in _blocks(rows, columns, first, temperature):
        out[1, here] = sim.gather(1, _positive(rows, here, first))[:, 0]
        if decoupled:
            sim.scatter_(1, _positive(rows, here, first), -torch.inf)
        out[0, here] = sim.logsumexp(1) - out[1, here]
return out[0].mean(), out.flip(0).T
"""],
    "chunked_backward": ["""
kind, wide = rows.dtype, torch.promote_types(rows.dtype, torch.float32)
rows, columns, lse = rows.to(wide), columns.to(wide), lse[:, 0] + lse[:, 1]
grad = grad.repeat_interleave(len(columns) // len(grad)) * len(grad) / len(columns)
r, out = len(rows), []
for start in range(0, r, 256):
    part = rows[start:start + 256]
    i = torch.arange(start, start + len(part))
    sim = part @ columns.T / temperature
    mine, pos = first + i, first + (i + r // 2) % r
    weight = grad[mine, None] * (sim - lse[mine, None]).exp() + (sim - lse).exp() * grad
    k = torch.arange(len(part))
    weight[k, mine] = 0
    if decoupled:
        weight[k, pos] = 0
    weight[k, pos] -= grad[mine] + grad[pos]
    out.append(weight @ columns / temperature)
return torch.cat(out).to(kind)
""", """
kind, wide = rows.dtype, torch.promote_types(rows.dtype, torch.float32)
rows, columns, lse = rows.to(wide), columns.to(wide), lse[:, 0] + lse[:, 1]
grad = grad.repeat_interleave(len(columns) // len(grad)) * len(grad) / len(columns)
r = len(rows)
i = torch.arange(r)
mine, pos = first + i, first + (i + r // 2) % r
out = -(grad[mine] + grad[pos])[:, None] * columns[pos]
for start in range(0, len(columns), 512):
    block = columns[start:start + 512]
    sim = rows @ block.T / temperature
    at = mine - start
    inside = (at >= 0) & (at < len(block))
    sim[i[inside], at[inside]] = -torch.inf
    if decoupled:
        pair = pos - start
        here = (pair >= 0) & (pair < len(block))
        sim[i[here], pair[here]] = -torch.inf
    j = slice(start, start + len(block))
    weight = (sim - lse[mine, None]).exp() * grad[mine, None] + (sim - lse[j]).exp() * grad[j]
    out += weight @ block
return (out / temperature).to(kind)
""", """
kind, wide = rows.dtype, torch.promote_types(rows.dtype, torch.float32)
rows, columns, lse = rows.to(wide), columns.to(wide), lse[:, 0] + lse[:, 1]
grad = grad.repeat_interleave(len(columns) // len(grad)) * len(grad) / len(columns)
out = []
for here, sim, _ in _blocks(rows, columns, first, temperature):
    i = torch.arange(first + here.start, first + here.stop)
    at = _positive(rows, here, first)
    p = torch.exp(sim - lse[i, None])
    q = torch.exp(sim - lse[None])
    if decoupled:
        p, q = p.scatter(1, at, 0), q.scatter(1, at, 0)
    w = torch.einsum("i,ij->ij", grad[i], p) + torch.einsum("j,ij->ij", grad, q)
    w.scatter_add_(1, at, -(grad[i][:, None] + grad[at]))
    out.append(w @ columns / temperature)
return torch.cat(out).to(kind)
"""],
    "_backward_rows.backward": ["""
saved = ctx.saved_tensors
rows, columns, lse, left = saved[0], saved[1], saved[2], saved[3:]
weight = grad.reshape(1)
if ctx.group:
    lse = _gather(lse, ctx.group)
    weight = _gather(weight, ctx.group)
return (function(rows, columns, *ctx.settings, lse, weight, *left),) + (None,) * 5
""", """
# one message for both
rows, columns, lse, *left = ctx.saved_tensors
grad = grad[None]
if ctx.group:
    both = _gather(torch.cat([lse.flatten(), grad.to(lse)]), ctx.group).view(-1, lse.numel() + 1)
    lse, grad = both[:, :-1].reshape(-1, 2), both[:, -1].to(grad)
return function(rows, columns, *ctx.settings, lse, grad, *left), None, None, None, None, None
""", """
# a cotangent for each row
rows, columns, lse, *left = ctx.saved_tensors
every = grad.expand(len(rows)) / len(rows)
if ctx.group:
    lse, every = [_gather(mine.contiguous(), ctx.group) for mine in (lse, every)]
return function(rows, columns, *ctx.settings, lse, every, *left), *(None,) * 5
"""],
    "tiles_forward": ["""
    int tiles = at.grid * at.grid, k = blockIdx.x % tiles, area = at.tile * at.tile;
    int64_t b = blockIdx.x / tiles, corner = at.source(b, k, perm, offset);
    int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    for (int n = thread; n < at.channels * area; n += threads) {
        int c = n / area, y = n / at.tile % at.tile, x = n % at.tile;
        auto value = widen(load_global(in + at.in(b, c) + corner + int64_t(y) * at.width + x));
        if (sizeof(In) == 1) value *= Wide<In>(1) / 255;
        store_global(out + at.out(b, k, c) + int64_t(y) * at.out_stride() + x, narrow<Out>(value));
    }
""", """
    const int64_t grid = at.grid, tiles = grid * grid, b = blockIdx.x / tiles;
    const int64_t k = blockIdx.x - b * tiles, cell = load_global(perm + b * tiles + k);
    require(cell >= 0 && cell < tiles, "perm names a tile that does not exist");
    const int64_t dy = load_global(offset + 2 * (b * tiles + cell));
    const int64_t dx = load_global(offset + 2 * (b * tiles + cell) + 1);
    const int64_t top = cell / grid * (at.height / grid) + dy;
    const int64_t left = cell % grid * (at.width / grid) + dx;
    require(dy >= 0 && dx >= 0 && dy + at.tile <= at.height / grid &&
            dx + at.tile <= at.width / grid, "an offset leaves its cell");
    for (int x = threadIdx.x; x < at.tile; x += blockDim.x)
        for (int y = threadIdx.y; y < at.tile; y += blockDim.y)
            for (int c = 0; c < at.channels; c++) {
                int64_t from = ((b * at.channels + c) * at.height + top + y) * at.width + left + x;
                int64_t to = ((b * tiles + k) * at.channels + c) * at.tile * at.tile +
                             y * at.tile + x;
                if (at.image)
                    to = ((b * at.channels + c) * grid * at.tile + k / grid * at.tile + y) *
                             grid * at.tile + k % grid * at.tile + x;
                Wide<In> value = widen(load_global(in + from));
                store_global(out + to, narrow<Out>(sizeof(In) == 1 ? value * (Wide<In>(1) / 255)
                                                                   : value));
            }
""", """
    // a warp owns whole rows, of all channels
    int tiles = at.grid * at.grid, k = blockIdx.x % tiles;
    int64_t b = blockIdx.x / tiles, corner = at.source(b, k, perm, offset);
    for (int row = threadIdx.y; row < at.channels * at.tile; row += blockDim.y) {
        int c = row / at.tile, y = row - c * at.tile;
        const In* from = in + at.in(b, c) + corner + int64_t(y) * at.width;
        Out* to = out + at.out(b, k, c) + int64_t(y) * at.out_stride();
        int x = threadIdx.x;
        while (x < at.tile) {
            Wide<In> unit = sizeof(In) == 1 ? Wide<In>(1) / 255 : Wide<In>(1);
            store_global(to + x, narrow<Out>(unit * widen(load_global(from + x))));
            x += blockDim.x;
        }
    }
"""],
    "forward_simt": ["""
    using W = Wide<T>;
    DYN_SMEM(W, shared);
    int i0 = blockIdx.x * TILE, end = shard_begin(p.m, TILE, blockIdx.y + 1);
    Row<W> row[4];
    for (int j0 = shard_begin(p.m, TILE, blockIdx.y); j0 < end; j0 += TILE) {
        W s[4][4];
        similarities(p, i0, j0, shared, s);
        for (int r = 0; r < 4; r++) {
            int at = p.positive(i0 + 4 * threadIdx.y + r) - j0 - 4 * int(threadIdx.x);
            for (int c = 0; c < 4; c++) {  // the running sum by hand, one column at a time
                if (c == at) row[r].positive = s[r][c];
                if (c == at && p.decoupled) continue;
                W best = s[r][c] > row[r].top ? s[r][c] : row[r].top;
                row[r].sum = row[r].sum * exponential(row[r].top - best) +
                             exponential(s[r][c] - best);
                row[r].top = best;
            }
        }
    }
    finish<16>(row, p.r, out, shared, [](int r) { return 4 * threadIdx.y + r; });
""", """
    using W = Wide<T>;
    DYN_SMEM(W, shared);
    int i0 = blockIdx.x * TILE, begin = shard_begin(p.m, TILE, blockIdx.y);
    int end = shard_begin(p.m, TILE, blockIdx.y + 1);
    Row<W> row[4];
    W s[4][4];
    for (int j0 = begin; j0 < end; j0 += TILE) {  // first the maximum, then the sum
        similarities(p, i0, j0, shared, s);
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < 4; c++) {
                int j = j0 + 4 * threadIdx.x + c;
                bool counts = !p.decoupled || j != p.positive(i0 + 4 * threadIdx.y + r);
                if (counts && s[r][c] > row[r].top) row[r].top = s[r][c];
            }
    }
    for (int j0 = begin; j0 < end; j0 += TILE) {
        similarities(p, i0, j0, shared, s);
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < 4; c++) {
                bool pair =
                    j0 + 4 * int(threadIdx.x) + c == p.positive(i0 + 4 * threadIdx.y + r);
                if (pair) row[r].positive = s[r][c];
                if (!pair || !p.decoupled) row[r].sum += exponential(s[r][c] - row[r].top);
            }
    }
    finish<16>(row, p.r, out, shared, [](int r) { return 4 * threadIdx.y + r; });
""", """
    DYN_SMEM(Wide<T>, shared);
    int i0 = blockIdx.x * TILE, mine = i0 + 4 * threadIdx.y;
    Row<Wide<T>> row[4];
    int j0 = shard_begin(p.m, TILE, blockIdx.y);
    while (j0 < shard_begin(p.m, TILE, blockIdx.y + 1)) {
        Wide<T> s[4][4];
        similarities(p, i0, j0, shared, s);
        for (int n = 0; n < 16; n++) {  // a column is a row of one column: join them
            int r = n / 4, j = j0 + 4 * threadIdx.x + n % 4;
            bool pair = j == p.positive(mine + r);
            bool counts = !pair || !p.decoupled;
            row[r].join(counts ? s[r][n % 4] : lowest(Wide<T>()), counts,
                        pair ? s[r][n % 4] : Wide<T>(0));
        }
        j0 += TILE;
    }
    finish<16>(row, p.r, out, shared, [](int r) { return 4 * threadIdx.y + r; });
"""],
    "gather_forward": ["""
b, c, height, width = x.shape
k = grid * grid
kind = torch.float32 if x.dtype == torch.uint8 else x.dtype
out = torch.empty(b, k, c, tile, tile, dtype=kind)
for n in range(b):
    for i in range(k):
        cell = int(perm[n, i])
        y = cell // grid * (height // grid) + int(offset[n, cell, 0])
        xx = cell % grid * (width // grid) + int(offset[n, cell, 1])
        piece = x[n, :, y:y + tile, xx:xx + tile]
        if color is not None:
            v, table = piece.to(color.dtype), color[n, i]
            new = torch.einsum("ij,jyx->iyx", table[:, :c], v) + table[:, -3, None, None]
            if table.shape[1] > c + 3:
                new = new + (table[:, c:2 * c] @ v.mean((1, 2)))[:, None, None]
            piece = torch.maximum(torch.minimum(new, table[:, -1, None, None]),
                                  table[:, -2, None, None])
        elif x.dtype == torch.uint8:
            piece = piece / 255
        out[n, i] = piece.to(kind)
if image:
    out = torch.cat([torch.cat(list(out[:, r * grid:(r + 1) * grid].unbind(1)), 3)
                     for r in range(grid)], 2)
return out
""", """
b, c, height, width = x.shape
dy, dx = offset.gather(1, perm[..., None].expand(-1, -1, 2)).unbind(2)
top = perm // grid * (height // grid) + dy
left = perm % grid * (width // grid) + dx
steps = torch.arange(tile)
rows, cols = top[..., None] + steps, left[..., None] + steps
flat = (rows[..., :, None] * width + cols[..., None, :]).reshape(b, 1, -1).expand(-1, c, -1)
tiles = x.flatten(2).gather(2, flat).view(b, c, grid * grid, tile, tile).transpose(1, 2)
kind = torch.float32 if x.dtype == torch.uint8 else x.dtype
if color is not None:
    v = tiles.to(color.dtype)
    o, low, high = (color[..., j, None, None] for j in (-3, -2, -1))
    new = torch.einsum("bkij,bkjyx->bkiyx", color[..., :c], v) + o
    if color.shape[3] == 2 * c + 3:
        mean = v.mean((3, 4), keepdim=True)
        new = new + torch.einsum("bkij,bkjyx->bkiyx", color[..., c:2 * c], mean)
    tiles = new.maximum(low).minimum(high)
elif x.dtype == torch.uint8:
    tiles = tiles.float() / 255
tiles = tiles.to(kind)
if image:
    tiles = tiles.reshape(b, grid, grid, c, tile, tile).permute(0, 3, 1, 4, 2, 5)
    tiles = tiles.reshape(b, c, grid * tile, grid * tile)
return tiles
""", """
b, c, height, width = x.shape
cells = []
for s in range(grid * grid):
    y0, x0 = s // grid * (height // grid), s % grid * (width // grid)
    cells.append(torch.stack([x[n, :, y0 + offset[n, s, 0]:y0 + offset[n, s, 0] + tile,
                                x0 + offset[n, s, 1]:x0 + offset[n, s, 1] + tile]
                              for n in range(b)]))
tiles = torch.stack(cells, 1)[torch.arange(b)[:, None], perm]
kind = torch.float32 if x.dtype == torch.uint8 else x.dtype
if color is not None:
    v = tiles.flatten(3).to(color.dtype)
    new = color[..., :c] @ v + color[..., -3:-2]
    if color.shape[3] > c + 3:
        new = new + color[..., c:2 * c] @ v.mean(3, keepdim=True)
    tiles = torch.clamp(new, color[..., -2:-1], color[..., -1:]).view(tiles.shape)
elif kind != x.dtype:
    tiles = tiles.to(kind).mul(1 / 255)
tiles = tiles.to(kind)
if not image:
    return tiles
return torch.stack([torch.cat([torch.cat([t[r * grid + k] for k in range(grid)], 2)
                               for r in range(grid)], 1) for t in tiles])
"""],
    "gather_backward": ["""
b = len(grad)
c = grad.shape[1] if image else grad.shape[2]
out = grad.new_zeros(b, c, height, width)
for n in range(b):
    for s in range(grid * grid):
        k = int(inverse[n, s])
        if image:
            r, q = divmod(k, grid)
            piece = grad[n, :, r * tile:(r + 1) * tile, q * tile:(q + 1) * tile]
        else:
            piece = grad[n, k]
        if color is not None:
            matrix = color[n, k, :, :c]
            piece = torch.einsum("ij,iyx->jyx", matrix, piece.to(matrix.dtype)).to(grad.dtype)
        y = s // grid * (height // grid) + int(offset[n, s, 0])
        x = s % grid * (width // grid) + int(offset[n, s, 1])
        out[n, :, y:y + tile, x:x + tile] = piece
return out
""", """
b, k = inverse.shape
if image:
    grad = grad.view(b, -1, grid, tile, grid, tile).permute(0, 2, 4, 1, 3, 5).reshape(
        b, k, -1, tile, tile)
c = grad.shape[2]
source = grad
if color is not None:
    source = torch.einsum("bkij,bkiyx->bkjyx", color[..., :c], grad.to(color.dtype))
cells = torch.arange(k)
top = cells // grid * (height // grid) + offset[..., 0]
left = cells % grid * (width // grid) + offset[..., 1]
steps = torch.arange(tile)
flat = ((top[..., None] + steps)[..., None] * width + (left[..., None] + steps)[..., None, :])
source = source[torch.arange(b)[:, None], inverse].to(grad.dtype)
out = grad.new_zeros(b, c, height * width)
out.scatter_(2, flat.reshape(b, 1, -1).expand(-1, c, -1), source.transpose(1, 2).reshape(b, c, -1))
return out.view(b, c, height, width)
""", """
b, k = inverse.shape
if image:
    grad = grad.unfold(2, tile, tile).unfold(3, tile, tile).flatten(2, 3).transpose(1, 2)
out = torch.zeros(b, grad.shape[2], height, width, dtype=grad.dtype)
for n in range(b):
    for place in range(k):
        s = (inverse[n] == place).nonzero().item()
        y = (s // grid) * (height // grid) + offset[n, s, 0].item()
        x = (s % grid) * (width // grid) + offset[n, s, 1].item()
        piece = grad[n, place].flatten(1)
        if color is not None:
            piece = color[n, place, :, :len(piece)].T @ piece.to(color.dtype)
        out[n, :, y:y + tile, x:x + tile] += piece.to(grad.dtype).view(-1, tile, tile)
return out
"""],
    "permutation_set": ["""
rng = np.random.default_rng(seed)
k = grid * grid
if grid <= 3:
    pool = np.array(list(itertools.permutations(range(k))))
else:
    pool = np.unique(np.stack([rng.permutation(k) for _ in range(100_000)]), axis=0)
if count > len(pool):
    raise fgssl.UserError(f"{count} permutations of {grid} x {grid} tiles, but there are "
                          f"{len(pool)}: lower --perms, or raise --grid.")
rng.shuffle(pool)
least, total, chosen = np.full(len(pool), k), np.zeros(len(pool), int), [0]
for _ in range(count - 1):
    d = (pool != pool[chosen[-1]]).sum(1)
    least, total = np.minimum(least, d), total + d
    chosen.append(int(np.argmax(least * (total.max() + 1) + total)))
return pool[chosen].astype(np.int64)
""", """
rng = np.random.default_rng(seed)
k = grid ** 2
if grid <= 3:
    pool = np.array(list(itertools.permutations(range(k))), np.int8)
else:
    pool = np.tile(np.arange(k, dtype=np.int8), (100_000, 1))
    pool = np.unique(rng.permuted(pool, axis=1), axis=0)
if count > len(pool):
    raise ValueError("not so many")
first = rng.integers(len(pool))
chosen, least, total = [first], np.full(len(pool), k + 1), np.zeros(len(pool))
noise = rng.random(len(pool)) / 2
while len(chosen) < count:
    d = np.count_nonzero(pool != pool[chosen[-1]], axis=1)
    least, total = np.minimum(least, d), total + d
    order = np.lexsort((noise, total, least))
    chosen.append(order[-1])
return pool[np.array(chosen)].astype("int64")
""", """
rng = torch.Generator().manual_seed(seed)
k = grid * grid
if grid <= 3:
    pool = torch.tensor(list(itertools.permutations(range(k))), dtype=torch.int8)
else:
    pool = torch.rand(100_000, k, generator=rng).argsort(1).to(torch.int8).unique(dim=0)
if count > len(pool):
    raise fgssl.UserError(f"{count} permutations of {grid} x {grid} tiles, but there are "
                          f"{len(pool)}: lower --perms, or raise --grid.")
pool = pool[torch.randperm(len(pool), generator=rng)]
least, total = torch.full((len(pool),), k), torch.zeros(len(pool), dtype=torch.int64)
chosen = [0]
for _ in range(1, count):
    d = (pool != pool[chosen[-1]]).sum(1)
    least, total = torch.minimum(least, d), total + d
    chosen.append((least * 1_000_000 + total).argmax().item())
return pool[chosen].long().numpy()
"""],
    "psnr": ["""
import math
out = []
for a, b in zip(x, y):
    mse = ((a - b) ** 2).mean().item()
    out.append(100.0 if mse == 0 else min(100.0, 10 * math.log10(255 * 255 / mse)))
return x.new_tensor(out)
""", """
import math
mse = F.mse_loss(x, y, reduction="none").flatten(1).mean(1)
return (20 * math.log10(255) - 10 * torch.log10(mse)).clamp(max=100)
""", """
rms = (x - y).flatten(1).norm(dim=1) / x[0].numel() ** 0.5
return torch.minimum(20 * torch.log10(255 / rms), torch.full_like(rms, 100))
"""],
    "ssim": ["""
import math
g = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)], dtype=x.dtype)
g = g / g.sum()
def blur(v):
    return F.conv2d(F.conv2d(v, g.view(1, 1, 11, 1)), g.view(1, 1, 1, 11))
mx, my = blur(x), blur(y)
vx, vy, cov = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
c1, c2 = 6.5025, 58.5225
s = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))
return s.flatten(1).mean(1)
""", """
i = torch.arange(11, dtype=x.dtype)
d = (i[:, None] - 5) ** 2 + (i - 5) ** 2
w = torch.exp(-d / (2 * 1.5 * 1.5))
w = w / w.sum()
def windows(v):
    return v[:, 0].unfold(1, 11, 1).unfold(2, 11, 1)
a, b = windows(x), windows(y)
ma, mb = (a * w).sum((3, 4)), (b * w).sum((3, 4))
da, db = a - ma[..., None, None], b - mb[..., None, None]
va, vb, cov = ((p * w).sum((3, 4)) for p in (da * da, db * db, da * db))
c1, c2 = 2.55 ** 2, 7.65 ** 2
return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))
        ).mean((1, 2))
""", """
k = torch.signal.windows.gaussian(11, std=1.5, dtype=x.dtype)
k = torch.outer(k, k)[None, None]
k = k / k.sum()
stack = torch.cat([x, y, x ** 2, y ** 2, x * y], 1)
mx, my, xx, yy, xy = F.conv2d(stack, k.expand(5, 1, 11, 11), groups=5).unbind(1)
c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
a, b = 2 * mx * my + c1, 2 * (xy - mx * my) + c2
c, d = mx.square() + my.square() + c1, (xx - mx.square()) + (yy - my.square()) + c2
return (a * b / (c * d)).mean(dim=(1, 2))
"""],
    "grad_cam": ["""
maps = maps.detach().clone().requires_grad_()
score(maps).sum().backward()
weight = maps.grad.flatten(2).mean(2)
return torch.relu(torch.einsum("bc,bchw->bhw", weight, maps.detach()))
""", """
m = maps.detach()
m.requires_grad = True
with torch.enable_grad():
    s = score(m)
    g = torch.autograd.grad(s, m, torch.ones_like(s))[0]
cam = sum(g[:, c].mean((1, 2))[:, None, None] * m[:, c] for c in range(m.shape[1]))
return F.relu(cam.detach())
""", """
x = maps.clone().detach().requires_grad_(True)
g, = torch.autograd.grad(score(x).sum(), x)
w = F.adaptive_avg_pool2d(g, 1)
return torch.clamp((w * x).sum(dim=1), min=0).detach()
"""],
}

WRONG = {
    "cosine_lr": [
        ("wrong period", "math.pi *", "2 * math.pi *"), ("never falls", "math.cos(", "abs("),
        ("warm-up off by one", "peak * step / warmup", "peak * (step + 1) / warmup"),
        ("a rate at step 0", "step < warmup", "0 < step < warmup"),
        ("cosine over the whole run", "(step - warmup) / max(1, total - warmup)", "step / total"),
        ("a linear fall",
         "0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))",
         "(1 - (step - warmup) / max(1, total - warmup))"),
        ("half the peak", "peak * 0.5 *", "0.25 * peak *"),
        ("ends one step late", "max(1, total - warmup)", "(total - warmup + 1)"),
        ("integer division", "peak * step / warmup", "peak * (step // warmup)")],
    "hflip": [
        ("upside down", "x.flip(3)", "x.flip(2)"), ("turned by 180", "x.flip(3)", "x.flip((2, 3))"),
        ("channels reversed", "x.flip(3)", "x.flip(1)"),
        ("one draw a batch", "uniform(rng, 0, 1, len(x))", "uniform(rng, 0, 1, 1).expand(len(x))"),
        ("p is ignored", "< p", "< 0.5"), ("the other share", "< p", "> p"),
        ("biased draw", "uniform(rng, 0, 1, len(x))", "uniform(rng, 0, 1, len(x)) ** 2"),
        ("not from rng", "uniform(rng, 0, 1, len(x))", "torch.rand(len(x))"),
        ("transposed: right for square images", "x.flip(3)",
         "x.flip(3) if x.shape[2] != x.shape[3] else x.transpose(2, 3)"),
        ("changes its input", "return torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)",
         "x[flip] = x[flip].flip(3)\n    return x"),
        ("one pixel too far", "x.flip(3)", "x.flip(3).roll(1, 3)")],
    "crop_boxes": [
        ("uniform side", "uniform(rng, *scale, n, 10)", "uniform(rng, *scale, n, 10) ** 2"),
        ("uniform ratio", "uniform(rng, math.log(ratio[0]), math.log(ratio[1]), n, 10).exp()",
         "uniform(rng, *ratio, n, 10)"),
        ("height for width", "return top, left, h, w", "return top, left, w, h"),
        ("left for top", "return top, left, h, w", "return left, top, h, w"),
        ("never the last row", "(height - h + 1)).long()", "(height - h)).long()"),
        ("a place for all", "u, v = (uniform(rng, 0, 1, n) for _ in range(2))",
         "u, v = (uniform(rng, 0, 1, 1).expand(n) for _ in range(2))"),
        ("one draw for both axes", "u, v = (uniform(rng, 0, 1, n) for _ in range(2))",
         "u = v = uniform(rng, 0, 1, n)"),
        ("one try", "n, 10)", "n, 1)"),
        ("falls back to the whole image", "whole_w = min(width, round(height * bounded))",
         "whole_w = width"),
        ("falls back to the corner", "(height - h) // 2)", "0)"),
        ("right for square images", "area = height * width *", "area = height * height *")],
    "crop_resize": [
        ("corners aligned", "align_corners=False", "align_corners=True"),
        ("pixel's corner for its centre", "+ 0.5) * (length", ") * (length"),
        ("looks outside its box", "at = torch.minimum(at.clamp(min=0.5), length - 0.5)", "at = at"),
        ("nearest", "align_corners=False", "mode='nearest', align_corners=False"),
        ("axes exchanged", "(xs[:, None, :], ys[:, :, None])", "(ys[:, None, :], xs[:, :, None])"),
        ("right for square images", "places(left, w, x.shape[3])", "places(left, w, x.shape[2])"),
        ("not scaled to 1", "to_float(x)", "x.float()"),
        ("scales floats too", "to_float(x)", "x.float() / 255"),
        ("size of the first box", "length / size", "length[:1] / size"),
        ("float64", "to_float(x), grid", "to_float(x).double(), grid.double()")],
    "knn": [
        ("no cosine", "F.normalize(train_h, dim=1), F.normalize(h, dim=1)", "train_h, h"),
        ("queries alone normalised", "F.normalize(train_h, dim=1), F", "train_h, F"),
        ("normalised along the images", "F.normalize(train_h, dim=1)",
         "F.normalize(train_h, dim=0)"),
        ("every vote alike", "(similarity / 0.07).exp()", "torch.ones_like(similarity)"),
        ("votes are cosines", "(similarity / 0.07).exp()", "similarity"),
        ("another temperature", "/ 0.07", "/ 0.7"), ("farthest", ".topk(min(k, len(train_h)))",
                                                      ".topk(min(k, len(train_h)), largest=False)"),
        ("one neighbour fewer", "min(k, len(train_h))", "max(1, min(k, len(train_h)) - 1)"),
        ("k above n crashes", "min(k, len(train_h))", "k"),
        ("the nearest alone", "votes.argmax(1)", "train_labels[nearest[:, 0]]"),
        ("every class, no neighbours", "votes.argmax(1)", "votes.argmin(1)")],
    "nt_xent_dense": [
        ("normalises", "sim = z @ z.T", "z = F.normalize(z)\n    sim = z @ z.T"),
        ("keeps the diagonal", "sim = sim.fill_diagonal_(-torch.inf)", "pass"),
        ("diagonal at 0", "-torch.inf", "0"),
        ("times temperature", "/ temperature", "* temperature"),
        ("no temperature", " / temperature", ""),
        ("the next row is the positive", "len(z) // 2", "1"),
        ("a sum", "cross_entropy(sim, positive)", "cross_entropy(sim, positive, reduction='sum')"),
        ("half the rows", "cross_entropy(sim, positive)",
         "cross_entropy(sim[:len(z) // 2], positive[:len(z) // 2]) + 0 * sim[0, 1]"),
        ("overflows", "return F.cross_entropy(sim, positive)",
         "e = sim.exp()\n    i = torch.arange(len(z))\n"
         "    return -(e[i, positive] / e.sum(1)).log().mean()"),
        ("no gradient", "sim = z @ z.T", "sim = z.detach() @ z.T"),
        ("float32", "z @ z.T", "z.float() @ z.float().T"),
        ("positive left out below", "return F.cross_entropy(sim, positive)",
         "p = sim.gather(1, positive[:, None])\n    return (sim.scatter(1, positive[:, None], -1e9)"
         ".logsumexp(1) - p[:, 0]).mean()")],
    "chunked_forward": [
        ("rows keep their type", "rows, columns = rows.to(wide), columns.to(wide)", "pass"),
        ("first is forgotten", "columns, first, temperature):", "columns, 0, temperature):"),
        ("positive of another rank", "_positive(rows, here, first)", "_positive(rows, here, 0)"),
        ("no loss", "-torch.log_softmax", "torch.log_softmax"),
        ("no temperature", "first, temperature):", "first, 1.0):"),
        ("terms do not add", "(positive, loss)", "(positive, 0 * loss)"),
        ("decoupled or not, the same", "if decoupled:", "if False:"),
        ("the whole matrix", "loss, positive = rows.new_empty(2, len(rows))",
         "whole = [rows @ columns.T for _ in range(6)]\n"
         "    loss, positive = rows.new_empty(2, len(rows))"),
        ("softmax of the wrong axis", "log_softmax(sim, 1", "log_softmax(sim, 0"),
        ("a sum", "loss.mean()", "loss.sum()")],
    "chunked_backward": [
        ("one of the two terms", "weight.addcmul_(sim.sub_(lse).exp_(), g)", "pass"),
        ("the other alone", ".mul_(g[i, None])", ".mul_(0)"),
        ("decoupled or not, the same", "if decoupled:", "if False:"),
        ("no positive", "weight.scatter_add_(1, at, -(g[i, None] + g[at]))", "pass"),
        ("positive once", "-(g[i, None] + g[at])", "-g[i, None]"),
        ("no temperature", "alpha=1 / temperature", "alpha=1"),
        ("own row's sum for all", "sim.sub_(lse)", "sim.sub_(lse[i, None])"),
        ("another row's gradient", ".exp_(), g)", ".exp_(), g.flip(0) * 1.1)"),
        ("a mean of sums", "(grad / each)", "grad"),
        ("first is forgotten", "slice(first + here.start, first + here.stop)", "here")],
    "_backward_rows.backward": [
        ("nothing is gathered", "if ctx.group:", "if False:"),
        ("own log-sums for all", "_gather(lse, ctx.group)", "lse.repeat(2, 1)"),
        ("own gradient for all", "_gather(grad, ctx.group)", "grad"),
        ("the mean of the gradients", "_gather(grad, ctx.group)",
         "_gather(grad, ctx.group).mean().view(1)"),
        ("the sum of the gradients", "_gather(grad, ctx.group)",
         "_gather(grad, ctx.group).sum().view(1)"),
        ("the incoming gradient is ignored", "grad.view(1)", "torch.ones_like(grad).view(1)"),
        ("averaged over the ranks", "return d_rows", "return d_rows / 2"),
        ("log-sums of the ranks exchanged", "_gather(lse, ctx.group)",
         "_gather(lse, ctx.group).roll(len(lse), 0)"),
        ("gradients of the ranks exchanged", "_gather(grad, ctx.group)",
         "_gather(grad, ctx.group).flip(0)"),
        ("the gradient of the columns", "return d_rows, None", "return None, d_rows")],
    "tiles_forward": [
        ("bytes not scaled", "value * unit", "value"),
        ("divided by 256", "/ 255", "/ 256"),
        ("division of integers", "Wide<In>(1) / 255", "1 / 255"),
        ("rows for columns", "int64_t(y) * at.width + x", "int64_t(x) * at.width + y"),
        ("right for square images", "int64_t(y) * at.width", "int64_t(y) * at.height"),
        ("rows of a tile in the image", "at.out_stride()", "at.tile"),
        ("the first channel alone", "at.in(b, c)", "at.in(b, 0)"),
        ("the first image alone", "at.in(b, c)", "at.in(0, c)"),
        ("the cell of the output tile", "perm, offset)", "perm, offset) * 0 + at.top(k) * "
         "at.width + at.left(k)"),
        ("no row beyond the block's threads", "y += blockDim.y", "y += at.tile"),
        ("the last column is left out", "x < at.tile", "x < at.tile - 1")],
    "forward_simt": [
        ("one tile alone", "j0 += TILE", "j0 = end"),
        ("every other tile", "j0 += TILE", "j0 += 2 * TILE"),
        ("each shard sees all columns", "int j0 = shard_begin(p.m, TILE, blockIdx.y)",
         "int j0 = 0"),
        ("a sum of similarities", "exponential(x)", "x"),
        ("powers of 2", "exponential(x)", "W(exp2(x))"),
        ("one row for all four", "add(s[r]", "add(s[0]"),
        ("itself for the positive", "p.positive(", "p.self("),
        ("similarity of another row", "row[r].positive = s[r][c]", "row[r].positive = s[c][r]"),
        ("positive not divided by t", "row[r].positive = s[r][c]",
         "row[r].positive = s[r][c] / p.inverse_t"),
        ("columns 16 apart", "4 * int(threadIdx.x) + c ==", "int(threadIdx.x) + 16 * c =="),
        ("rows 16 apart", "return 4 * threadIdx.y + r;", "return threadIdx.y + 16 * r;"),
        ("decoupled or not, the same", "if (p.decoupled)", "if (false)"),
        ("eight of sixteen threads", "finish<16>", "finish<8>")],
    "gather_forward": [
        ("the inverse", "_corners(perm,", "_corners(perm.argsort(1),"),
        ("left for top", ":, top, left]", ":, left, top]"),
        ("no offset", "_corners(perm, offset,", "_corners(perm, offset * 0,"),
        ("offset of the output tile", "_corners(perm, offset,",
         "_corners(perm, offset.gather(1, perm.argsort(1)[..., None].expand(-1, -1, 2)),"),
        ("uint8 stays", "torch.float32 if x.dtype == torch.uint8 else x.dtype", "x.dtype"),
        ("not scaled to 1", "1 / 255, dtype", "1, dtype"),
        ("colours exchanged", "matrix, pixels)", "matrix.mT, pixels)"),
        ("not clamped", "torch.clamp(pixels, low, high, out=pixels)", "pixels"),
        ("no mean", "if gray.shape[2]:", "if False:"),
        ("image by columns", "permute(0, 3, 1, 4, 2, 5)", "permute(0, 3, 2, 4, 1, 5)"),
        ("always tiles", "if not image:", "if True:"),
        ("right for square images", "*x.shape[2:])", "x.shape[2], x.shape[2])")],
    "gather_backward": [
        ("not the inverse", "d_tiles[batch, inverse]", "d_tiles[batch, inverse.argsort(1)]"),
        ("no colour", "if color is not None:", "if False:"),
        ("not transposed", "(matrix.mT @", "(matrix @"),
        ("rows for columns", "y[:, :, None, :, None],", "x[:, :, None, :, None],"),
        ("no offset", "_corners(cells, offset,", "_corners(cells, offset * 0,"),
        ("ones outside", "new_zeros", "new_ones"),
        ("image by columns", "permute(0, 2, 4, 1, 3, 5)", "permute(0, 4, 2, 1, 3, 5)"),
        ("right for square images", "grid, height, width)\n    steps",
         "grid, height, height)\n    steps")],
    "permutation_set": [
        ("greatest mean", "np.flatnonzero(least == least.max())", "np.arange(len(least))"),
        ("random", "furthest[total[furthest].argmax()]", "int(rng.integers(len(least)))"),
        ("ties by chance alone", "furthest[total[furthest].argmax()]", "furthest[0]"),
        ("least sum", "total[furthest].argmax()", "total[furthest].argmin()"),
        ("seed ignored", "default_rng(seed)", "default_rng(0)"),
        ("never the same", "default_rng(seed)", "default_rng()"),
        ("first is always the identity", "rng.permutation(pool)", "pool"),
        ("another type", "astype(np.int64)", "astype(np.int32)"),
        ("transposed", "pool[:, chosen].T", "pool[:, chosen]"),
        ("distance to the last alone", "np.minimum(least, distance, out=least)",
         "least[:] = distance"),
        ("no error", "if count > len(pool):", "if False:")],
    "psnr": [
        ("natural logarithm", "log10(", "log("),
        ("peak of 1", "10 * torch.log10(255 ** 2", "10 * torch.log10(1"),
        ("20 for 10", "10 * torch", "20 * torch"), ("absolute error", ".square()", ".abs()"),
        ("one for the batch", "mean((1, 2, 3))", "mean()"),
        ("infinite", ".clamp(min=255 ** 2 / 1e10)", ""),
        ("a sum", ".mean((1, 2, 3))", ".sum((1, 2, 3))"),
        ("upside down", "return 10", "return -10")],
    "ssim": [
        ("std 1.5 for its square", "2 * 1.5 ** 2", "2 * 1.5"),
        ("weights do not add to 1", "/ window.sum() ** 2", "/ window.sum()"),
        ("constants not squared", "(0.01 * 255) ** 2, (0.03 * 255) ** 2", "0.01 * 255, 0.03 * 255"),
        ("constants for 0 to 1", "(0.01 * 255) ** 2, (0.03 * 255) ** 2", "0.01 ** 2, 0.03 ** 2"),
        ("padded", "F.conv2d(v, window)", "F.conv2d(v, window, padding=5)"),
        ("no variance", "xx - mx * mx + yy - my * my", "xx + yy"),
        ("no luminance", "luminance * structure", "structure"),
        ("one for the batch", "mean((1, 2, 3))", "mean().expand(len(x))"),
        ("window of 9", "torch.arange(11, dtype=x.dtype, device=x.device) - 5",
         "(torch.arange(11, dtype=x.dtype, device=x.device) - 5).clamp(-4, 4)")],
    "grad_cam": [
        ("weights place by place", "gradient.mean((2, 3), keepdim=True)", "gradient"),
        ("one weight for the batch", "mean((2, 3), keepdim=True)", "mean((0, 2, 3), keepdim=True)"),
        ("the sum of gradients", "mean((2, 3), keepdim=True)", "sum((2, 3), keepdim=True)"),
        ("negative sums stay", ".clamp(min=0)", ""), ("absolute", ".clamp(min=0)", ".abs()"),
        ("mean over channels", ".sum(1)", ".mean(1)"),
        ("channels stay", ".sum(1)", ""),
        ("clamped before the sum", ".sum(1).clamp(min=0)", ".clamp(min=0).sum(1)"),
        ("maps ignored", " * maps.detach()", ""),
        ("right for square maps", ".sum(1).clamp(min=0)", ".sum(1).clamp(min=0).mT")],
}
