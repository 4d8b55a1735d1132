"""vision.py: CLIP's ViT and preprocessing against `transformers`, and pictures that are none or are bombs."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import VIT, error, tiny_vit, vit_twin
from PIL import Image, ImageFile
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import vision
from vision import normalize, open_picture, preprocess


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Light and shade, hard edges and grain, in colour."""
    dice = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    picture = np.empty((height, width, 3))
    for channel in range(3):
        waves = sum(np.sin(dice.normal(0, 2.0**k) * x + dice.normal(0, 2.0**k) * y + k) / k for k in range(1, 8))
        picture[..., channel] = 128 + 60 * waves + dice.normal(0, 8, (height, width))
    for _ in range(6):
        left, top, size = dice.uniform(0, 1, 3)
        inside = (abs(x - left) < size / 6) & (abs(y - top) < size / 6)
        picture[inside] = dice.uniform(0, 255, 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def assert_parity(data: bytes):
    """Equal pixels, and equal floats after the normalisation, to those of CLIPImageProcessor."""
    reference = load_image(Image.open(io.BytesIO(data)))
    crop = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)(reference, return_tensors="np").pixel_values[0]
    pixels = preprocess(open_picture(data), 224)
    assert (pixels.shape, pixels.dtype) == ((3, 224, 224), torch.uint8)
    assert np.array_equal(pixels.numpy(), crop)
    expected = CLIPImageProcessorPil()(reference, return_tensors="pt").pixel_values
    assert (normalize(pixels[None]) - expected).abs().max() <= 1e-6


# --- preprocessing

SIZES = [(333, 500), (500, 333), (640, 427), (1, 300), (300, 1), (225, 224), (224, 225), (224, 224), (223, 224),
         (100, 31), (31, 100), (1, 1), (449, 448), (447, 1000)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_as_clip(size):
    assert_parity(encoded(photograph(*size)))


def palette_with_transparency() -> bytes:
    return encoded(photograph(250, 301).quantize(64), transparency=bytes(range(0, 256, 4)))


def sixteen_bit() -> bytes:
    grey = np.asarray(photograph(250, 301).convert("L")).astype(np.uint16)
    return encoded(Image.fromarray(grey * 257))


MODES = {
    "grey": lambda: encoded(photograph(250, 301).convert("L")),
    "grey and alpha": lambda: encoded(photograph(250, 301).convert("LA")),
    "palette": lambda: encoded(photograph(250, 301).quantize(64)),
    "palette with transparency": palette_with_transparency,
    "gif": lambda: encoded(photograph(250, 301), "GIF"),
    "one bit": lambda: encoded(photograph(250, 301).convert("1")),
    "sixteen bits": sixteen_bit,
    "jpeg": lambda: encoded(photograph(250, 301), "JPEG", quality=80),
    "progressive grey jpeg": lambda: encoded(photograph(250, 301).convert("L"), "JPEG", progressive=True),
    "cmyk jpeg": lambda: encoded(photograph(250, 301).convert("CMYK"), "JPEG"),
    "bmp": lambda: encoded(photograph(250, 301), "BMP"),
    "ycbcr tiff": lambda: encoded(photograph(250, 301).convert("YCbCr"), "TIFF"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", MODES)
def test_modes_as_clip(mode):
    assert_parity(MODES[mode]())


def test_alpha_as_clip():
    image = photograph(250, 301)
    image.putalpha(photograph(250, 301, seed=1).convert("L"))
    assert_parity(encoded(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_turned_is_turned_back(orientation):
    """All eight values of EXIF's orientation, each of a file whose pixels are stored turned to match."""
    upright = photograph(300, 200)
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()
    turn = ([None] + turns)[orientation - 1]
    stored = upright if turn is None else upright.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(open_picture(encoded(stored, exif=exif))), np.asarray(upright))
    assert_parity(encoded(stored, "JPEG", exif=exif))


# --- bad pictures


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has this size and goes no further."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


JPEG = encoded(photograph(300, 200), "JPEG")
PNG = encoded(photograph(300, 200))
BROKEN = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "zeros": bytes(5000),
    "jpeg, first half": JPEG[: len(JPEG) // 2],
    "jpeg, header only": JPEG[:300],
    "png, first half": PNG[: len(PNG) // 2],
    "png, a byte wrong": PNG[:2000] + bytes([PNG[2000] ^ 255]) + PNG[2001:],
    "eps": encoded(photograph(30, 20), "EPS"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_say_why(kind):
    with pytest.raises(ValueError, match=r"not a readable picture \((none of JPEG, PNG, .*|\w+: .+)\)"):
        open_picture(BROKEN[kind])


def test_no_format_that_runs_a_program_is_tried(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was called"))
    Image.init()  # all of Pillow's formats are known from here on
    with pytest.raises(ValueError, match="none of JPEG, PNG"):
        open_picture(BROKEN["eps"])


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_001, 10_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)], ids=str)
def test_a_bomb_is_refused_by_its_header(size, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("memory was taken for it"))
    with pytest.raises(ValueError, match=r"over the limit of \d+|decompression bomb|not a readable"):
        open_picture(png_header(*size))


def test_the_limit_is_on_pixels_and_included(monkeypatch):
    monkeypatch.setattr(vision, "MAX_PIXELS", 600)
    assert open_picture(encoded(photograph(30, 20))).size == (30, 20)
    with pytest.raises(ValueError, match="601x1 pixels is over the limit of 600"):
        open_picture(encoded(photograph(601, 1)))


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 9000)], ids=str)
def test_a_long_thin_bomb_is_refused_before_it_is_resized(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: pytest.fail("memory was taken for it"))
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels is too long and thin"):
        preprocess(open_picture(encoded(Image.new("RGB", size))), 224)


# --- ViT


@pytest.mark.parametrize("feature_layer", [-1, -2, -3, -4])
def test_features_are_those_of_clip(feature_layer):
    vit = tiny_vit(feature_layer, seed=feature_layer)
    assert len(vit.transformer.resblocks) == VIT.layers + 1 + feature_layer, "it stops at the layer it reads"
    pixels = torch.randn(2, 3, VIT.image_size, VIT.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = vit(pixels)
        expected = vit_twin(vit)(pixels, output_hidden_states=True).hidden_states[feature_layer][:, 1:]
    assert features.shape == (2, VIT.n_patches, VIT.width)
    assert error(features, expected) <= 1e-5


def test_features_below_the_first_layer_are_refused():
    with pytest.raises(AssertionError):
        tiny_vit(-5)
