"""vision.py: CLIP's ViT and preprocessing against `transformers`, and the refusal of damaged or oversized pictures."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import VIT, error, tiny_vit, vit_twin
from PIL import Image, ImageFile, PngImagePlugin
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import vision
from vision import normalize, open_picture, preprocess


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A colour picture with smooth shades, hard edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    picture = np.empty((height, width, 3))
    for channel in range(3):
        waves = sum(np.sin(rng.normal(0, 2.0**k) * x + rng.normal(0, 2.0**k) * y + k) / k for k in range(1, 8))
        picture[..., channel] = 128 + 60 * waves + rng.normal(0, 8, (height, width))
    for _ in range(6):
        left, top, size = rng.uniform(0, 1, 3)
        inside = (abs(x - left) < size / 6) & (abs(y - top) < size / 6)
        picture[inside] = rng.uniform(0, 255, 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    """For each of its eight values, stores the pixels of an upright picture in that orientation."""
    upright = photograph(300, 200)
    operations = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()
    stored = upright
    if orientation > 1:
        stored = upright.transpose(Image.Transpose[operations[orientation - 2]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(open_picture(encoded(stored, exif=exif))), np.asarray(upright))
    assert_parity(encoded(stored, "JPEG", exif=exif))


def test_sixteen_bits_look_like_their_upper_eight():
    grey = np.asarray(photograph(250, 301).convert("L"))
    values = grey * np.uint16(256) + np.arange(250, dtype=np.uint16)
    expected = np.stack([grey] * 3, axis=2)
    pgm = b"P5 250 301 65535\n" + values.astype(">u2").tobytes()
    pictures = [encoded(Image.fromarray(values)), encoded(Image.fromarray(values), "TIFF"), pgm,
                encoded(Image.fromarray(values.astype(np.int32)), "TIFF")]  # fmt: skip
    assert {Image.open(io.BytesIO(data)).mode for data in pictures} >= {"I;16", "I"}
    for data in pictures:
        assert np.array_equal(np.asarray(open_picture(data)), expected)


@pytest.mark.parametrize("values", [np.float32(0.5), np.int32(65536), np.int32(-1)], ids=repr)
def test_pixels_of_an_unknown_range_are_refused(values):
    with pytest.raises(ValueError, match="not integers of 8 or 16 bits"):
        open_picture(encoded(Image.fromarray(np.full((20, 30), values)), "TIFF"))


def exif(*entries: tuple[int, int, int, int]) -> bytes:
    """EXIF with entries (tag, type, count, value or offset)."""
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)


UPRIGHT = (0x112, 3, 1, 6)  # the orientation of a picture that is stored lying on its left side


@pytest.mark.parametrize("content, turned", [
    (exif(UPRIGHT, (0x100, 2, 4, 0x303436)), True),  # the width is the text "640"
    (exif(UPRIGHT, (0x8825, 4, 1, 38)) + exif((0, 2, 4, 0x322E32))[14:], True),  # the version of GPS is the text "2.2"
    (exif(UPRIGHT, (0x8769, 4, 1, 10**6)), True),  # the sub-directory lies beyond the end
    (exif(UPRIGHT)[:20], False), (exif((0x112, 3, 1, 9)), False), (exif((0x112, 2, 4, 0x36)), False),
    (b"Exif\0\0", False), (b"Exif\0\0garbage", False),
], ids=str)  # fmt: skip
def test_damaged_exif_does_not_matter(content, turned):
    image = photograph(30, 20)
    for format in ("JPEG", "PNG"):
        plain = open_picture(encoded(image, format))
        expected = plain.transpose(Image.Transpose.ROTATE_270) if turned else plain
        assert np.array_equal(np.asarray(open_picture(encoded(image, format, exif=content))), np.asarray(expected))


def test_a_png_with_a_long_comment_is_read():
    """Pillow alone refuses one over 1 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    assert open_picture(encoded(photograph(30, 20), pnginfo=info)).size == (30, 20)


# --- damaged, unsupported and oversized pictures


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header declares this size, with 1000 zero bytes as its pixels."""

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
    "png, one byte changed": PNG[:2000] + bytes([PNG[2000] ^ 255]) + PNG[2001:],
    "eps": encoded(photograph(30, 20), "EPS"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_picture_raises_the_reason(kind):
    with pytest.raises(ValueError, match=r"not a readable picture \((none of JPEG, PNG, .*|\w+: .+)\)"):
        open_picture(BROKEN[kind])


def test_no_decoder_runs_an_external_program(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    Image.init()  # registers all of Pillow's formats
    with pytest.raises(ValueError, match="none of JPEG, PNG"):
        open_picture(BROKEN["eps"])


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_001, 10_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)], ids=str)
def test_a_decompression_bomb_is_refused_by_its_header(size, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("its pixels were decoded"))
    with pytest.raises(ValueError, match=r"exceed the limit of \d+|not a readable"):
        open_picture(png_header(*size))


def test_a_picture_of_exactly_max_pixels_is_read(monkeypatch):
    monkeypatch.setattr(vision, "MAX_PIXELS", 600)
    assert open_picture(encoded(photograph(30, 20))).size == (30, 20)
    with pytest.raises(ValueError, match="601x1 pixels exceed the limit of 600"):
        open_picture(encoded(photograph(601, 1)))


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 9000)], ids=str)
def test_a_picture_too_thin_to_resize_is_refused(size, monkeypatch):
    """Resized to 224 pixels, it would have more than MAX_PIXELS."""
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("it was resized"))
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels: its sides differ too much"):
        preprocess(open_picture(encoded(Image.new("RGB", size))), 224)


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
