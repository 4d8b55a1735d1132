"""Picture -> pixels -> CLIP's ViT -> grid features Z_v.

The ViT follows "Learning Transferable Visual Models From Natural Language Supervision" (CLIP) and has the parameter
names of OpenAI's release. LLaVA never trains it and reads the grid features of one of its last layers ("before and
after the last Transformer layer", section 4.1), so the blocks above that layer are not built.
formats/pictures.py decodes the pictures.

Shapes: B pictures, `size` pixels a side, P patches = (size / patch)², D width, H heads.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common import UserError
from formats.openai import HEAD_DIM
from formats.pictures import MAX_PIXELS, open_picture

FEATURE_LAYER = -2  # the output of the second-to-last block; the paper's ablation reads -1, which scores lower
PREPROCESSING = "CLIP's: shorter side by bicubic, centre crop, mean and deviation"  # recorded with every run
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's normalisation of each RGB channel in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP ViT. The defaults are ViT-L/14 at 224 pixels."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def heads(self) -> int:
        return self.width // HEAD_DIM


# --- picture -> pixels


def preprocess(image: Image.Image, size: int) -> np.ndarray:
    """CLIP's preprocessing before the normalisation: resizes the shorter side to `size`, crops the centre.

    Returns (3, size, size) uint8, a quarter of the bytes of floats. Rounds as transformers' CLIPImageProcessor does:
    the longer side and the corner of the crop are truncated to integers.
    """
    long = size * max(image.size) // min(image.size)
    if size * long > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels: its aspect ratio is too extreme to resize it")
    width, height = (size, long) if image.width <= image.height else (long, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1).copy()  # (3, size, size)


def load_pixels(path: str | Path, size: int) -> torch.Tensor:
    """The pixels (1, 3, size, size) uint8 of a picture that the user names. Raises UserError."""
    try:
        return torch.from_numpy(preprocess(open_picture(Path(path).read_bytes()), size)[None])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, size, size) uint8 -> float32, normalised by CLIP's mean and deviation."""
    channels = zip(pixels.unbind(1), MEAN, STD)
    return torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], 1)


# --- pixels -> grid features


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, P+1, D)
        B, T, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, P+1, 3D)
        q, k, v = qkv.view(B, T, 3, D // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)  # 3 x (B, H, P+1, 64)
        x = F.scaled_dot_product_attention(q, k, v)  # each position attends to all: no mask
        return self.out_proj(x.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, P+1, D)
        x = self.c_fc(x)  # (B, P+1, 4D)
        return self.c_proj(x * torch.sigmoid(1.702 * x))  # (B, P+1, D); QuickGELU, as CLIP was trained


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, P+1, D)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """CLIP's ViT up to `feature_layer`: -1 is the output of the last block, -2 of the one before it, and so on.

    LLaVA reads no features after that, so CLIP's `ln_post` and `proj` are left out.
    """

    def __init__(self, config: VisionConfig, feature_layer: int = FEATURE_LAYER):
        super().__init__()
        n_blocks = config.layers + 1 + feature_layer
        assert 0 <= n_blocks <= config.layers
        self.config, self.feature_layer = config, feature_layer
        patch, width = config.patch_size, config.width
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.n_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = nn.Sequential(*[Block(width) for _ in range(n_blocks)])
        self.transformer = nn.Sequential(OrderedDict(resblocks=blocks))  # as the release names them

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, size, size) -> Z_v (B, P, D), row by row from the top left, no class token."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
        class_token = self.class_embedding.expand(len(x), 1, -1).to(x.dtype)  # autocast may make x bf16
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding  # (B, P+1, D)
        x = self.transformer(self.ln_pre(x))
        return x[:, 1:]  # (B, P, D)
