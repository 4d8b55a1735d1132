"""vision.py: CLIP's ViT and preprocessing against `transformers`."""

import io

import numpy as np
import pytest
import torch
from conftest import VIT, encoded, error, photograph, tiny_vit, vit_twin
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common import UserError
from formats.pictures import open_picture
from vision import load_pixels, normalize, preprocess


def assert_parity(data: bytes):
    """Compares with CLIPImageProcessor: equal pixels, and equal floats after the normalisation."""
    reference = load_image(Image.open(io.BytesIO(data)))
    crop = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)(reference, return_tensors="np").pixel_values[0]
    pixels = preprocess(open_picture(data), 224)
    assert (pixels.shape, pixels.dtype) == ((3, 224, 224), np.uint8)
    assert np.array_equal(pixels, crop) and pixels.flags.c_contiguous and pixels.flags.writeable
    expected = CLIPImageProcessorPil()(reference, return_tensors="pt").pixel_values
    assert (normalize(torch.from_numpy(pixels[None])) - expected).abs().max() <= 1e-6


# --- preprocessing

SIZES = [(333, 500), (500, 333), (640, 427), (1, 300), (300, 1), (225, 224), (224, 225), (224, 224), (223, 224),
         (100, 31), (31, 100), (1, 1), (449, 448), (447, 1000)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_any_size_equal_clip(size):
    assert_parity(encoded(photograph(*size)))


def palette_with_transparency() -> bytes:
    return encoded(photograph(250, 301).quantize(64), transparency=bytes(range(0, 256, 4)))


MODES = {
    "grey": lambda: encoded(photograph(250, 301).convert("L")),
    "grey and alpha": lambda: encoded(photograph(250, 301).convert("LA")),
    "palette": lambda: encoded(photograph(250, 301).quantize(64)),
    "palette with transparency": palette_with_transparency,
    "gif": lambda: encoded(photograph(250, 301), "GIF"),
    "one bit": lambda: encoded(photograph(250, 301).convert("1")),
    "jpeg": lambda: encoded(photograph(250, 301), "JPEG", quality=80),
    "progressive grey jpeg": lambda: encoded(photograph(250, 301).convert("L"), "JPEG", progressive=True),
    "cmyk jpeg": lambda: encoded(photograph(250, 301).convert("CMYK"), "JPEG"),
    "bmp": lambda: encoded(photograph(250, 301), "BMP"),
    "ycbcr tiff": lambda: encoded(photograph(250, 301).convert("YCbCr"), "TIFF"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode_equal_clip(mode):
    assert_parity(MODES[mode]())


def test_a_picture_with_alpha_equals_clip():
    image = photograph(250, 301)
    image.putalpha(photograph(250, 301, seed=1).convert("L"))
    assert_parity(encoded(image))


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 9000)], ids=str)
def test_a_picture_too_thin_to_resize_is_refused(size, monkeypatch):
    """Resized to 224 pixels, it would have more than MAX_PIXELS."""
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("it was resized"))
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels: its aspect ratio is too extreme"):
        preprocess(open_picture(encoded(Image.new("RGB", size))), 224)


def test_load_pixels(picture):
    pixels = load_pixels(picture, 16)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels[0], preprocess(Image.open(picture).convert("RGB"), 16))
    absent, broken = picture.with_name("absent.png"), picture.with_name("broken.png")
    broken.write_bytes(picture.read_bytes()[:60])
    for path, message in ((absent, "No such file or directory"), (broken, "not a readable picture")):
        with pytest.raises(UserError, match=f"^{path}: {message}"):
            load_pixels(path, 16)


# --- ViT


@pytest.mark.parametrize("feature_layer", [-1, -2, -3, -4])
def test_features_equal_clip(feature_layer):
    vit = tiny_vit(feature_layer, seed=feature_layer)
    assert len(vit.transformer.resblocks) == VIT.layers + 1 + feature_layer, "no block above the feature layer"
    pixels = torch.randn(2, 3, VIT.image_size, VIT.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = vit(pixels)
        expected = vit_twin(vit)(pixels, output_hidden_states=True).hidden_states[feature_layer][:, 1:]
    assert features.shape == (2, VIT.n_patches, VIT.width)
    assert error(features, expected) <= 1e-5


def test_a_feature_layer_below_the_first_is_refused():
    with pytest.raises(AssertionError):
        tiny_vit(-5)
