"""Picture -> pixels -> CLIP's ViT -> grid features Z_v.

The ViT is written after "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), with the
parameter names of OpenAI's release. It is always frozen here; LLaVA reads the grid of one of its last layers
("before and after the last Transformer layer", section 4.1), so no block above that layer is even built.

Shapes: B pictures, `size` pixels a side, P patches = (size / patch)², D width, H heads.
"""

import base64
import io
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from cpu import Linear, linear

FEATURE_LAYER = -2  # the output of the last block but one: LLaVA's default (its ablation: -1 does worse)
HEAD_DIM = 64  # in every published CLIP ViT: heads = width / 64
PREPROCESSING = "CLIP's: shorter side by bicubic, centre crop, mean and deviation"  # recorded with every run
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's normalisation, per channel of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # what Pillow may try: none of them runs a program
PAGE_PICTURE = 320  # pixels of the longer side, at most, of a picture on a page
MAX_PIXELS = 100_000_000  # of a source picture, or of it resized: beyond, it is taken for a decompression bomb


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP ViT; the defaults are ViT-L/14 at 224 pixels."""

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


def open_picture(data: bytes) -> Image.Image:
    """Decodes an encoded picture of any mode, turned upright by its EXIF, into RGB.

    Raises ValueError, saying why, if it is not a picture of one of FORMATS, is broken, or is larger than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the check below is stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels is over the limit of {MAX_PIXELS}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"not a readable picture (none of {', '.join(FORMATS)})") from None
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds: SyntaxError, EOFError, struct.error, ...
        raise ValueError(f"not a readable picture ({type(error).__name__}: {str(error)[:100]})") from None


def as_link(image: Image.Image) -> str:
    """A picture, shrunk if it is large, as the text of a link to itself: for a page that is whole in one file."""
    image.thumbnail((PAGE_PICTURE, PAGE_PICTURE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, lossless=max(image.size) < 100)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """CLIP's preprocessing up to the normalisation: shorter side to `size` by bicubic, centre crop.

    Returns (3, size, size) uint8, a quarter of the floats' bytes on the way from a worker to the device.
    Rounds as transformers' CLIPImageProcessor does (the long side and the crop's corner are cut to integers).
    """
    short, long = sorted(image.size)
    long = size * long // short
    if size * long > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels is too long and thin to resize")
    width, height = (size, long) if image.width <= image.height else (long, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1).contiguous()  # (3, size, size)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, size, size) uint8 -> float32, as CLIP was fed."""
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    return (pixels / 255 - mean) / std


# --- pixels -> grid features


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, P+1, D)
        B, T, D = x.shape
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, P+1, 3D)
        q, k, v = qkv.view(B, T, 3, D // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)  # 3 x (B, H, P+1, 64)
        x = F.scaled_dot_product_attention(q, k, v)  # every patch sees every patch
        return self.out_proj(x.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, P+1, D)
        x = self.c_fc(x)  # (B, P+1, 4D)
        return self.c_proj(x * torch.sigmoid(1.702 * x))  # (B, P+1, D), through QuickGELU, CLIP's own


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
    """CLIP's ViT up to `feature_layer`: -1 is the last block's output, -2 (the default) the one before, and so on."""

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
        self.transformer: Any = nn.Module()  # only to name its blocks as OpenAI does
        self.transformer.resblocks = nn.ModuleList(Block(width) for _ in range(n_blocks))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, size, size) normalised float -> Z_v (B, P, D), row by row from the top left; no class token."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1).to(x.dtype)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding  # (B, P+1, D)
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return x[:, 1:]  # (B, P, D)
