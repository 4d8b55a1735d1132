"""formats/pictures.py: pictures in folders and zips, decoding, and the refusal of damaged or oversized ones."""

import io
import random
import struct
import tracemalloc
import unicodedata
import warnings
import zipfile
import zlib
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
from conftest import encoded, photograph
from PIL import Image, ImageFile, PngImagePlugin

from common import UserError
from formats import pictures
from formats.pictures import Pictures, check_inside, open_picture


@pytest.fixture
def folder(tmp_path):
    """Files a.png and sub/b.png in the folder `images`, and the same in `images.zip`."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("a.png", "sub/b.png"):
            (tmp_path / "images" / name).write_text(f"content of {name}")
            archive.write(tmp_path / "images" / name, name)
    return tmp_path


# --- pictures in folders and zips


@pytest.mark.parametrize("images", ["images", "images.zip"])
def test_pictures_of_a_folder_and_of_a_zip(folder, images):
    opened = Pictures(folder / images)
    assert opened.read("sub/b.png") == (folder / "images/sub/b.png").read_bytes()
    with pytest.raises(ValueError, match=f"cannot be read from .*{images}: .*[Nn]o .*(file|item)"):
        opened.read("absent.png")
    with pytest.raises(ValueError, match="is not a path inside the picture folder"):
        opened.read("../images/a.png")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "a\\..\\b", "a\0b", "", 7, None], ids=repr)
def test_paths_that_lead_out_of_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="is not a path inside the picture folder"):
        check_inside(name)


@pytest.mark.parametrize("path", ["absent", "images/a.png"])
def test_neither_a_folder_nor_a_zip(folder, path):
    with pytest.raises(UserError, match=f"{path}: neither a folder nor an intact zip of pictures .*--images"):
        Pictures(folder / path)


@pytest.mark.parametrize("top", ["", "imgs/", "a/b/"])
@pytest.mark.parametrize("flag", [True, False])
def test_a_zip_finds_names_that_are_spelled_otherwise(tmp_path, top, flag):
    """Outside ASCII with and without the UTF-8 flag, decomposed as on macOS, below a folder, after `./`."""
    names = {"plain.png": "plain.png", "köln.png": "ko\u0308ln.png", "图片1.png": "图片1.png"}  # asked for: in the zip
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names.values():
            archive.writestr(top + name, name)
            archive.writestr(f"__MACOSX/{top}._{name}", "no picture")
    raw = (tmp_path / "x.zip").read_bytes()
    if not flag:  # bit 11, in the header of each entry and in the directory
        raw = raw.replace(b"PK\3\4\x14\0\0\x08", b"PK\3\4\x14\0\0\0").replace(b"PK\1\2\x14\3\x14\0\0\x08", b"PK\1\2\x14\3\x14\0\0\0")
    (tmp_path / "x.zip").write_bytes(raw)
    flags = [entry.flag_bits & 0x800 for entry in zipfile.ZipFile(tmp_path / "x.zip").infolist()]
    assert any(flags) == flag
    opened = Pictures(tmp_path / "x.zip")
    for asked, name in names.items():
        for spelling in (asked, f"./{asked}", top + asked, unicodedata.normalize("NFD", asked)):
            assert opened.read(spelling).decode() == name
    with pytest.raises(ValueError, match="No such file in the zip"):
        opened.read("._plain.png")


def test_a_zip_keeps_names_of_code_page_437(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("k_ln.png", "content")
    (tmp_path / "x.zip").write_bytes((tmp_path / "x.zip").read_bytes().replace(b"k_ln", "köln".encode("cp437")))
    assert Pictures(tmp_path / "x.zip").read("köln.png") == b"content"


def test_a_folder_in_the_place_of_a_picture_is_refused(folder):
    with pytest.raises(ValueError, match="cannot be read from .*Is a directory"):
        Pictures(folder / "images").read("sub")


def test_threads_read_one_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(20):
            archive.writestr(str(i), random.Random(i).randbytes(200_000))
    opened = Pictures(tmp_path / "x.zip")
    with ThreadPool(4) as pool:
        contents = pool.map(opened.read, [str(i % 20) for i in range(200)])
    assert all(content == random.Random(i % 20).randbytes(200_000) for i, content in enumerate(contents))


def with_entry(folder, place: tuple[int, str], value: int):
    """A zip of two entries. place: offset and struct's letter of a number in the first directory record."""
    path = folder / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"content")
        archive.writestr("good.jpg", b"good")
    raw = bytearray(path.read_bytes())
    struct.pack_into("<" + place[1], raw, raw.index(b"PK\1\2") + place[0], value)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("place, value, message", [
    ((8, "H"), 1, "encrypted"),
    ((8, "H"), 64, "strong encryption"),
    ((10, "H"), 99, "neither stored nor deflated"),
    ((16, "L"), 7, "Bad CRC-32"),
    ((24, "L"), 3, "Bad CRC-32"),
    ((42, "L"), 2**31, "Truncated"),
    ((42, "L"), 5, "Bad magic number"),
])  # fmt: skip
def test_a_faulty_entry_is_refused_and_its_neighbour_is_read(tmp_path, place, value, message):
    opened = Pictures(with_entry(tmp_path, place, value))
    with pytest.raises(ValueError, match=f"cannot be read from .*x.zip: .*{message}"):
        opened.read("a.jpg")
    assert opened.read("good.jpg") == b"good"


