"""Decoding of images to RGB pixels: with Pillow, as for published results, or faster with simplejpeg.

Both decoders reject files that they cannot decode faithfully.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import BrokenImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 89_478_485  # 256 MiB of RGB, from which on Pillow warns of a decompression bomb
# Of Pillow's formats these; others start programs (Ghostscript for EPS), or hold no photographs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
END_OF_IMAGE = b"\xff\xd9"
HARMLESS_WARNINGS = (
    "extraneous bytes before marker",
    "JFIF revision",
    "SOS parameters",
)  # warnings of libjpeg
UNSUPPORTED_SAMPLING = "Could not determine subsampling"  # such as 4x2, which Pillow decodes


class JpegFrame(NamedTuple):
    """Frame header of a JPEG."""

    width: int
    height: int
    components: int
    marker: int  # 0xC0 baseline, 0xC1 extended, 0xC2 progressive; others are not decoded by simplejpeg


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """Return the frame header of a JPEG, or None if the data are no JPEG or cannot be parsed."""
    for marker, content in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(content) >= 6:
            height, width = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
            return JpegFrame(width, height, content[5], marker)
    return None


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of a JPEG's segments, up to the header of its first scan; nothing for other data."""
    position = 2 if data[:2] == b"\xff\xd8" else len(data)
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, data[position + 4 : end]
        if marker == 0xDA:  # the pixels follow
            return
        position = end


def decode_pillow(data: bytes) -> Image.Image:
    """Decode with Pillow to an RGB image; the EXIF orientation is not applied.

    Raises:
        BrokenImageError: the data are not an image, truncated, or too large.
    """
    check_complete(data)
    with open_image(io.BytesIO(data)) as image:
        return to_rgb(image)


@contextmanager
def open_image(source: IO[bytes] | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image with Pillow, in one of FORMATS and of at most `max_pixels` pixels.

    Raises:
        BrokenImageError: it cannot be opened, or the block, which reads its pixels, raises an error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size raises an error
            image = Image.open(source, formats=FORMATS)
        with image:
            check_size(*image.size, max_pixels)
            yield image
    except (BrokenImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BrokenImageError("not an image, or of an unknown format") from error
    except Exception as error:  # Pillow's readers raise many types, from SyntaxError to struct.error
        raise BrokenImageError(f"cannot be decoded: {' '.join(str(error).split())}") from error


def decode_fast(data: bytes) -> Tensor:
    """Decode to RGB pixels (H, W, 3), uint8, which equal those of `decode_pillow`.

    Ordinary JPEGs go to libjpeg-turbo through simplejpeg, which saves Pillow's copies and reports where the library
    made up pixels for damaged data. Everything else goes through Pillow, as do all images without simplejpeg.

    Raises:
        BrokenImageError: the data are not an image, truncated, or too large.
    """
    frame = None if simplejpeg is None else jpeg_frame(data)
    if frame is None or frame.components not in (1, 3) or frame.marker > 0xC2 or not frame.height:
        return image_to_tensor(decode_pillow(data))
    check_complete(data)
    check_size(frame.width, frame.height)
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, strict=True))  # (H, W, 3)
    except ValueError as error:
        if any(words in str(error) for words in (*HARMLESS_WARNINGS, UNSUPPORTED_SAMPLING)):
            return image_to_tensor(decode_pillow(data))
        raise BrokenImageError(f"cannot be decoded: {error}") from error


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to pixels (H, W, 3), uint8."""
    return torch.from_numpy(np.array(image))  # (H, W, 3)


def check_complete(data: bytes) -> None:
    """Check that the data are not empty and not a truncated JPEG, for which some decoders make up gray pixels.

    Raises:
        BrokenImageError: they are.
    """
    if not data:
        raise BrokenImageError("an empty file")
    is_jpeg = data[:2] == b"\xff\xd8"
    if is_jpeg and not data.endswith(END_OF_IMAGE) and data.rfind(END_OF_IMAGE) < data.rfind(b"\xff\xda"):
        raise BrokenImageError("a JPEG that is cut off: no end-of-image marker after its pixels")


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise BrokenImageError for more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise BrokenImageError(f"{width}x{height} pixels, above the limit of {max_pixels:,} (a decompression bomb?)")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to RGB. Transparency is dropped, as is customary; of 16 bits the upper 8 are kept, because
    Pillow's own conversion clips every value above 255 of 65,535.

    Raises:
        BrokenImageError: the pixels have no fixed range.
    """
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    elif image.mode == "F":
        raise BrokenImageError("floating-point pixels, which have no fixed range")
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BrokenImageError("32-bit pixels, which have no fixed range")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")
