"""OpenAI's CLIP: the vision tower among its weights, and the sizes that their shapes give.

The names of the vision tower are used here without their prefix `visual.`.
"""

import math
import re
from pathlib import Path

import torch

from common import UserError, shorten
from formats.tensors import load_weights

TEXT_TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale",
              "input_resolution", "context_length", "vocab_size")  # fmt: skip
AFTER_BLOCKS = ("ln_post.", "proj")  # what follows the grid features
HEAD_DIM = 64  # of every published CLIP ViT


def load_clip(path: Path) -> dict[str, torch.Tensor]:
    """The vision tower of an archive such as ViT-L-14.pt, without what follows its blocks."""
    clip = load_weights(path)
    if unknown := [name for name in clip if not name.startswith(("visual.", *TEXT_TOWER))]:
        raise UserError(f"{path}: holds {shorten(unknown)}, which OpenAI's CLIP does not have; use its ViT-L-14.pt")
    if "input_resolution" not in clip and any(name.startswith(TEXT_TOWER) for name in clip):
        raise UserError(f"{path}: lacks input_resolution, so it is not OpenAI's file; those of open_clip have the same "
                        "names, but mostly another activation (GELU); use OpenAI's ViT-L-14.pt")  # fmt: skip
    if any(name.startswith("visual.layer1.") for name in clip):
        raise UserError(f"{path}: a ResNet CLIP, which has no patches; use a ViT, such as ViT-L-14.pt")
    tower = {name.removeprefix("visual."): tensor for name, tensor in clip.items() if name.startswith("visual.")}
    return {name: tensor for name, tensor in tower.items() if not name.startswith(AFTER_BLOCKS)}


def vision_sizes(weights: dict[str, torch.Tensor], path: Path) -> dict[str, int]:
    """The fields of VisionConfig, from the shapes of a vision tower."""
    conv1, embedding = (weights.get(name, torch.empty(0)) for name in ("conv1.weight", "positional_embedding"))
    grid = math.isqrt(max(0, embedding.shape[:1].numel() - 1))
    square = embedding.dim() == 2 and grid > 0 and grid**2 == len(embedding) - 1
    if conv1.dim() != 4 or 0 in conv1.shape or len(conv1) % HEAD_DIM or not square:
        raise UserError(f"{path}: holds no CLIP ViT (conv1.weight {tuple(conv1.shape)}, positional_embedding "
                        f"{tuple(embedding.shape)}); use OpenAI's ViT-L-14.pt or its Hugging Face folder")  # fmt: skip
    width, _, _, patch = conv1.shape
    blocks = {block_number(name) for name in weights} - {-1}
    if blocks != set(range(len(blocks))):
        raise UserError(f"{path}: incomplete: it has the blocks {shorten(sorted(blocks))}; download it again")
    return {"image_size": grid * patch, "patch_size": patch, "width": width, "layers": len(blocks)}


def block_number(name: str) -> int:
    """The number of the block to which a parameter belongs; -1 if to none."""
    match = re.match(r"transformer\.resblocks\.([0-9]{1,4})\.", name)
    return int(match[1]) if match else -1