def test_a_zip_of_a_later_version_is_refused(tmp_path):
    with pytest.raises(UserError, match="x.zip: .*version 9.9.*--images"):
        Pictures(with_entry(tmp_path, (6, "H"), 99))


@pytest.mark.parametrize("images", ["images", "bomb.zip"])
def test_an_encoded_picture_over_the_limit_is_refused(folder, images, monkeypatch):
    (folder / "images/large.png").write_bytes(bytes(1001))
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "images/large.png", "large.png")
    monkeypatch.setattr(pictures, "MAX_BYTES", 1001)
    assert Pictures(folder / images).read("large.png") == bytes(1001)
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="cannot be read from .*more than 1000 bytes"):
        Pictures(folder / images).read("large.png")


@pytest.mark.parametrize("method, claimed, message", [
    (zipfile.ZIP_DEFLATED, 16 * 10**6, "more than 1000 bytes"),
    (zipfile.ZIP_DEFLATED, 900, "CRC"),
    (zipfile.ZIP_BZIP2, 900, "neither stored nor deflated"),
    (zipfile.ZIP_LZMA, 900, "neither stored nor deflated"),
])  # fmt: skip
def test_a_bomb_takes_no_more_memory_than_the_limit(tmp_path, method, claimed, message, monkeypatch):
    """16 MB of zeros, whatever size the directory claims."""
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", method) as archive:
        archive.writestr("a.png", bytes(16 * 10**6))
    raw = (tmp_path / "bomb.zip").read_bytes()
    (tmp_path / "bomb.zip").write_bytes(raw.replace(struct.pack("<L", 16 * 10**6), struct.pack("<L", claimed)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        Pictures(tmp_path / "bomb.zip").read("a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, peak


def test_a_zip_damaged_anywhere_gives_one_line_and_never_a_wrong_picture(tmp_path):
    contents, path = {f"{i}.jpg": b"%d" % i * 30 for i in range(4)}, tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    good, rng, n_refused = path.read_bytes(), random.Random(0), 0
    for at in range(len(good)):
        raw = bytearray(good)
        raw[at] = rng.choice([0, 255, raw[at] ^ 1, raw[at] ^ 128])
        path.write_bytes(raw[:at] if at % 20 == 0 else raw)
        try:
            opened = Pictures(path)
        except UserError as error:
            assert str(error).isprintable()
            assert "x.zip: " in str(error)
            assert "--images" in str(error)
            n_refused += 1
            continue
        for name, content in contents.items():
            try:
                assert opened.read(name) == content
            except ValueError as error:
                assert "cannot be read from" in str(error)
    assert n_refused > 20


# --- decoding


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


def test_sixteen_bits_look_like_their_upper_eight():
    grey = np.asarray(photograph(250, 301).convert("L"))
    values = grey * np.uint16(256) + np.arange(250, dtype=np.uint16)
    expected = np.stack([grey] * 3, axis=2)
    pgm = b"P5 250 301 65535\n" + values.astype(">u2").tobytes()
    files = [encoded(Image.fromarray(values)), encoded(Image.fromarray(values), "TIFF"), pgm,
             encoded(Image.fromarray(values.astype(np.int32)), "TIFF")]  # fmt: skip
    assert {Image.open(io.BytesIO(data)).mode for data in files} >= {"I;16", "I"}
    for data in files:
        assert np.array_equal(np.asarray(open_picture(data)), expected)


def test_eight_bits_in_32_are_kept():
    values = np.arange(600, dtype=np.int32).reshape(20, 30) % 256
    decoded = open_picture(encoded(Image.fromarray(values), "TIFF"))
    assert np.array_equal(np.asarray(decoded), np.stack([values] * 3, axis=2))


def test_pillow_is_silenced_once():
    before = len(warnings.filters)
    for _ in range(3):
        open_picture(encoded(photograph(20, 30)))
    assert len(warnings.filters) == before


def test_a_zip_finds_names_below_any_of_the_folders_above_all_pictures(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in "ab":
            archive.writestr(f"coco/train2017/{name}.jpg", name)
    pictures = Pictures(tmp_path / "x.zip")
    for folder in ("", "train2017/", "coco/train2017/"):
        assert pictures.read(f"{folder}a.jpg") == b"a"
    with pytest.raises(ValueError, match="No such file in the zip"):
        pictures.read("coco/a.jpg")


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
    with pytest.raises(ValueError, match=r"not a readable picture \((its format is none of JPEG, PNG, .*|\w+: .+)\)"):
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
    with pytest.raises(ValueError, match=r"^(\d+x\d+|its) pixels exceed the limit of 100000000$"):
        open_picture(png_header(*size))


def test_a_picture_of_exactly_max_pixels_is_read(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 600)
    assert open_picture(encoded(photograph(30, 20))).size == (30, 20)
    with pytest.raises(ValueError, match="^601x1 pixels exceed the limit of 600$"):
        open_picture(encoded(photograph(601, 1)))
