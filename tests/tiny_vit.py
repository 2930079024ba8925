"""A vision transformer (Dosovitskiy et al. 2021) small enough for tests: an encoder that is no
ResNet."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Self-attention and an MLP, each behind a LayerNorm, each added: tokens (B, N, C) -> same."""

    def __init__(self, dim, heads=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Images (B, 3, H, W), normalised -> h (B, dim). Every block is a stage; the last map is
    normalised. Position embeddings of a 4 x 4 grid are interpolated to that of the image."""

    def __init__(self, dim=32, blocks=3, patch=8):
        super().__init__()
        self.dim = dim
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, dim, 4, 4))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def stages(self, x):
        x = self.embed(x)
        shape = x.shape                                      # (B, dim, H / patch, W / patch)
        x = x + F.interpolate(self.position, shape[2:], mode="bicubic")
        x, maps = x.flatten(2).mT, []
        for block in self.blocks:
            x = block(x)
            maps.append(self.norm(x) if block is self.blocks[-1] else x)
        return [tokens.mT.reshape(shape) for tokens in maps]

    def forward(self, x):
        return self.stages(x)[-1].mean((2, 3))
