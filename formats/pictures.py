"""Encoded pictures, read by name from a folder or a zip, and decoded to upright RGB."""

import contextlib
import io
import os
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from common import UserError, reason

MAX_BYTES = 2**28  # of an encoded picture; a larger one may be a decompression bomb
MAX_PIXELS = 100_000_000  # of a decoded or resized picture; a larger one may be a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # decoders that run no external program
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB; at 1 MB Pillow refuses long comments
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged EXIF, and of sizes that MAX_PIXELS allows
Turn = Image.Transpose
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_270,
         7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}  # EXIF orientation -> the operation that turns it upright  # fmt: skip


class Pictures:
    """Encoded pictures by name, from a folder or straight from a zip."""

    def __init__(self, path: str | Path):
        self.path, self.archive = Path(path), None
        if not self.path.is_dir():
            try:
                self.archive = zipfile.ZipFile(path)
                entries = [entry for entry in self.archive.infolist() if not entry.filename.startswith("__MACOSX/")]
                self.entries = {plain_name(entry): entry for entry in entries}
                top = PurePosixPath(os.path.commonprefix(list(self.entries)).rpartition("/")[0])  # above all pictures
                self.folders = [*top.parents, top]
            except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: neither a folder nor an intact zip of pictures ({reason(error)}); correct "
                                "--images, or copy the zip again") from None  # fmt: skip

    def read(self, name: str) -> bytes:
        """Raises ValueError with the reason if the picture is absent, damaged or over MAX_BYTES."""
        check_inside(name)
        try:
            if self.archive is None:
                file: IO[bytes] = open(self.path / name, "rb")
            else:
                names = [unicodedata.normalize("NFC", str(folder / name)) for folder in self.folders]
                entry = next(self.entries[name] for name in names if name in self.entries)
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("neither stored nor deflated")  # zipfile bounds only these while it unpacks
                file = self.archive.open(entry)
            with file:
                content = file.read(MAX_BYTES + 1)
        except StopIteration:
            raise ValueError(f"cannot be read from {self.path}: No such file in the zip") from None
        except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"cannot be read from {self.path}: {reason(error)}") from None
        if len(content) > MAX_BYTES:
            raise ValueError(f"cannot be read from {self.path}: it has more than {MAX_BYTES} bytes")
        return content


def check_inside(name):
    """Raises ValueError unless a picture's path, which comes from a downloaded file, stays below its folder."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if parts[0] == "" or ".." in parts or {"\0", "\\"} & {*name}:
        raise ValueError(f"its image {name!r:.80} is not a path inside the picture folder")


def plain_name(entry: zipfile.ZipInfo) -> str:
    """The name of a zip's entry in NFC. Python reads names without the UTF-8 flag as code page 437; most are UTF-8."""
    name = entry.filename.removeprefix("./")
    if not entry.flag_bits & 0x800 and not name.isascii():
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return unicodedata.normalize("NFC", name)


def open_picture(data: bytes) -> Image.Image:
    """Decodes an encoded picture to RGB, upright by its EXIF orientation.

    Raises ValueError with the reason if it has none of FORMATS, is damaged, or has more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            return turn_upright(to_rgb(image), image)
    except UnidentifiedImageError:
        raise ValueError(f"not a readable picture (its format is none of {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # Pillow's own limit is higher; it also bounds what Image.open allocates
        raise ValueError(f"its pixels exceed the limit of {MAX_PIXELS}") from None
    except Exception as error:  # Pillow's decoders raise SyntaxError, EOFError, struct.error and others
        raise ValueError(f"not a readable picture ({reason(error)})") from None
    raise ValueError(f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode. Raises ValueError if its pixels are neither of 8 nor of 16 bits."""
    if image.mode[0] in "IF":  # integers of 16 or 32 bits, or floats; Pillow's own conversion clips them to 255
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError("its pixels are not integers of 8 or 16 bits")
        has_8_bits = image.mode == "I" and pixels.max() < 2**8
        image = Image.fromarray((pixels if has_8_bits else pixels // 2**8).astype(np.uint8))
    return image.convert("RGB")


def turn_upright(image: Image.Image, original: Image.Image) -> Image.Image:
    """Turns `image` by the EXIF orientation of `original`. Ignores damaged EXIF."""
    try:
        turn = TURNS.get(original.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)
