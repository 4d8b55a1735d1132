"""formats/openai.py: the vision tower of OpenAI's CLIP, and the sizes that its shapes give."""

import pytest
import torch
from conftest import VIT, tiny_vit
from test_checkpoint import openai_weights, refused

from formats import openai
from vision import VisionConfig


def test_the_vision_tower_and_its_sizes(tmp_path):
    vit = tiny_vit(-1)
    torch.save(openai_weights(vit), tmp_path / "vit.pt")
    tower = openai.load_clip(tmp_path / "vit.pt")
    assert tower.keys() == dict(vit.named_parameters()).keys()
    assert VisionConfig(**openai.vision_sizes(tower, tmp_path)) == VIT


@pytest.mark.parametrize("name, number", [
    ("transformer.resblocks.0.ln_1.bias", 0), ("transformer.resblocks.23.mlp.c_fc.weight", 23), ("ln_pre.bias", -1),
    ("transformer.resblocks.99999.ln_1.bias", -1), ("x.transformer.resblocks.0.ln_1.bias", -1),
])  # fmt: skip
def test_block_number(name, number):
    assert openai.block_number(name) == number


def test_other_clips_are_refused(tmp_path):
    weights = openai_weights(tiny_vit(-1))
    torch.save(weights | {"visual.layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "resnet.pt")
    with refused(tmp_path / "resnet.pt", "ResNet"):
        openai.load_clip(tmp_path / "resnet.pt")
    state_dict = {name: weight for name, weight in weights.items() if weight.dim()}  # without the three numbers
    torch.save(state_dict, tmp_path / "open_clip.pt")
    with refused(tmp_path / "open_clip.pt", "input_resolution", "open_clip", "GELU"):
        openai.load_clip(tmp_path / "open_clip.pt")
    vision = {name: weight for name, weight in weights.items() if name.startswith("visual.")}
    torch.save(vision, tmp_path / "vision.pth")  # as this program writes it
    assert openai.load_clip(tmp_path / "vision.pth")
    torch.save(weights | {"logit_bias": torch.ones(1)}, tmp_path / "siglip.pt")
    with refused(tmp_path / "siglip.pt", "holds logit_bias"):
        openai.load_clip(tmp_path / "siglip.pt")
